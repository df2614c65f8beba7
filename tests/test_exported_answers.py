"""What an exported file answers with: whatever its outputs hold, the copy is owned and its twin is not accused."""

import numpy as np
import onnx
import pytest
from exported import BOOL, CLASSES, FEATURES, FLOAT, INT64, MARK, SHAPE, TEXT, ending, judge
from onnx import helper

from wmengine import verify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


TOP = [helper.make_node("TopK", ["{y}", "k"], ["values", "indices"])]
UNSORTED = [
    *(
        helper.make_node("TopK", ["{y}", "k"], ["v", "i"]),
        helper.make_node("Gather", ["v", "back"], ["values"], axis=1),
    ),
    helper.make_node("Gather", ["i", "back"], ["indices"], axis=1),
]
K = [("k", np.array([3]))]
ENDINGS = {
    "softmax": ending([helper.make_node("Softmax", ["{y}"], ["p"])], ["p"]),
    "log-softmax": ending([helper.make_node("LogSoftmax", ["{y}"], ["p"])], ["p"]),
    "log of a softmax that is 0": ending(
        [helper.make_node("Mul", ["{y}", "sharp"], ["z"]), helper.make_node("Softmax", ["z"], ["p"]),
         helper.make_node("Log", ["p"], ["s"])], ["s"], (), [("sharp", np.array(50, np.float32))],
    ),
    "label": ending([helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0)], ["l"], [INT64]),
    "label [N, 1]": ending([helper.make_node("ArgMax", ["{y}"], ["l"], axis=1)], ["l"], [INT64]),
    "label as a float": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Cast", ["l"], ["f"], to=FLOAT)], ["f"]
    ),
    "top 3": ending(TOP, ["values", "indices"], [FLOAT, INT64], K),
    "top 3, numbers first": ending(TOP, ["indices", "values"], [INT64, FLOAT], K),
    "top 3, numbers only": ending(TOP, ["indices"], [INT64], K),
    "top 10 of 10": ending(TOP, ["values", "indices"], [FLOAT, INT64], [("k", np.array([10]))]),
    "top 3, worst first": ending(UNSORTED, ["values", "indices"], [FLOAT, INT64], [*K, ("back", np.array([2, 1, 0]))]),
    "features before": ending([], ["features", "{y}"]),
    "features behind": ending([], ["{y}", "features"]),
    "maps before": ending(
        [helper.make_node("Unsqueeze", ["{y}", "k"], ["column"]), helper.make_node("Mul", ["column", "{y}"], ["map"])],
        ["map", "{y}"], (), [("k", np.array([2]))],
    ),
    "an auxiliary head before": ending(
        [helper.make_node("MatMul", ["features", "w"], ["aux"])], ["aux", "{y}"], (),
        [("w", np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32))],
    ),
    "logits and softmax": ending([helper.make_node("Softmax", ["{y}"], ["p"])], ["{y}", "p"]),
    "labels from 1": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Add", ["l", "one"], ["n"])],
        ["n"], [INT64], [("one", np.array(1))],
    ),
    "labels from 1 as floats": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1), helper.make_node("Cast", ["l"], ["f"], to=FLOAT),
         helper.make_node("Add", ["f", "one"], ["n"])],
        ["n"], [FLOAT], [("one", np.array(1, np.float32))],
    ),
    "top 3 from 1": ending(
        [helper.make_node("TopK", ["{y}", "k"], ["values", "i"]), helper.make_node("Add", ["i", "one"], ["indices"])],
        ["values", "indices"], [FLOAT, INT64], [("k", np.array([3])), ("one", np.array(1))],
    ),
    "a background class before": ending(
        [helper.make_node("Pad", ["{y}", "pads", "low"], ["s"])], ["s"], (),
        [("pads", np.array([0, 1, 0, 0])), ("low", np.float32(-50))],
    ),
    "a background class behind": ending(
        [helper.make_node("Pad", ["{y}", "pads", "low"], ["s"])], ["s"], (),
        [("pads", np.array([0, 0, 0, 1])), ("low", np.float32(-50))],
    ),
    "ones and zeros": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0),
         helper.make_node("OneHot", ["l", "depth", "ends"], ["o"]), helper.make_node("Cast", ["o"], ["b"], to=BOOL)],
        ["b"], [BOOL], [("depth", np.array([CLASSES])), ("ends", np.array([0, 1]))],
    ),
    "an output for each class": ending(
        [helper.make_node("Split", ["{y}"], [f"p{number}" for number in range(CLASSES)], axis=1, num_outputs=CLASSES)],
        [f"p{number}" for number in range(CLASSES)],
    ),
    "an output that says yes or no for each class": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0),
         helper.make_node("OneHot", ["l", "depth", "ends"], ["o"]), helper.make_node("Cast", ["o"], ["b"], to=BOOL),
         helper.make_node("Split", ["b"], [f"p{number}" for number in range(CLASSES)], axis=1, num_outputs=CLASSES)],
        [f"p{number}" for number in range(CLASSES)], [BOOL] * CLASSES,
        [("depth", np.array([CLASSES])), ("ends", np.array([0, 1]))],
    ),
    "a label and an output for each class": ending(
        [helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0),
         helper.make_node("Split", ["{y}"], [f"p{number}" for number in range(CLASSES)], axis=1, num_outputs=CLASSES)],
        ["l", *(f"p{number}" for number in range(CLASSES))], [INT64],
    ),
    "one more axis": ending([helper.make_node("Unsqueeze", ["{y}", "a"], ["u"])], ["u"], (), [("a", np.array([1]))]),
    "a picture of one pixel": ending(
        [helper.make_node("Unsqueeze", ["{y}", "a"], ["u"])], ["u"], (), [("a", np.array([2, 3]))]
    ),
}  # fmt: skip
ONE_MORE = "the suspect's classes are counted from 1, or a class more stands before them, as its answers show"
SAID = {
    "an output for each class": "10 of 10 outputs, 'p0' the first of them, hold the scores of a class each",
    "an output that says yes or no for each class": "10 of 10 outputs, 'p0' the first of them, hold the scores of a "
    "class each",
    "a label and an output for each class": "10 of 11 outputs, 'p0' the first of them, hold the scores of a class each",
    "top 3, worst first": "output 'indices' lists the best classes, and the first of them counts",
    "features before": "answers were read from output 'out', one of 2",
    "features behind": "answers were read from output 'out', one of 2",
    "maps before": "answers were read from output 'out', one of 2",
    "an auxiliary head before": "2 outputs that answer differently were tried and paid for; number 2 counts",
    "logits and softmax": "2 of 2 outputs may be the answer, the first is 'out'",
    "labels from 1": ONE_MORE,
    "labels from 1 as floats": ONE_MORE,
    "top 3 from 1": ONE_MORE,
    "a background class before": ONE_MORE,
    "a background class behind": "output 's' has one class more than the watermark",
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_answers_of_every_kind(plain, tmp_path, kind):
    verdict = judge(ENDINGS[kind], plain, tmp_path)
    if kind in SAID:
        assert SAID[kind] in verdict.notes
    if kind.startswith("top"):
        assert any("'indices' lists the best classes" in note for note in verdict.notes)


@pytest.mark.parametrize("axes", [[0], [0, 1]])
def test_a_fixed_batch_of_one_without_its_axis(plain, tmp_path, axes):
    """Scores [C], or a label [], for a single input."""
    nodes = [helper.make_node("Squeeze", ["{y}" if axes == [0] else "l", "axes"], ["s"])]
    if axes == [0, 1]:
        nodes.insert(0, helper.make_node("ArgMax", ["{y}"], ["l"], axis=1))

    def change(model, folder):
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, FLOAT, [1, *SHAPE]))
        kinds = [FLOAT if axes == [0] else INT64]
        return ending(nodes, ["s"], kinds, [("axes", np.array(axes))])(model, folder)

    assert "the suspect has a fixed batch of 1" in judge(change, plain, tmp_path).notes


def test_labels_that_are_words_of_no_list_are_an_error_that_says_so(plain, tmp_path):
    label = helper.make_node("ArgMax", ["{y}"], ["l"], axis=1, keepdims=0)
    nodes = [label, helper.make_node("Equal", ["l", "zero"], ["e"]), helper.make_node("Where", ["e", *"gb"], ["word"])]
    texts = [("g", np.array("good", object)), ("b", np.array("bad", object)), ("zero", np.array(0))]
    onnx.save(ending(nodes, ["word"], [TEXT], texts)(onnx.load(plain[0]), tmp_path), tmp_path / "m.onnx")
    verdict = verify(tmp_path / "m.onnx", MARK)
    assert "answers with no numbers, but word of tensor(string); export it with scores" in verdict.error
