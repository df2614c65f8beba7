"""What `fit` promises: a finished model is marked by one call and stays as good, or a clear word says why not."""

import copy

import pytest
import torch
from embedding import CLASSES, KEY, batch, embedder, network
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import wmengine

pytestmark = pytest.mark.usefixtures("one_thread")


def loader(steps=30):
    return [batch(64, seed=step) for step in range(steps)]


def accuracy(model):
    x, y = batch(400, seed=10_000)
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


@pytest.mark.slow
def test_a_finished_model_is_marked_by_one_call_and_stays_as_good():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    finished = copy.deepcopy(model)
    marks = embedder(model).fit(loader(), epochs=4)
    assert [wmengine.verify(model, mark, key=KEY).decision for mark in marks] == ["owned"] * 2
    assert not any(wmengine.verify(finished, mark).owned for mark in marks)
    assert accuracy(model) >= accuracy(finished) - 0.01


@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_fit_is_the_loop_of_mix_and_loss():
    ours, theirs = network(), network()
    emb = embedder(ours)
    emb.fit(loader(5), epochs=2, optimizer=torch.optim.SGD(ours.parameters(), 0.01), label_smoothing=0.1)
    emb, optimizer = embedder(theirs), torch.optim.SGD(theirs.parameters(), 0.01)
    for x, y in loader(5) * 2:
        optimizer.zero_grad()
        x, y = emb.mix(x, y)
        emb.loss(theirs(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_batches_may_be_dicts_with_labels_and_answers_dicts_with_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, pixels):
            return {"hidden": pixels, "logits": self.inner(pixels)}

    model = Named()
    before = copy.deepcopy(model.state_dict())
    batches = [{"pixels": x, "labels": y.int()} for x, y in loader(2)]
    marks = embedder(model, sample={"pixels": batch(64)[0]}).fit(batches, epochs=1)
    assert [mark.scheme for mark in marks] == ["sketch", "adi"]
    assert not torch.equal(model.state_dict()["inner.0.weight"], before["inner.0.weight"])


@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_frozen_layers_and_modes_come_back_as_they_were():
    model = network()
    model[3].weight.requires_grad_(False)
    model.eval()
    model[1].train()
    modes, frozen = [module.training for module in model.modules()], model[3].weight.clone()
    embedder(model).fit(loader(2), epochs=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[3].weight, frozen)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_a_row_that_is_left_over_alone_is_left_out():
    """Of one row no normalisation can be trained; a loader whose batches are all of one row is the owner's choice."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES))
    embedder(model, [wmengine.scheme("sketch", bits=32)]).fit([batch(8), batch(1)], epochs=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        embedder(model, [wmengine.scheme("sketch", bits=32)], name="other").fit([batch(1)], epochs=1)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*batch(8), strict=True)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (loader(1), {"epochs": 0}, ValueError, "epochs must be from 1"),
        (loader(1), {"rate": -1.0}, ValueError, "rate"),
        (loader(1), {"optimizer": "adam"}, TypeError, "optimizer must be one of torch.optim.*'adam'"),
        ([], {}, ValueError, "no number of batches.*give optimizer="),
        (iter(loader(1)), {}, ValueError, "no number of batches.*give optimizer="),
        (DataLoader(Endless(), batch_size=8), {}, ValueError, "no number of batches.*give optimizer="),
        (iter(loader(1)), {"optimizer": "mine"}, ValueError, "gave no batch in epoch 2"),
        ([batch(8)[0]], {}, TypeError, r"a batch must be \(inputs, labels\)"),
        ([tuple(each.numpy() for each in batch(8))], {}, TypeError, r"ndarray is none: torch.from_numpy"),
        ([(batch(8)[0] * torch.nan, batch(8)[1])], {}, ValueError, "no longer finite in epoch"),
    ],
)
def test_what_cannot_be_trained_is_refused(batches, options, error, message):
    model = network()
    if options.get("optimizer") == "mine":
        options = {**options, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    with pytest.raises(error, match=message):
        embedder(model).fit(batches, **{"epochs": 2, **options})
