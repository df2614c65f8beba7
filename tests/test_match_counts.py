"""`match_counts`: the class of each row, the levels of its classes and the counts are what the reference says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wmengine import ops
from wmengine.ops import reference

CLASSES = [*range(1, 20), 31, 32, 33, 61, 63, 64, 65, 100, 1000]


def softmax(z):
    chances = np.exp(z - z.max(axis=1, keepdims=True))
    return chances / chances.sum(axis=1, keepdims=True)


def sparse(z):
    """Distributions in which every third class is impossible, where there are as many."""
    chances = softmax(z)
    chances[:, 2::3] = 0.0
    return chances / chances.sum(axis=1, keepdims=True)


KINDS = {
    "logits": lambda z: z,
    "ties": lambda z: np.round(z, 1),
    "far from 0": lambda z: 1000.0 + 0.01 * z,
    "sums overflow": lambda z: 5e37 * z,
    "denormal": lambda z: 1e-42 * z,
    "distributions": softmax,
    "distributions with zeros": sparse,
    "nearly even distributions": lambda z: softmax(1e-4 * z),
    "logarithms with zeros": lambda z: np.log(sparse(z)),
    "positive, no distributions": np.exp,
}


def scores(kind, rows, classes, seed=0):
    with np.errstate(divide="ignore"):
        return KINDS[kind](np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def check(found, wanted, expected, share=0.002):
    """Classes and counts are equal; of levels such a share may be one off; their counts are those of the levels."""
    for name in ("predicted", "hits", "invalid"):
        actual = getattr(found, name)
        assert actual.dtype == np.int32
        np.testing.assert_array_equal(actual, getattr(wanted, name), err_msg=name)
    off = np.abs(found.levels.astype(int) - wanted.levels)
    assert off.max(initial=0) <= 1
    assert (off > 0).sum() <= max(2, share * off.size)
    rows, classes = found.levels.shape
    known = (expected >= 0) & (expected < classes)
    named = found.levels[np.arange(rows), np.where(known, expected, 0)]
    np.testing.assert_array_equal(found.at, np.where(known, named, 0))
    counted = [np.bincount(row.astype(int) + 30, minlength=61) for row in found.levels]
    np.testing.assert_array_equal(found.histogram, np.array(counted).reshape(rows, 61))
    assert (found.at.dtype, found.histogram.dtype, found.levels.dtype) == (np.int8, np.uint32, np.int8)


# --- what the words of the law mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("row", "predicted", "levels"),
    [
        ([1, 2, 3], 2, [-12, 0, 12]),  # a deviation of √(2/3)
        ([-5, -5, 5, 5], 2, [-10, -10, 10, 10]),  # the first of equals
        ([0.25, 0.25, 0.5], 2, [-7, -7, 14]),  # a distribution: levels of ln p, 14.14 where one of three stands out
        ([0.5, 0.5004, 0.0], 1, [-10, 10, -30]),  # and its sum is 1 within a thousandth
        ([0.4, 0.7, 0.0], 1, [1, 12, -13]),  # no distribution: 0 is a score like others
        ([-np.inf, 0.0, -0.0], 1, [-30, 0, 0]),
        ([-np.inf, 7.0], 1, [-30, 0]),
        ([0.1] * 7, 0, [0] * 7),
        ([0.0], 0, [0]),
        ([1.0] + [0.0] * 200, 0, [0] + [-30] * 200),  # a certain one: only one is above −Inf
        ([9.0] + [0.0] * 200, 0, [30] + [-1] * 200),
        ([1.0, np.nan], -1, [0, 0]),
        ([1.0, np.inf], -1, [0, 0]),
        ([-np.inf, -np.inf], -1, [0, 0]),
        ([-np.inf], -1, [0]),
    ],
)
def test_a_row_and_its_levels(instruction_set, row, predicted, levels, dtype):
    found = ops.match_counts(np.array([row], dtype=dtype), [predicted], levels=True)
    assert found.predicted.tolist() == [predicted]
    assert found.levels.tolist() == [levels]
    assert found.at.tolist() == [levels[predicted] if predicted >= 0 else 0]
    assert found.histogram.nonzero()[1].tolist() == sorted({level + 30 for level in levels})
    assert (found.hits.tolist(), found.invalid.tolist()) == ([int(predicted >= 0)], [int(predicted < 0)])


def test_labels_that_are_no_class_match_nothing():
    outputs = np.array([[0.0, 1.0], [np.nan, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    found = ops.match_counts(outputs, [-1, -1, 2, 2**40])
    assert (found.hits.tolist(), found.invalid.tolist(), found.at.tolist()) == ([0], [1], [0, 0, 0, 0])
    assert ops.match_counts(outputs, np.full(4, 2**64 - 1, dtype=np.uint64)).hits.tolist() == [0]
    assert found.levels is None


def test_rows_are_counted_by_group():
    rng = np.random.default_rng(1)
    outputs, group = rng.normal(size=(900, 7)).astype(np.float32), rng.integers(0, 5, 900)
    outputs[rng.random(900) < 0.1, 3] = np.nan
    expected = np.where(rng.random(900) < 0.5, outputs.argmax(axis=1), 0)
    found = ops.match_counts(outputs, expected, group, 6)
    parts = [ops.match_counts(outputs[group == each], expected[group == each]) for each in range(6)]
    assert found.hits.tolist() == [int(part.hits[0]) for part in parts]
    assert found.invalid.tolist() == [int(part.invalid[0]) for part in parts]
    assert (found.hits[5], found.invalid[5]) == (0, 0)


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_reference(instruction_set, kind):
    for classes in CLASSES:
        outputs = scores(kind, 41, classes, seed=classes)
        expected = np.random.default_rng(1).integers(-1, classes + 1, 41)  # some that no class has
        found = ops.match_counts(outputs, expected, levels=True)
        check(found, reference.match_counts(outputs, expected, levels=True), expected, share=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 50_257), (5000, 10), (2, 4097), (700, 96)])
def test_it_equals_the_reference_on_larger_shapes(kind, shape):
    outputs, expected = scores(kind, *shape), np.arange(shape[0]) % shape[1]
    check(
        ops.match_counts(outputs, expected, levels=True),
        reference.match_counts(outputs, expected, levels=True),
        expected,
    )


@settings(max_examples=150, deadline=None)
@given(
    outputs=arrays.arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.integers(1, 40)),
        elements=st.sampled_from([np.nan, np.inf, -np.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 3e38, -3e38]),
        fill=st.nothing(),
    ),
    data=st.data(),
)
def test_hostile_rows_equal_the_reference(outputs, data):
    rows, classes = outputs.shape
    expected = data.draw(arrays.arrays(np.int64, rows, elements=st.integers(-1, classes)))
    group = data.draw(arrays.arrays(np.int64, rows, elements=st.integers(0, 2)))
    found = ops.match_counts(outputs, expected, group, 3, levels=True)
    wanted = reference.match_counts(outputs, expected, group, 3, levels=True)
    check(found, wanted, expected, share=1.0)  # equal scores may all lie on the same edge


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ties", "distributions with zeros", "logarithms with zeros"])
def test_16_bit_scores_are_read_as_their_float32_copies(instruction_set, dtype, kind):
    for classes in (1, 3, 10, 65, 5000):
        outputs = torch.from_numpy(scores(kind, 30, classes)).to(dtype)
        outputs[torch.rand(outputs.shape, generator=torch.Generator().manual_seed(3)) < 0.02] = -0.0
        for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            outputs[row, classes // 2] = bad
        expected = torch.arange(30) % classes
        for actual, wanted in zip(
            ops.match_counts(outputs, expected, levels=True),
            ops.match_counts(outputs.float(), expected, levels=True),
            strict=True,
        ):
            assert torch.equal(actual, wanted), classes


@pytest.mark.parametrize("shape", [(0, 4), (0, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nothing_is_counted_of_no_rows(shape, dtype):
    found = ops.match_counts(np.zeros(shape, dtype=dtype), np.zeros(0, dtype=int), groups=2, levels=True)
    assert (found.hits.tolist(), found.invalid.tolist()) == ([0, 0], [0, 0])
    assert (found.predicted.shape, found.histogram.shape, found.levels.shape) == ((0,), (0, 61), shape)


def test_arrays_of_any_order_give_what_their_copies_give():
    outputs, expected = scores("logits", 60, 40), np.arange(60)
    for view in (outputs[::2, 1::3], outputs.T[::2], outputs[::-1]):
        for actual, wanted in zip(
            ops.match_counts(view, expected[: len(view)], levels=True),
            ops.match_counts(view.copy(), expected[: len(view)].astype(np.uint8), levels=True),
            strict=True,
        ):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("shape", [(40, 12), (3000, 10), (90, 1003)])
@pytest.mark.parametrize("kind", ["logits", "distributions"])
def test_the_number_of_threads_changes_no_bit(threads, shape, kind):
    outputs, expected, group = scores(kind, *shape), np.arange(shape[0]) % shape[1], np.arange(shape[0]) % 4
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        found = ops.match_counts(outputs, expected, group, 4, levels=True)
        results.append(b"".join(part.tobytes() for part in found))
    assert len(set(results)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_give_what_the_reference_gives(dtype):
    outputs = torch.randn(150, 11, generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs[64, 1] = float("nan")
    expected, group = torch.arange(150) % 11, torch.arange(150) % 3
    found = ops.match_counts(outputs, expected, group, 3, levels=True)
    wanted = reference.match_counts(outputs.double().numpy(), expected.numpy(), group.numpy(), 3, levels=True)
    check(type(found)(*(part.numpy() for part in found)), wanted, expected.numpy())
    assert found.invalid.tolist() == [0, 1, 0]
    assert ops.match_counts(outputs, expected).levels is None


ONES, ZEROS = np.ones((3, 4), dtype=np.float32), np.zeros(3, dtype=int)


@pytest.mark.parametrize("make", [lambda value: value, torch.as_tensor], ids=["arrays", "tensors"])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((ONES, ZEROS[:2]), ValueError, r"outputs must be \[N, C\] and expected \[N\], not \(3, 4\) and \(2,\)"),
        ((ONES, ZEROS[None]), ValueError, "outputs must be"),
        ((ONES[:, :0], ZEROS), ValueError, "at least one class"),
        ((ONES, ZEROS.astype(float)), TypeError, "expected must hold integers, not"),
        ((ONES, ZEROS > 0), TypeError, "expected must hold integers, not"),
        ((ONES.astype(int), ZEROS), TypeError, "outputs must be float32"),
        ((ONES, ZEROS, ZEROS[:2]), ValueError, r"group must be \[3\]"),
        ((ONES, ZEROS, ZEROS.astype(float)), TypeError, "group must hold integers, not"),
        ((ONES, ZEROS, ZEROS + 1), ValueError, "group must hold 0 to 0, not 1 to 1"),
        ((ONES, ZEROS, ZEROS - 1, 4), ValueError, "group must hold 0 to 3, not -1 to -1"),
    ],
)
def test_bad_arguments_are_named(make, arguments, error, words):
    with pytest.raises(error, match=words):
        ops.match_counts(*(make(each) if isinstance(each, np.ndarray) else each for each in arguments))


def test_there_is_a_group():
    for groups, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="groups must be"):
            ops.match_counts(ONES, ZEROS, groups=groups)
