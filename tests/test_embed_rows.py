"""What `mix` promises: which trigger rows a batch gets, in whose order, labels and formats, and what it refuses."""

import numpy as np
import pytest
import torch
from embedding import CLASSES, batch, embedder, network, unproven
from torch import nn

import wmengine
from wmengine.suspects.adapters import to_input

pytestmark = pytest.mark.usefixtures("one_thread")

ADI = [wmengine.scheme("adi", count=40)]


@pytest.mark.parametrize(("rows", "added"), [(4, 2), (16, 2), (64, 8), (400, 40), (1000, 40)])
def test_mix_appends_an_eighth_of_the_batch_at_least_two_and_at_most_all_triggers(rows, added):
    emb = embedder(network())
    x, y = batch(rows)
    mixed, labels = emb.mix(x, y)
    assert torch.equal(mixed[:rows], x)
    assert torch.equal(labels[:rows], y)
    assert len(mixed) == len(labels) == rows + added
    assert bool(((labels[rows:] >= CLASSES) & (labels[rows:] < 2 * CLASSES)).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_are_class_numbers(dtype):
    emb = embedder(network(), [wmengine.scheme("adi", count=10)])
    x, y = batch(16)
    mixed, labels = emb.mix(x, y.to(dtype))
    assert labels.dtype == torch.int64
    assert torch.equal(labels[:16], y)
    logits = torch.randn(len(mixed), CLASSES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(emb.loss(logits[:16], y.to(dtype)), emb.loss(logits[:16], y))


def test_every_trigger_is_drawn_once_before_any_is_drawn_again():
    emb = embedder(network(), ADI)
    x, y = batch(64)
    seen = torch.cat([emb.mix(x, y)[0][64:] for _ in range(5)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == 40


def triggers_of(emb):
    """The trigger rows of one pass, and which triggers of the mark they are, by their values."""
    (adi,) = unproven(emb)
    x, y = emb.mix(*batch(400))
    expected = to_input(adi.arrays["triggers"], adi.parameters["value_range"])
    order = [np.flatnonzero((expected == row).all(axis=(1, 2, 3))).tolist() for row in x[400:].numpy()]
    return adi, y[400:].numpy() - CLASSES, order


def test_triggers_carry_the_labels_and_the_values_that_verification_asks_for():
    adi, labels, order = triggers_of(embedder(network(), ADI))
    assert sorted(order) == [[number] for number in range(40)]
    assert np.array_equal(labels, adi.arrays["labels"][np.ravel(order)])


def test_a_model_that_writes_into_its_batch_trains_on_the_right_triggers():
    """What mix hands out is the loop's own, and so are the labels."""
    emb = embedder(network(), ADI)
    for _ in range(3):
        x, y = emb.mix(*batch(400))
        nn.functional.relu_(x)
        y.zero_()
    adi, labels, order = triggers_of(emb)
    assert sorted(order) == [[number] for number in range(40)]
    assert np.array_equal(labels, adi.arrays["labels"][np.ravel(order)])


def test_a_model_that_writes_into_its_input_is_judged_by_the_right_triggers():
    model = nn.Sequential(nn.ReLU(inplace=True), *network())
    adi = unproven(embedder(model, ADI))[0]
    inputs = to_input(adi.arrays["triggers"], adi.parameters["value_range"])
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(inputs.copy())).argmax(1).numpy()
    assert adi.baseline["matched"] == int((answers == adi.symbols).sum())


def test_the_samples_range_per_channel_is_the_triggers_unless_it_is_given():
    sample = torch.stack([torch.linspace(-1, 3, 64), torch.linspace(0, 0.1, 64)]).reshape(1, 2, 8, 8)
    (mark,) = unproven(embedder(network(channels=2), ADI, sample=sample))
    ends = [[float.fromhex(end) for end in pair] for pair in mark.parameters["value_range"]]
    assert ends == [[-1.0, 3.0], [0.0, float(np.float32(0.1))]]
    (mark,) = unproven(embedder(network(channels=2), ADI, sample=sample, value_range=(0, 1)))
    assert [[float.fromhex(end) for end in pair] for pair in mark.parameters["value_range"]] == [[0.0, 1.0]] * 2


def test_channels_last_batches_stay_channels_last():
    emb = embedder(network(channels=3), sample=batch(64, channels=3)[0])
    x, y = batch(16, channels=3)
    mixed, _ = emb.mix(x.contiguous(memory_format=torch.channels_last), y)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert not mixed.is_contiguous()


def test_a_white_box_mark_alone_leaves_the_batch_as_it_is():
    emb = embedder(network(), [wmengine.scheme("sketch", bits=64)])
    x, y = batch(16)
    mixed, labels = emb.mix(x, y)
    assert mixed is x
    assert labels is y


# What it refuses


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(16, CLASSES, dtype=torch.int64), TypeError, r"or soft labels, floating \[n, 4\].*int64 \[16, 4\]"),
        (torch.full((16, 2 * CLASSES), 1 / 8), ValueError, r"soft labels must be \[n, 4\]"),
        (torch.zeros(16, CLASSES + 1), TypeError, r"soft labels, floating \[n, 4\]"),
        (torch.zeros(16), TypeError, "labels must be class numbers, integers"),
        (np.zeros(16, np.int64), TypeError, "labels must be a tensor.*ndarray"),
        (torch.full((16,), CLASSES), ValueError, "labels must be from 0 to 3, and one is 4"),
        (torch.full((16,), -1), ValueError, "labels must be from 0 to 3, and one is -1"),
        (torch.zeros(15, dtype=torch.int64), ValueError, "with 15 labels"),
    ],
)
def test_mix_refuses_labels_that_it_cannot_carry(labels, error, message):
    with pytest.raises(error, match=message):
        embedder(network()).mix(batch(16)[0], labels)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(4, 1, 9, 9), ValueError, r"a batch must be \[n, 1, 8, 8\].*\[4, 1, 9, 9\]"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), TypeError, "inputs must be floating.*uint8"),
        (np.zeros((4, 1, 8, 8), np.float32), TypeError, "inputs must be torch tensors, and ndarray is none"),
        ({"input": torch.zeros(4, 1, 8, 8)}, TypeError, "inputs must be a tensor, as the sample was"),
    ],
)
def test_mix_refuses_inputs_unlike_the_sample(inputs, error, message):
    with pytest.raises(error, match=message):
        embedder(network()).mix(inputs, torch.zeros(4, dtype=torch.int64))


def test_batches_that_a_mark_only_watches_are_looked_at_too():
    """Without trigger rows; a scheme that runs the model again on each batch keeps what mix saw."""
    emb = embedder(network(), [wmengine.scheme("deepipr_v2", bits=16)], num_classes=None)
    x, y = batch(8)
    for wrong in ((x.numpy(), y), (x, y.numpy()), (x, y.float())):
        with pytest.raises(TypeError, match="must be"):
            emb.mix(*wrong)
    assert emb.mix(x, y)[0] is x


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64), ValueError, r"logits must be \[4, 4\].*\[4, 10\]"),
        (torch.zeros(5, CLASSES), torch.zeros(4, dtype=torch.int64), ValueError, r"logits must be \[4, 4\].*\[5, 4\]"),
        (torch.zeros(4, CLASSES), torch.zeros(4, CLASSES + 1), TypeError, "soft labels"),
        (({},), torch.zeros(4, dtype=torch.int64), TypeError, "logits must be a torch tensor.*tuple"),
        ({"scores": None}, torch.zeros(4, dtype=torch.int64), TypeError, "logits must be a torch tensor.*dict"),
        (np.zeros((4, CLASSES), np.float32), torch.zeros(4, dtype=torch.int64), TypeError, "logits must be a torch te"),
        (
            torch.zeros(4, CLASSES),
            np.zeros(4, np.int64),
            TypeError,
            "labels must be a tensor.*ndarray",
        ),
        (torch.zeros(4, CLASSES), torch.full((4,), 5 * CLASSES), ValueError, "group"),
    ],
)
def test_loss_refuses_logits_of_another_width_and_labels_of_another_embedder(logits, labels, error, message):
    with pytest.raises(error, match=message):
        embedder(network()).loss(logits, labels)


class InPlace(nn.Module):
    """Normalises its batch where it lies."""

    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


class Copying(nn.Module):
    """Does the same elsewhere."""

    def forward(self, x):
        return (x - 0.5) / 0.25


@pytest.mark.parametrize("name", ["sketch", "zhang_content", "deepipr_v2", "ewe_keyed", "posthoc", "response"])
def test_a_model_that_writes_into_its_input_writes_into_no_tensor_of_the_owners(name):
    """Nor into what a second run of the network on the batch is given."""
    options = {"sketch": {"bits": 16}, "deepipr_v2": {"bits": 16}, "response": {"probes": 512, "views": 1}}
    preset = wmengine.scheme(name, **options.get(name, {}))
    controls = [network(1)] if "controls" in preset.needs else []
    x, y = batch(600)
    kept, losses = x.clone(), []
    for first in (InPlace(), Copying()):
        model = nn.Sequential(first, *network())
        given = {"sample": x[:64], "samples": (x, y), "controls": controls, "value_range": (-2, 2)}
        emb = embedder(model, [preset], **given)
        mixed, labels = emb.mix(x[:16].clone(), y[:16])
        logits = model(mixed.clone() if name == "response" else mixed)
        losses.append(emb.loss(logits, labels, inputs=mixed).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.equal(x, kept)
