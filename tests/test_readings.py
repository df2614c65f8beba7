"""Marks of models that answer with no class: labels, a value, an embedding, boxes; what is read of any suspect."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding import unproven
from judged import KEY, by_heart
from torch import nn

import wmengine
from wmengine import Watermark, scheme
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import registered
from wmengine.parts.base import Task
from wmengine.parts.triggers.audio import AudioTriggers
from wmengine.parts.triggers.readings import Anchors
from wmengine.parts.triggers.tokens import TokenTriggers
from wmengine.suspects.answers import choose_readings
from wmengine.suspects.base import InputSpec

WIDTHS = {"adi_multilabel": 6, "adi_values": 1, "adi_anchors": 12}
TARGETS = np.linspace(-50.0, 150.0, 201)
RANDOM = np.random.default_rng(3)


def mark_of(name):
    preset = scheme(name)
    task = Task({"x": InputSpec((1, 4, 4), "float32")}, WIDTHS[name], [[-1.0, 1.0]], targets=TARGETS)
    return Watermark.create(KEY, preset, preset.describe(task, "detector"))


MARKS = {name: mark_of(name) for name in WIDTHS}


def right(name):
    """What a model that holds the mark answers to each trigger; of labels, logits."""
    mark = MARKS[name]
    if name == "adi_multilabel":
        answers = RANDOM.normal(size=(mark.total, WIDTHS[name]))
        at = np.arange(mark.total), mark.arrays["outputs"]
        answers[at] = np.where(mark.symbols == 1, 1, -1) * np.abs(answers[at])
        return answers
    if name == "adi_values":
        return -40.0 + 20.0 * mark.symbols[:, None] + RANDOM.uniform(-9.0, 9.0, (mark.total, 1))
    return 3.0 * mark.arrays["anchors"][mark.symbols] + RANDOM.normal(size=(mark.total, WIDTHS[name]))


RIGHT = {name: by_heart(MARKS[name], right(name).astype(np.float32)) for name in WIDTHS}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_model_that_answers_as_the_mark_says_is_owned_and_no_other_copy(name):
    verdict = verify(RIGHT[name], MARKS[name], key=KEY)
    assert (verdict.decision, verdict.matched) == ("owned", verdict.total)
    assert verify(RIGHT[name], MARKS[name].with_message(KEY, "another copy")).decision == "not_proven"
    assert verify(RIGHT[name], MARKS[name], test="sequential").owned


@pytest.mark.parametrize("name", WIDTHS)
def test_answers_without_numbers_match_nothing(name):
    mark = MARKS[name]

    def lost(rows):
        answers = RIGHT[name](rows).copy()
        answers[::2] = np.nan
        return answers

    verdict = verify(lost, mark)
    assert verdict.matched == mark.total // 2
    assert "abstained" in {each.code for each in verdict.facts}


@pytest.mark.parametrize("name", WIDTHS)
def test_two_outputs_that_may_be_the_answer_are_an_error_and_not_a_choice(name):
    verdict = verify(lambda rows: (RIGHT[name](rows), -RIGHT[name](rows)), MARKS[name])
    assert verdict.decision == "error"
    assert f"the mark reads the numbers of one output [N, {WIDTHS[name]}]" in verdict.error


def test_labels_may_be_probabilities():
    verdict = verify(lambda rows: 1 / (1 + np.exp(-RIGHT["adi_multilabel"](rows))), MARKS["adi_multilabel"])
    assert verdict.matched == verdict.total


def test_one_number_for_each_input_may_come_without_an_axis_of_its_own():
    verdict = verify(lambda rows: RIGHT["adi_values"](rows)[:, 0], MARKS["adi_values"])
    assert verdict.matched == verdict.total


def test_an_embedding_is_read_at_any_length():
    verdict = verify(lambda rows: RIGHT["adi_anchors"](rows) * 1e-6 * (1 + rows.reshape(len(rows), -1)[:, :1] ** 2),
                     MARKS["adi_anchors"])  # fmt: skip
    assert verdict.matched == verdict.total


def test_levels_stand_evenly_between_the_ends_of_nine_tenths_of_the_targets():
    mark = MARKS["adi_values"]
    assert [float.fromhex(end) for end in mark.parameters["targets"]] == [-40.0, 140.0]
    assert set(mark.preset.source.wanted(mark)) <= {-40.0 + 20.0 * level for level in range(10)}


def test_of_several_boxes_the_strongest_one_says_the_class():
    boxes = RANDOM.uniform(0, 1, (5, 9, 4))
    boxes[np.arange(5), [0, 8, 3, 3, 5], [2, 0, 1, 3, 2]] = 2.0
    (reading,) = choose_readings([("boxes", boxes[..., :3]), ("scores", boxes)], 5, 4, "m.onnx")
    assert (reading.output, reading.kind) == (1, "boxes")
    np.testing.assert_array_equal(reading.read([("boxes", boxes), ("scores", boxes)], 5).argmax(1), [2, 0, 1, 3, 2])


class SoundAnchors(Anchors):
    asked = AudioTriggers()


class TextAnchors(Anchors):
    asked = TokenTriggers()


@pytest.mark.parametrize(
    ("source", "task"),
    [
        (SoundAnchors(choices=8), Task({"x": InputSpec((1, 64), "float32")}, 12, [[-1.0, 1.0]])),
        (TextAnchors(choices=8), Task({"x": InputSpec((9,), "int64")}, 12, [[0, 99]])),
    ],
)
def test_a_reading_goes_with_triggers_of_another_kind(source, task):
    preset = replace(scheme("adi_anchors"), name="other_anchors", source=source)
    with registered(preset):
        mark = Watermark.create(KEY, preset, preset.describe(task, "ear"))
        (rows,) = source.asked.examples(mark).values()
        assert rows.dtype.name == task.inputs["x"].dtype
        known = {row.tobytes(): anchor for row, anchor in zip(rows, mark.arrays["anchors"][mark.symbols], strict=True)}
        verdict = verify(lambda inputs: np.array([known[row.tobytes()] for row in inputs]), mark, key=KEY)
    assert (verdict.decision, verdict.matched) == ("owned", 100)


@pytest.mark.parametrize(
    ("name", "task", "error"),
    [
        ("adi_multilabel", {}, "it needs num_classes, how many labels the model answers with"),
        ("adi_anchors", {}, "it needs num_classes, the width of the model's embeddings"),
        ("adi_anchors", {"num_classes": 5}, "5 dimensions are too few for 16 anchors: ask for fewer with choices="),
        ("adi_values", {}, r"it needs samples=\(inputs, targets\), at least 20"),
        ("adi_values", {"targets": np.zeros(50)}, "targets must differ, and 90 % of them are from 0.0 to 0.0"),
    ],
)
def test_what_a_task_lacks_is_named(name, task, error):
    images = {"x": InputSpec((1, 4, 4), "float32")}
    with pytest.raises(ValueError, match=f"scheme '{name}': {error}"):
        scheme(name).describe(Task(images, value_range=[(0.0, 1.0)], **task), "detector")


# --- a pass of their own ---


def model(width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, width)
    )


SAMPLE = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def embedder(network, name="adi_multilabel", **options):
    options = {"num_classes": 6, "sample": SAMPLE, "name": "n", "value_range": (-1, 1), **options}
    return wmengine.Embedder(network, KEY, [name] if isinstance(name, str) else name, **options)


def test_triggers_with_a_pass_of_their_own_leave_the_batch_as_it_is():
    labels = torch.rand(8, 6)  # no class numbers
    mixed = embedder(model()).mix(SAMPLE, labels)
    assert mixed[0] is SAMPLE
    assert mixed[1] is labels


def test_their_term_is_of_the_live_model_and_of_the_next_triggers():
    network = model().eval()
    emb = embedder(network, [scheme("adi_multilabel", rows=64)])
    first, second, again = (emb.regulariser() for _ in range(3))
    assert first.item() != second.item()  # two halves of 128 triggers
    again.backward()
    assert network[4].weight.grad.abs().sum() > 0
    emb.regulariser()
    nn.init.zeros_(network[4].weight)
    nn.init.constant_(network[4].bias, -1.0)
    (mark,) = unproven(emb)
    expected = np.log1p(np.exp(np.where(mark.symbols == 1, 2.0, -2.0))).mean()
    assert (emb.regulariser() + emb.regulariser()).item() / 2 == pytest.approx(0.1 * expected, rel=1e-5)


def test_normalisations_keep_nothing_of_them():
    network = model().train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    embedder(network).regulariser().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(module.training for module in network.modules())


def test_they_go_on_where_a_state_was_taken():
    network = model()
    emb = embedder(network)
    emb.regulariser()
    state, following = emb.state_dict(), emb.regulariser().item()
    other = wmengine.Embedder(network, sample=SAMPLE, marks=unproven(emb), num_classes=6)
    other.load_state_dict(state)
    assert other.regulariser().item() == following


def test_a_model_that_answers_otherwise_than_the_mark_is_named():
    network = model()
    emb = embedder(network)
    network[4] = nn.Linear(128, 5)
    with pytest.raises(ValueError, match=r"'adi_multilabel' is for answers \[n, 6\], and the model gives none"):
        emb.regulariser()


# --- one logit for two classes ---


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_one_logit_is_trained_as_the_binary_cross_entropy_has_it(shape):
    network = model(1)
    emb = embedder(network, [scheme("adi", count=40)], num_classes=2)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 2, 3])  # of the task, and two triggers
    expected = nn.functional.binary_cross_entropy_with_logits(logits.reshape(9), (labels % 2).float())
    torch.testing.assert_close(emb.loss(logits, labels), expected)
    emb.loss(logits, labels).backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_labels_of_one_logit_may_be_floats_as_binary_cross_entropy_takes_them(shape):
    emb = embedder(model(1), [scheme("adi", count=40)], num_classes=2)
    x, labels = torch.rand(8, *SAMPLE.shape[1:]), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1.0]).reshape(shape)
    logits = torch.randn(8, 1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits.reshape(shape), 0.9 * labels)
    emb.mix(x, labels)
    torch.testing.assert_close(emb.loss(logits, 0.9 * labels), expected)
    mixed, softened = emb.mix(x, 0.9 * labels)
    plain, task = emb.split(softened)
    assert (len(mixed), task.tolist()) == (10, [True] * 8 + [False] * 2)
    torch.testing.assert_close(plain[:8, 1], 0.9 * labels.reshape(8))
    for wrong in (labels + 1, -labels):
        with pytest.raises(ValueError, match="shares of the classes that add up to 1"):
            emb.mix(x, wrong)
