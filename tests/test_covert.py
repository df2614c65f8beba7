"""The critic of `riga`: it learns in every step, hides what the bits do to the weights, and its state goes along."""

import copy
import io
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding import batch, embedder, network, train, unproven
from scipy.stats import ks_2samp

import wmengine
from wmengine.demo import build_network, load_digits
from wmengine.demo import train as train_on_digits
from wmengine.marks.catalogue import registered
from wmengine.parts.training.link import Link

pytestmark = pytest.mark.usefixtures("one_thread")

RIGA = wmengine.scheme("riga", bits=64, width=256)


def losses(model, emb, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = emb.regulariser()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_critic_is_part_of_the_loss_and_learns_only_while_the_model_does():
    emb = embedder(network(), [RIGA])
    with torch.no_grad():
        before = emb.state_dict()
        emb.regulariser()
    (old,), (new,) = before.values(), emb.state_dict().values()
    assert all(torch.equal(value, new["critic"][name]) for name, value in old["critic"].items())
    kept = {name: value.clone() for name, value in old["critic"].items()}
    emb.regulariser().backward()
    assert not any(torch.equal(value, new["critic"][name]) for name, value in kept.items())
    strong, weak = (
        embedder(network(), [wmengine.scheme("riga", bits=64, width=256, critic=critic)]) for critic in (2.0, 1.0)
    )
    assert strong.regulariser().item() > weak.regulariser().item() + 0.3


def test_training_goes_on_where_its_state_was_taken():
    model = network()
    emb = embedder(model, [RIGA])
    losses(model, emb)
    marks, file = unproven(emb), io.BytesIO()
    torch.save(emb.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    resumed = wmengine.Embedder(again, sample=batch(64)[0], marks=marks, schemes=[RIGA])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert losses(again, resumed) == pytest.approx(losses(model, emb), rel=1e-6)


def test_the_users_random_numbers_stay_what_they_would_be():
    model = network()
    state = torch.get_rng_state()
    emb = embedder(model, [RIGA])
    emb.regulariser().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all("critic" not in name for name in model.state_dict())


def test_a_model_in_half_precision_is_trained_too():
    model = network().to(torch.bfloat16)
    emb = embedder(model, [RIGA], sample=batch(64)[0].to(torch.bfloat16))
    assert all(np.isfinite(losses(model, emb)))


def train_slowly(model, rows, emb):
    """150 steps at a rate that leaves a trained network's weights about where they are."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=150)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for chosen in torch.randperm(240, generator=generator).split(16):
            x, y = emb.mix(rows[0][chosen], rows[1][chosen])
            loss = emb.loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@pytest.mark.slow
def test_with_the_critic_the_weights_lie_more_like_unmarked_ones():
    """The largest distance of two distribution functions, over three networks that were trained before."""
    data = load_digits()
    plain = replace(wmengine.scheme("riga"), name="riga without its critic", training=Link("bce", 0.05))
    with ExitStack() as stack:
        stack.enter_context(registered(plain))
        for seed in (1, 2, 3):
            trained = train_on_digits(build_network(seed), data.owner, 3, seed)
            distances = []
            for preset in (plain, wmengine.scheme("riga")):
                model = copy.deepcopy(trained)
                key = wmengine.Key("ACME", bytes([seed] * 32))
                emb = wmengine.Embedder(
                    model, key, [preset], num_classes=10, sample=data.owner[0][:64], name="digits", value_range=(0, 1)
                )
                train_slowly(model, data.owner, emb)
                assert wmengine.verify(model, emb.watermarks()[0]).matched == 256
                pair = [each[7].weight.detach().flatten().numpy() for each in (trained, model)]
                distances.append(ks_2samp(*pair).statistic)
            assert distances[1] < 0.5 * distances[0]


def test_a_weight_of_fewer_values_than_the_critic_looks_at_is_marked_too():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1, bias=False))
    emb = embedder(model, [wmengine.scheme("riga", bits=8, width=16)], num_classes=None)
    assert all(np.isfinite(losses(model, emb)))


@pytest.mark.slow
def test_a_fresh_network_learns_its_task_and_its_bits_beside_the_critic():
    model = network()
    emb = embedder(model, [RIGA])
    train(model, emb, 150)
    assert wmengine.verify(model.eval(), emb.watermarks()[0]).matched == 64
    x, y = batch(200, seed=77)
    assert (model(x).argmax(1) == y).float().mean() > 0.95
