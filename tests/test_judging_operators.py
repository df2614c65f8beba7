"""Judging compares with the compiled operators, once for all marks of a geometry, whatever brings the suspects."""

import numpy as np
import onnx
import pytest
from judged import OTHER, Stub, black_box, by_heart, images, messages, white_box
from onnx import TensorProto, helper, numpy_helper

from wmengine import ops
from wmengine.judging.verification import verify_all
from wmengine.scanning.scanner import scan
from wmengine.suspects.base import Tensor

SHAPE, COUNT, CARRIERS = (1, 4, 4), 60, [(8, 8, 3, 3), (16, 8, 3, 3)]
MARK, BITS = black_box(SHAPE, 10, COUNT), white_box(CARRIERS)


@pytest.fixture
def calls(monkeypatch):
    """The name, and the shapes of the first two arguments, of every comparison."""
    found = []

    def spy(name):
        compiled = getattr(ops, name)

        def called(first, second, *rest, **options):
            found.append((name, np.shape(first), np.shape(second)))
            return compiled(first, second, *rest, **options)

        monkeypatch.setattr(ops, name, called)

    for name in ("match_counts", "label_matches", "bit_matches"):
        spy(name)
    return found


def scored(marks, sharp=5.0):
    """A suspect that gives each trigger of these marks its label and some noise, and counts how often it is asked."""
    known, asked = {}, []
    for mark in marks:
        scores = np.random.default_rng(0).normal(size=(mark.total, 10)).astype(np.float32)
        scores[np.arange(mark.total), mark.symbols] += sharp
        known |= {row.tobytes(): each for row, each in zip(images(mark), scores, strict=True)}

    def answer(rows):
        asked.append(len(rows))
        return np.stack([known[row.tobytes()] for row in rows])

    return Stub(answer), asked


def test_scores_are_counted_once_a_look_for_all_geometries_together(calls):
    marks = [MARK, black_box(SHAPE, 10, 40), black_box(SHAPE, 10, COUNT, key=OTHER)]
    suspect, asked = scored(marks)
    assert all(verdict.owned for verdict in verify_all(suspect, marks))
    assert calls == [("match_counts", (160, 10), (160,))]
    calls.clear()
    suspect, asked = scored(marks, sharp=2.0)
    verify_all(suspect, marks, test="sequential")
    looks = asked[: -len(marks)]  # the last: each is asked its first questions once more
    assert calls == [("match_counts", (rows, 10), (rows,)) for rows in looks]
    assert looks[0] == 48
    assert len(looks) > 1


def test_messages_of_one_geometry_are_asked_once_and_compared_by_one_call(calls):
    marks = messages(MARK, 50)
    suspect, asked = scored([marks[7]])
    verdicts = verify_all(suspect, marks)
    assert [verdict.message for verdict in verdicts if verdict.owned] == ["copy 7"]
    assert calls == [("match_counts", (COUNT, 10), (COUNT,)), ("label_matches", (1, COUNT), (50, COUNT))]
    assert asked[0] == COUNT
    assert any("50 watermarks share" in note for note in verdicts[0].notes)


@pytest.mark.parametrize("count", [1, 30])
def test_bare_labels_are_compared_by_label_matches(calls, count):
    marks = messages(MARK, count)
    labels = np.where(np.arange(COUNT) == 0, 0, marks[0].symbols)  # counted from 0, as the first shows
    assert verify_all(by_heart(marks[0], labels), marks)[0].owned
    assert calls == [("label_matches", (1, COUNT), (count, COUNT))]


@pytest.mark.parametrize("count", [1, 30])
def test_bits_are_compared_by_bit_matches(calls, count):
    marks = messages(BITS, count)
    generator = np.random.default_rng(1)
    tensors = [Tensor(generator.normal(size=shape).astype(np.float32), str(shape)) for shape in CARRIERS]
    verdicts = verify_all(Stub(weights=tensors), marks)
    assert calls == [("bit_matches", (1, 256), (count, 256))]
    assert any("share these triggers or carriers" in note for note in verdicts[0].notes) == (count > 1)


def test_a_scan_compares_with_the_same_operators(calls, tmp_path):
    def save(name, nodes, weights, shape):
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight.astype(np.float32), key) for key, weight in weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / name)

    generator = np.random.default_rng(2)
    save(
        "answers.onnx",
        [helper.make_node("Flatten", ["x"], ["z"]), helper.make_node("MatMul", ["z", "w"], ["y"])],
        {"w": generator.normal(size=(16, 10))},
        SHAPE,
    )
    save(
        "weights.onnx",
        [helper.make_node("Conv", ["x", "a"], ["h"]), helper.make_node("Conv", ["h", "b"], ["y"])],
        {"a": generator.normal(size=CARRIERS[0]), "b": generator.normal(size=CARRIERS[1])},
        (8, 9, 9),
    )
    marks = [*messages(MARK, 3), *messages(BITS, 3)]
    scan([str(tmp_path / "*.onnx")], marks, test="fixed", jobs=1)
    assert sorted(calls) == [
        ("bit_matches", (1, 256), (3, 256)),
        ("label_matches", (1, COUNT), (3, COUNT)),
        ("match_counts", (COUNT, 10), (COUNT,)),
    ]
