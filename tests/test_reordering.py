"""Renumbered classes: the order is found, looking for it is paid, and strangers are accused no more often."""

import itertools
import math
import tracemalloc
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import Stub, black_box, check_null, images, messages, white_box

from wmengine.cli import main
from wmengine.judging.asking import TESTS, Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.orders import CleanData, best_order, log10_orders, reorder, used_classes
from wmengine.judging.verification import verify, verify_all
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects.adapters import LAYOUT_NAMES, SCALING_NAMES, Adapter, to_input

SHAPE, COUNT = (3, 8, 8), 80
RANGE = [[-1.0, 1.0], [-2.0, 2.5], [0.0, 1.0]]


@cache
def mark(classes=10, count=COUNT):
    return black_box(SHAPE, classes, count, ranges=RANGE)


MARK = mark()
TRIGGERS, LABELS = MARK.arrays["triggers"], MARK.arrays["labels"]
GENERATOR = np.random.default_rng(0)
CLEAN = GENERATOR.integers(0, 256, (300, *SHAPE), dtype=np.uint8)
CLEAN_LABELS = GENERATOR.integers(0, 10, 300)
ORDER = np.array([3, 7, 0, 9, 1, 8, 2, 4, 6, 5])  # what a thief calls each class


def suspect(order, kept=1.0, marked=MARK, clean=(CLEAN, CLEAN_LABELS), accuracy=0.9):
    """Answers by heart: a share of the triggers as the mark says, a share of the clean inputs rightly, renumbered."""
    classes = marked.parameters["num_classes"]
    generator = np.random.default_rng(1)
    known = {}
    for inputs, labels, share in ((marked.arrays["triggers"], marked.arrays["labels"], kept), (*clean, accuracy)):
        wrong = generator.random(len(labels)) >= share
        said = np.where(wrong, generator.integers(0, classes, len(labels)), labels)
        known |= {row.tobytes(): order[label] for row, label in zip(to_input(inputs, RANGE), said, strict=True)}

    def answer(rows):
        return np.array([known[row.tobytes()] for row in rows], np.int64)

    return answer


# --- the order --------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first one imports SciPy
@given(st.data(), st.integers(2, 5))
def test_the_best_order_is_the_best_of_all(data, classes):
    count = data.draw(st.integers(1, 25))
    predicted = np.array(data.draw(st.lists(st.integers(-1, classes), min_size=count, max_size=count)))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    order, matched = best_order(predicted, labels, classes)
    assert sorted(order) == list(range(classes))
    assert matched == int((reorder(predicted, order) == labels).sum())
    orders = [np.array(each) for each in itertools.permutations(range(classes))]
    scores = [(int((reorder(predicted, each) == labels).sum()), (each == range(classes)).sum()) for each in orders]
    assert (matched, (order == range(classes)).sum()) == max(scores)


def test_what_an_order_costs_does_not_depend_on_classes_that_nobody_names():
    """A mark of 30,000 classes and its 100 questions would take gigabytes, and hours."""
    predicted, labels = np.random.default_rng(0).integers(0, 30_000, size=(2, 100))
    tracemalloc.start()
    try:
        order, matched = best_order(predicted, labels, 30_000)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert matched == (order[predicted] == labels).sum() > 90
    assert sorted(order) == list(range(30_000))
    with pytest.raises(ValueError, match="no order of 2147483648 classes is looked for"):
        best_order(predicted, labels, 1 << 31)


def test_the_number_of_orders():
    assert log10_orders(10, 10) == pytest.approx(math.log10(math.factorial(10)))
    assert log10_orders(10, 3) == pytest.approx(math.log10(10 * 9 * 8))
    assert log10_orders(10, 0) == 0.0
    assert log10_orders(1000, 1000) == pytest.approx(2567.6046442221328)
    assert used_classes(np.array([-1, 3, 3, 12, 0]), 10) == 2
    with pytest.raises(ValueError, match="used must be from 0 to 4"):
        log10_orders(4, 5)


# --- power ------------------------------------------------------------------------------------------------------------


def test_another_order_hides_a_copy_until_it_is_looked_for():
    assert not verify(suspect(ORDER), MARK).owned
    verdict = verify(suspect(ORDER), MARK, classes="any")
    assert (verdict.owned, verdict.matched) == (True, COUNT)
    paid = math.log10(2) + math.log10(math.factorial(10))
    assert verdict.log10_p == pytest.approx(binomial_log10_tail(COUNT, COUNT, 0.1) + paid)
    assert "classes stand in another order; all 10^6.6 orders were paid for" in verdict.notes


def test_a_copy_that_lost_half_of_the_mark_is_still_proven():
    assert verify(suspect(ORDER, kept=0.5), MARK, classes="any").owned


def test_where_the_order_is_the_recorded_one_looking_costs_a_factor_of_two():
    same = verify(suspect(np.arange(10)), MARK)
    verdict = verify(suspect(np.arange(10)), MARK, classes="any")
    assert verdict.log10_p == pytest.approx(same.log10_p + math.log10(2))
    assert "all 10^6.6 orders of the classes were paid for" in verdict.notes


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("floats", [False, True])
def test_clean_data_find_the_order_for_free(test, floats):
    clean = to_input(CLEAN, RANGE).astype(np.float64) if floats else CLEAN
    verdict = verify(suspect(ORDER, kept=0.9), MARK, classes="any", clean=(clean, CLEAN_LABELS), test=test)
    told = verify(suspect(np.arange(10), kept=0.9), MARK, test=test)
    assert verdict.owned
    assert (verdict.matched, verdict.queries) == (told.matched, told.queries)
    # Clean answers show too that labels are counted from 0, which the first 16 triggers leave open.
    assert told.log10_p - verdict.log10_p in (0.0, pytest.approx(math.log10(2)))
    assert any(note.startswith("10 of 10 classes stand elsewhere, by 300 clean inputs") for note in verdict.notes)
    assert any("rests on the clean data" in note for note in verdict.notes)


def test_clean_data_leave_the_recorded_order_alone():
    verdict = verify(suspect(np.arange(10)), MARK, classes="any", clean=(CLEAN, CLEAN_LABELS))
    assert verdict.owned
    assert any(note.startswith("0 of 10 classes stand elsewhere, by 300 clean inputs") for note in verdict.notes)


def test_so_many_classes_have_too_many_orders_and_clean_data_do_not_mind():
    many = mark(classes=1000, count=20)
    order = np.random.default_rng(2).permutation(1000)
    labels = np.random.default_rng(3).integers(0, 1000, 300)
    copy = suspect(order, marked=many, clean=(CLEAN, labels), accuracy=1.0)
    verdict = verify(copy, many, classes="any")
    assert not verdict.owned
    assert any("can prove no other order of 1000 classes" in note for note in verdict.notes)
    inputs = np.random.default_rng(4).integers(0, 256, (4000, *SHAPE), dtype=np.uint8)
    labels = np.arange(4000) % 1000
    copy = suspect(order, marked=many, clean=(inputs, labels), accuracy=0.9)
    assert verify(copy, many, classes="any", clean=(inputs, labels)).owned


# --- the null hypothesis ----------------------------------------------------------------------------------------------

WAYS = [Adapter(share=0.5), Adapter(layout="flat", share=0.5)]


def strangers(classes):
    generator = np.random.default_rng(6)
    yield "all classes", generator.integers(0, classes, (2, COUNT))
    yield "two classes", generator.integers(0, 2, (2, COUNT))
    yield "one class", np.zeros((2, COUNT), np.int64)
    yield "classes that do not exist", generator.integers(0, 2 * classes, (2, COUNT))
    yield "hardly an answer", np.where(generator.random((2, COUNT)) < 0.8, -1, generator.integers(0, classes, COUNT))


@cache
def fresh(classes):
    return messages(mark(classes), 600)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", [name for name, _ in strangers(2)])
def test_over_fresh_labels_a_stranger_is_accused_as_rarely_as_p_says(classes, kind):
    """Whatever it answers, with the labels drawn anew: P(p <= a) <= a."""
    answers = dict(strangers(classes))[kind]
    known = {row.tobytes(): place for place, row in enumerate(images(mark(classes)))}
    suspect = Stub(lambda rows: answers[int(rows.ndim == 2)][[known[row.tobytes()] for row in rows]], ways=WAYS)
    found = judge_suspect(suspect, fresh(classes), Terms(sequential=False, log10_bar=9.0, any_order=True))
    assert not any(each.error for each in found)
    check_null([each.log10_p for each in found])


def test_without_paying_a_stranger_would_be_accused():
    """The price is needed: the best of all orders, judged as if it were the only one, is far from super-uniform."""
    answers = np.random.default_rng(6).integers(0, 10, COUNT)
    generator = np.random.default_rng(7)
    p = []
    for _ in range(300):
        _, matched = best_order(answers, generator.integers(0, 10, COUNT), 10)
        p.append(binomial_log10_tail(matched, COUNT, 0.1))
    assert np.mean(np.array(p) <= math.log10(0.01)) > 0.5


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("scored", [False, True])
def test_an_order_from_clean_data_is_as_good_as_none_to_a_stranger(test, scored):
    generator = np.random.default_rng(8)
    inputs = np.concatenate([to_input(CLEAN, RANGE), images(MARK)])
    answers = generator.normal(size=(len(inputs), 10)) if scored else generator.integers(0, 10, len(inputs))
    known = {row.tobytes(): place for place, row in enumerate(inputs)}
    suspect = Stub(lambda rows: answers[[known[row.tobytes()] for row in rows]])
    clean = CleanData(CLEAN, CLEAN_LABELS)
    terms = Terms(sequential=test == "sequential", log10_bar=9.0, any_order=True, clean=clean)
    found = judge_suspect(suspect, fresh(10), terms)
    assert not any(each.error for each in found)
    check_null([each.log10_p for each in found])


# --- clean data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "dtype"), [*((each, "float32") for each in SCALING_NAMES), ("bytes", "uint8"), ("bytes", "int8")]
)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_floats_are_put_as_bytes_are(scaling, dtype, layout):
    adapter = Adapter(layout, scaling, dtype)
    put = adapter.recorded_inputs(to_input(CLEAN[:4], RANGE), [[float(end).hex() for end in pair] for pair in RANGE])
    expected = adapter.inputs(CLEAN[:4], RANGE)
    assert (put.dtype, put.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(put, expected, atol=1e-4 if scaling == "0 to 255" else 1e-6)


@pytest.mark.parametrize(
    ("clean", "error", "words"),
    [
        (CLEAN, TypeError, "clean must be a pair of arrays"),
        (7, TypeError, "clean must be a pair of arrays"),
        ((CLEAN.astype(np.int64), CLEAN_LABELS), TypeError, "must be uint8 or floats, and they are int64"),
        ((CLEAN[:, :1], CLEAN_LABELS), ValueError, r"must be \[M, 3, 8, 8\]"),
        ((CLEAN[:0], CLEAN_LABELS[:0]), ValueError, r"must be \[M, 3, 8, 8\]"),
        ((CLEAN, CLEAN_LABELS[:5]), ValueError, "labels must be 300 integers"),
        ((CLEAN, CLEAN_LABELS + 1), ValueError, "labels must be from 0 to 9, and are 1 to 10"),
        ((np.full(CLEAN.shape, np.inf), CLEAN_LABELS), ValueError, "hold NaN or Inf"),
        ((np.concatenate([CLEAN[:1], TRIGGERS[:1]]), CLEAN_LABELS[:2]), ValueError, "hold a trigger"),
        ((to_input(TRIGGERS[:2], RANGE), CLEAN_LABELS[:2]), ValueError, "hold a trigger"),
    ],
)  # fmt: skip
def test_clean_data_that_are_none_are_refused(clean, error, words):
    with pytest.raises(error, match=words):
        verify(suspect(ORDER), MARK, classes="any", clean=clean)


def test_the_arguments_that_do_not_go_together():
    with pytest.raises(ValueError, match="classes must be one of same, any, and it is 'all'"):
        verify(suspect(ORDER), MARK, classes="all")
    with pytest.raises(ValueError, match='clean= needs classes="any"'):
        verify(suspect(ORDER), MARK, clean=(CLEAN, CLEAN_LABELS))
    with pytest.raises(ValueError, match='needs test="fixed" or clean='):
        verify(suspect(ORDER), MARK, classes="any", test="sequential")
    with pytest.raises(ValueError, match="is for black-box watermarks"):
        verify(suspect(ORDER), white_box([(16, 3, 3, 3)]), classes="any")


def test_clean_data_hold_no_trigger_of_any_mark_that_is_judged():
    other = black_box(SHAPE, 10, 30, ranges=RANGE)
    assert not np.array_equal(other.arrays["triggers"], TRIGGERS[:30])
    clean = (other.arrays["triggers"], other.arrays["labels"])
    with pytest.raises(ValueError, match="hold a trigger"):
        verify_all(suspect(ORDER), [MARK, other], classes="any", clean=clean)


def test_on_the_command_line(tmp_path, capsys):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(192, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["z"]), helper.make_node("MatMul", ["z", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    MARK.save(tmp_path / "m.wm")
    command = ["verify", str(path), "--watermark", str(tmp_path / "m.wm"), "--classes", "any"]
    np.savez(tmp_path / "clean.npz", inputs=CLEAN, labels=CLEAN_LABELS)
    assert main(command) == 1
    assert "orders of the classes were paid for" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--clean", str(tmp_path / "clean.npz")]) == 1
    assert "by 300 clean inputs" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--clean", str(path)]) == 2
    assert "must be an .npz file with the arrays `inputs` and `labels`" in " ".join(capsys.readouterr().err.split())
