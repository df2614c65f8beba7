"""Putting triggers to strangers' exports: what a declared input leaves open is tried and paid for, the rest is free."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import Stub, black_box, check_null, messages
from onnx import TensorProto, helper, numpy_helper

from wmengine.errors import SuspectError
from wmengine.judging.asking import TESTS, Terms, Trial, run_trials
from wmengine.judging.judge import judge_suspect
from wmengine.judging.verification import verify
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects import OnnxSuspect
from wmengine.suspects.adapters import Adapter, adapters, to_input

SHAPE, CLASSES, COUNT = (3, 8, 8), 10, 60
RANGE = [[-2.1, 2.6], [-2.0, 2.4], [-1.8, 2.6]]
MARK = black_box(SHAPE, CLASSES, COUNT, ranges=RANGE)
TRIGGERS, LABELS = MARK.arrays["triggers"], MARK.arrays["labels"]
FLOAT, FLOAT16, DOUBLE, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8


def network(path, values, before=(), shape=SHAPE, kind=FLOAT, constants=(), labels=LABELS):
    """A network that learned its labels on `values`, on no other scale of them; the nodes `before` turn x into z."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    centre, spread = flat.mean(), flat.std()
    generator = np.random.default_rng(0)
    hidden = 4.0 * generator.normal(size=(flat.shape[1], 300)) / math.sqrt(flat.shape[1]) / spread
    bias = generator.normal(size=300) - centre * hidden.sum(axis=0)
    features = np.sin(flat @ hidden + bias)
    out = np.linalg.lstsq(features, 2.0 * np.eye(CLASSES)[labels] - 1.0, rcond=None)[0]
    weights = [("w", hidden), ("b", bias), ("o", out)]
    nodes = [
        *before,
        helper.make_node("Flatten", ["z" if before else "x"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["h"]),
        helper.make_node("Sin", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "o"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in [*weights, *constants]]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, ["N", *shape])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", CLASSES])], tensors,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


RECORDED = to_input(TRIGGERS, RANGE)


def share_of(verdict):
    """Of the evidence, what the way had in which the suspect was asked; half of that is each statistic's."""
    return 2 * 10**verdict.evidence.log10_share


def test_the_recorded_way_has_half_of_the_evidence(tmp_path):
    verdict = verify(network(tmp_path / "m.onnx", RECORDED), MARK)
    assert (verdict.owned, verdict.matched, verdict.queries) == (True, COUNT, COUNT)
    assert share_of(verdict) == pytest.approx(0.5)
    assert verdict.log10_p <= binomial_log10_tail(COUNT, COUNT, 0.1) - verdict.evidence.log10_share
    assert "1 of 5 ways of putting the triggers were tried, and their shares paid" in verdict.notes


@pytest.mark.parametrize(
    ("ends", "said"),
    [((0.0, 1.0), "scaled 0 to 1"), ((0.0, 255.0), "scaled 0 to 255"), ((-1.0, 1.0), "scaled -1 to 1")],
)
def test_another_scale_is_found_and_paid_for(tmp_path, ends, said):
    path = network(tmp_path / "m.onnx", to_input(TRIGGERS, [ends] * 3))
    verdict = verify(path, MARK)
    assert (verdict.owned, verdict.matched) == (True, COUNT)
    assert share_of(verdict) == pytest.approx(1 / 8)
    assert f"triggers were put {said}" in verdict.notes
    assert verify(path, MARK, test="sequential").owned


def test_imagenets_scale_is_one_of_them(tmp_path):
    other = black_box(SHAPE, CLASSES, COUNT, ranges=[[0.0, 1.0]] * 3)
    mean, deviation = (np.reshape(v, (3, 1, 1)) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    scaled = (other.arrays["triggers"] / 255.0 - mean) / deviation
    verdict = verify(network(tmp_path / "m.onnx", scaled, labels=other.arrays["labels"]), other)
    assert verdict.owned
    assert "triggers were put scaled as ImageNet's" in verdict.notes


def test_bytes_with_the_scaling_inside_cost_nothing(tmp_path):
    before = [
        helper.make_node("Cast", ["x"], ["c"], to=FLOAT),
        helper.make_node("Mul", ["c", "slope"], ["m"]),
        helper.make_node("Add", ["m", "low"], ["z"]),
    ]
    low = np.array(RANGE)[:, 0].reshape(3, 1, 1)
    slope = (np.array(RANGE)[:, 1].reshape(3, 1, 1) - low) / 255
    path = network(tmp_path / "m.onnx", RECORDED, before, kind=UINT8, constants=[("slope", slope), ("low", low)])
    verdict = verify(path, MARK)
    assert (verdict.owned, verdict.matched) == (True, COUNT)
    assert share_of(verdict) == pytest.approx(1.0)
    assert "triggers were put as bytes" in verdict.notes


def test_channels_last_is_told_by_the_shape(tmp_path):
    before = [helper.make_node("Transpose", ["x"], ["z"], perm=[0, 3, 1, 2])]
    verdict = verify(network(tmp_path / "m.onnx", RECORDED, before, shape=(8, 8, 3)), MARK)
    assert (verdict.owned, verdict.matched) == (True, COUNT)
    assert "triggers were put channels last" in verdict.notes


def test_a_flat_vector_may_be_of_either_order_and_both_are_paid_for(tmp_path):
    size = math.prod(SHAPE)
    first = verify(network(tmp_path / "a.onnx", RECORDED, shape=(size,)), MARK)
    last = verify(network(tmp_path / "b.onnx", np.moveaxis(RECORDED, 1, -1), shape=(size,)), MARK)
    assert first.owned
    assert last.owned
    assert "triggers were put flat" in first.notes
    assert "triggers were put flat, channels last" in last.notes
    assert last.log10_p > first.log10_p


@pytest.mark.parametrize(("kind", "dtype"), [(FLOAT16, "float16"), (DOUBLE, "float64")])
def test_halves_and_doubles_are_cast(tmp_path, kind, dtype):
    before = [helper.make_node("Cast", ["x"], ["z"], to=FLOAT)]
    verdict = verify(network(tmp_path / "m.onnx", RECORDED, before, kind=kind), MARK)
    assert verdict.owned
    assert f"triggers were put cast to {dtype}" in verdict.notes


def test_other_scales_are_likely_only_where_the_graph_rescales_its_input(tmp_path):
    plain = OnnxSuspect(network(tmp_path / "a.onnx", RECORDED), isolation="none")
    before = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["t", "s"], ["z"]),
    ]
    path = network(tmp_path / "b.onnx", RECORDED, before, shape=(8, 8, 3), constants=[("s", np.array(255.0))])
    rescaled = OnnxSuspect(path, isolation="none")
    assert len(plain.adapters(SHAPE, RANGE, every=False)) == 1
    assert len(plain.adapters(SHAPE, RANGE)) == 5
    assert len(rescaled.adapters(SHAPE, RANGE, every=False)) == 5


@given(
    shape=st.sampled_from([(1, 8, 8), (3, 8, 8), (3, 3, 3), (8, 3, 3), (12,)]),
    free=st.lists(st.booleans(), min_size=4, max_size=4),
    low=st.floats(-3, 0),
    high=st.floats(0.5, 300),
)
def test_shares_sum_to_one_and_no_two_ways_are_the_same(shape, free, low, high):
    declared = [None, *(None if is_free else size for is_free, size in zip(free, shape, strict=False))]
    ways = adapters("m", "tensor(float)", declared, shape, [[low, high]] * shape[0])
    assert math.fsum(way.share for way in ways) == pytest.approx(1.0)
    assert ways[0].scaling == "as recorded"
    triggers = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    put = [way.inputs(triggers, [[low, high]] * shape[0]) for way in ways]
    assert len({(array.shape, array.tobytes()) for array in put}) == len(put)
    for array in put:
        assert all(size is None or size == have for size, have in zip(declared[1:], array.shape[1:], strict=True))


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("tensor(float)", [None, 3, 32, 32], "takes inputs"),
        ("tensor(float)", [None, 10], "takes inputs"),
        ("tensor(string)", [None, 3, 8, 8], "takes tensor(string), and triggers can be"),
    ],
)
def test_what_no_way_fits_is_said(kind, shape, words):
    with pytest.raises(SuspectError) as caught:
        adapters("m", kind, shape, SHAPE, RANGE)
    assert words in str(caught.value)


# --- trials -----------------------------------------------------------------------------------------------------------

WAYS = [Adapter(share=0.5), Adapter(layout="flat", share=0.25), Adapter(layout="channels last", share=0.25)]
WRONG = (LABELS + 1) % CLASSES


def in_ways(answers):
    """A suspect of three ways, with one array of labels for each."""
    known = {}
    for way, said in zip(WAYS, answers, strict=True):
        rows = way.inputs(TRIGGERS, MARK.parameters["value_range"])
        known |= {(row.shape, row.tobytes()): label for row, label in zip(rows, said, strict=True)}
    return Stub(lambda rows: np.array([[known[row.shape, row.tobytes()]] for row in rows]), ways=WAYS)


def play(test, answers):
    suspect = in_ways(answers)
    trial = Trial([MARK], suspect, Terms(sequential=test == "sequential", log10_bar=9.0))
    run_trials(suspect, [trial])
    return trial


@pytest.mark.parametrize("test", TESTS)
def test_the_next_way_is_tried_only_while_nothing_is_proven(test):
    first = play(test, [LABELS, WRONG, WRONG])
    assert first.proven(0)
    assert first.queries <= COUNT
    last = play(test, [WRONG, WRONG, LABELS])
    assert last.proven(0)
    nothing = play(test, [WRONG, WRONG, WRONG])
    assert not nothing.proven(0)
    assert nothing.log10_p(0) == 0.0
    if test == "fixed":
        assert (last.matched(0), nothing.queries) == (COUNT, 3 * COUNT)
        assert last.log10_p(0) == pytest.approx(first.log10_p(0) + math.log10(2))


@pytest.mark.parametrize("test", TESTS)
def test_over_fresh_labels_a_suspect_of_many_ways_is_accused_as_rarely_as_p_says(test):
    """Whatever three ways answer, with labels drawn anew: P(p <= a) <= a."""
    suspect = in_ways(np.random.default_rng(5).integers(0, CLASSES, (3, COUNT)))
    terms = Terms(sequential=test == "sequential", log10_bar=9.0)
    found = judge_suspect(suspect, messages(MARK, 1000), terms)
    check_null([each.log10_p for each in found])


def test_abstentions_are_misses_and_said():
    answers = LABELS.copy()
    answers[:5] = -1
    trial = play("fixed", [answers, WRONG, WRONG])
    assert trial.matched(0) == COUNT - 5
    said = [str(fact) for fact in trial.facts(0)]
    assert "5 of 60 answers hold NaN or Inf or name no class, and count as misses" in said


def test_answers_that_depend_on_their_batch_are_reported():
    def whole_batch(rows):
        scores = np.zeros((len(rows), CLASSES), np.float32)
        scores[np.arange(len(rows)), np.arange(len(rows)) % CLASSES] = 1
        return scores

    notes = verify(whole_batch, MARK).notes
    assert any("answers change when the batch does" in note for note in notes)
    assert not any("change" in note for note in verify(lambda rows: np.eye(CLASSES)[[3] * len(rows)], MARK).notes)
