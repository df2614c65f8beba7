"""A mark in activations on keyed noise, read through a keyed network that nobody trained (diction)."""

import numpy as np
import pytest
import torch
from embedding import KEY, batch, embedder, network, unproven
from torch import nn

import wmengine
from wmengine.ops import reference
from wmengine.suspects import open_suspect

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = 48


def diction(model):
    chosen = wmengine.scheme("diction", bits=BITS, groups=4, members=3, hidden=64, strength=0.1)
    return embedder(model, [chosen], num_classes=None)


@pytest.fixture(scope="module")
def marked():
    model = network(seed=4)
    emb = diction(model.eval())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(120):
        optimizer.zero_grad()
        emb.regulariser().backward()
        optimizer.step()
    return model, emb.watermarks()[0]


def test_the_module_and_its_file_hold_the_bits_and_another_network_none(marked, tmp_path):
    model, mark = marked
    path = wmengine.export_onnx(model, batch(1)[0], tmp_path / "folded.onnx")
    for suspect in (model, path):
        verdict = wmengine.verify(suspect, mark, key=KEY)
        assert (verdict.decision, verdict.queries) == ("owned", 0)
        assert verdict.matched >= 0.95 * BITS
    assert wmengine.verify(network(seed=5), mark).decision == "not_proven"


def test_it_is_asked_noise_that_no_other_key_asks(marked):
    mark = marked[1]
    triggers = mark.arrays["triggers"].astype(float)
    assert triggers.shape == (12, 1, 8, 8)
    neighbours = np.corrcoef(triggers[..., :-1].ravel(), triggers[..., 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.15  # pictures are smooth
    other = wmengine.Watermark.create(wmengine.Key("ACME Vision", bytes(32)), mark.preset, mark.parameters)
    assert not np.array_equal(other.arrays["triggers"], mark.arrays["triggers"])


def extracted(mark, activations):
    """In float64, from the reference's own matrices."""
    found = []
    for group, centre in enumerate(activations.astype(np.float64).reshape(4, 3, -1).mean(1)):
        unit = (centre - centre.mean()) / np.sqrt(centre.var() + 1e-12)
        hidden = reference.project(unit, int(mark.arrays["group_keys"][group]), 64, "gaussian")
        key = int(mark.arrays["extractor_keys"][group])
        found.append(reference.project(np.tanh(hidden), key, BITS // 4, "gaussian"))
    return np.concatenate(found)


def test_training_and_reading_see_the_same_numbers(marked):
    _, mark = marked
    activations = np.random.default_rng(0).normal(size=(12, 64))
    expected = extracted(mark, activations)
    np.testing.assert_allclose(mark.preset.source.projected(activations, mark, BITS), expected, rtol=1e-12)
    trained = mark.preset.source.projected(torch.from_numpy(activations), mark, BITS)
    np.testing.assert_allclose(trained.numpy(), expected, rtol=1e-4, atol=1e-6)
    rescaled = mark.preset.source.projected(100.0 * activations + 7.0, mark, BITS)
    np.testing.assert_allclose(rescaled, expected, rtol=1e-6)


def test_what_is_read_of_a_suspect_is_the_extractor_s_answer(marked):
    model, mark = marked
    suspect = open_suspect(model)
    activations = suspect.activations(mark.parameters["place"], mark.preset.source.examples(mark))
    (observation,) = mark.preset.source.observe(mark, suspect, BITS).found
    np.testing.assert_allclose(observation.y, extracted(mark, activations), rtol=1e-3, atol=1e-4)


def test_the_loss_is_of_the_live_weights():
    model = network(seed=4)
    emb = diction(model)
    before = emb.regulariser().item()
    with torch.no_grad():
        model[8].weight *= -5.0
    assert abs(emb.regulariser().item() - before) > 0.01 * before


def test_activations_that_are_all_zero_are_no_bits_and_no_nan():
    model = network(seed=4)
    emb = diction(model)
    with torch.no_grad():
        model[8].weight.zero_()
        model[8].bias.fill_(-1.0)
    loss = emb.regulariser()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)
    (mark,) = unproven(emb)
    verdict = wmengine.verify(model, mark)
    assert (verdict.decision, verdict.matched) == ("not_proven", 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 0}, "hidden must be from 1"),
        ({"hidden": 8}, "8 hidden units are fewer than the bits of each group"),
        ({"bits": 2048}, "16 groups of 64 activations cannot hold 2048 bits"),
    ],
)
def test_an_extractor_that_cannot_give_the_bits_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        embedder(network(), [wmengine.scheme("diction", **options)], num_classes=None)


def test_a_network_that_ends_otherwise_is_refused():
    with pytest.raises(ValueError, match="linear layer at the network's end, and there is none"):
        diction(nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
