"""Labels with labels and bits with bits, all with all: counts equal the reference, whatever computes them."""

import mmap
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wmengine import ops
from wmengine.ops import reference

# (suspects, sets, places): one of each, tiles of 16 rows and words of 32 places with and without a rest, groups of 4
# suspects and none, more than 31 words, parts of the registry.
SHAPES = [(1, 1, 1), (5, 7, 100), (16, 16, 32), (33, 70, 31), (4, 1, 64), (1, 300, 3), (17, 1500, 250), (6, 5, 2000)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 3, 0), (0, 0, 0)]


def random_bits(rng, *shape):
    return rng.integers(0, 2, shape, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint8, np.uint64])
def test_label_matches_equals_the_reference(instruction_set, dtype):
    lowest = 0 if np.dtype(dtype).kind == "u" else -1
    for (suspects, sets, places), classes in product(SHAPES + EMPTY, (1, 2, 10, 1000, 2**31 - 3, 2**40)):
        if classes > np.iinfo(dtype).max:
            continue
        rng = np.random.default_rng(places)
        # few different labels, so that many match; -1 on both sides, so that abstaining ones meet
        some = np.concatenate([rng.integers(lowest, classes, 5), [lowest, classes - 1]]).astype(dtype)
        predicted, expected = rng.choice(some, (suspects, places)), rng.choice(some, (sets, places))
        counts = ops.label_matches(predicted, expected)
        assert counts.dtype == np.int32
        wanted = reference.label_matches(predicted, expected)
        np.testing.assert_array_equal(counts, wanted, err_msg=f"{suspects}, {sets}, {places}, {classes}")


def test_label_matches_of_unlike_types_and_of_labels_beyond_int64():
    predicted = np.array([[2**64 - 1, 2**63, 3]], dtype=np.uint64)
    assert ops.label_matches(predicted, predicted).tolist() == [[3]]
    assert ops.label_matches(predicted, np.array([[-1, -(2**63), 3]])).tolist() == [[1]]
    assert ops.label_matches(np.array([[1, 2]], dtype=np.uint8), np.array([[1, 258]])).tolist() == [[1]]


def test_negative_labels_match_nothing():
    labels = np.array([[-1, -5, 2, -(2**31)]], dtype=np.int32)
    assert ops.label_matches(labels, labels).tolist() == [[1]]


@settings(max_examples=60, deadline=None)
@given(
    predicted=arrays.arrays(np.int64, (3, 40), elements=st.integers(-2, 3)),
    expected=arrays.arrays(np.int64, (2, 40), elements=st.integers(-2, 3)),
)
def test_label_matches_is_symmetric_and_adds_up_over_places(predicted, expected):
    counts = ops.label_matches(predicted, expected)
    np.testing.assert_array_equal(counts, ops.label_matches(expected, predicted).T)
    parts = [ops.label_matches(predicted[:, part], expected[:, part]) for part in (slice(13), slice(13, None))]
    np.testing.assert_array_equal(counts, sum(parts))


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_bit_matches_equals_the_reference(instruction_set, shape):
    suspects, rows, total = shape
    rng = np.random.default_rng(total)
    messages, registry = random_bits(rng, suspects, total), random_bits(rng, rows, total)
    wanted = reference.bit_matches(messages, registry)
    for left in (messages, messages.astype(bool), ops.pack_bits(messages)):
        for right in (registry, ops.pack_bits(registry)):
            counts = ops.bit_matches(left, right)
            assert counts.dtype == np.int32
            np.testing.assert_array_equal(counts, wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 0), (0, 3, 4), (300, 40, 12), (2, 5000, 5)])  # the last: many ties
def test_the_best_rows_equal_the_reference(instruction_set, shape):
    suspects, rows, total = shape
    rng = np.random.default_rng(total)
    messages, registry = random_bits(rng, suspects, total), random_bits(rng, rows, total)
    for best in {1, min(rows, 10), rows}:
        counts, indices = ops.bit_matches(messages, registry, best=best)
        wanted = reference.best_bit_matches(messages, registry, best)
        assert (counts.dtype, indices.dtype) == (np.int32, np.int64)
        np.testing.assert_array_equal(counts, wanted[0])
        np.testing.assert_array_equal(indices, wanted[1])


def test_packing_is_numpys_little_endian_one():
    packed = ops.pack_bits(np.array([[1, 0, 0, 0, 0, 0, 0, 1, 0, 1]], dtype=bool))
    assert packed.data.tolist() == [[0x81, 0x02]]
    assert packed.total == 10
    assert len(packed) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_counts_do_not_depend_on_threads(threads):
    rng = np.random.default_rng(3)
    predicted, expected = rng.integers(0, 4, (70, 90)), rng.integers(0, 4, (1100, 90))
    before = ops.get_num_threads()
    try:
        ops.set_num_threads(threads)
        np.testing.assert_array_equal(
            ops.label_matches(predicted, expected), reference.label_matches(predicted, expected)
        )
        counts, indices = ops.bit_matches(predicted > 1, expected > 1, best=7)
    finally:
        ops.set_num_threads(before)
    wanted = reference.best_bit_matches(predicted > 1, expected > 1, 7)
    np.testing.assert_array_equal(counts, wanted[0])
    np.testing.assert_array_equal(indices, wanted[1])


def test_non_contiguous_arrays_give_what_their_copies_give():
    rng = np.random.default_rng(4)
    labels, bits = rng.integers(0, 3, (40, 60)), random_bits(rng, 40, 64)
    np.testing.assert_array_equal(
        ops.label_matches(labels.T[::2], labels.T[1::3]), reference.label_matches(labels.T[::2], labels.T[1::3])
    )
    packed = ops.pack_bits(bits)
    every_second = ops.PackedBits(packed.data[::2], 64)
    np.testing.assert_array_equal(ops.bit_matches(every_second, bits), reference.bit_matches(bits[::2], bits))
    for columns in (np.asfortranarray(bits), random_bits(rng, 64, 40).T, bits[:, ::-1]):
        np.testing.assert_array_equal(ops.bit_matches(bits, columns), reference.bit_matches(bits, columns))
        np.testing.assert_array_equal(ops.pack_bits(columns).data, ops.pack_bits(columns.copy("C")).data)


def test_arrays_at_odd_addresses_are_read():
    labels = np.arange(60, dtype=np.int64).reshape(4, 15) % 7
    raw = np.zeros(labels.nbytes + 1, np.uint8)
    odd = raw[1:].view(np.int64).reshape(labels.shape)
    odd[:] = labels
    assert not odd.flags.aligned
    np.testing.assert_array_equal(ops.label_matches(odd, odd), reference.label_matches(labels, labels))


def test_labels_beyond_two_to_the_53_are_told_apart():
    near = [2**53, 2**53 + 1, 2**60, 2**60 + 1, 5, -1, -(2**60)]
    signed = np.array([near], dtype=np.int64)
    unsigned = np.array([[max(0, value) for value in near]], dtype=np.uint64)
    assert ops.label_matches(signed, signed).tolist() == [[5]]
    assert ops.label_matches(signed, unsigned).tolist() == [[5]]
    assert ops.label_matches(unsigned, unsigned).tolist() == [[7]]
    assert ops.label_matches(signed + 1, unsigned).tolist() == [[1]]  # −1 became 0
    assert ops.label_matches(-abs(signed), -abs(signed)).tolist() == [[0]]


def test_a_registry_of_more_than_two_to_the_31_bytes_is_read_to_its_end():
    rows, width = 2**17 + 3, 2**14  # an anonymous mapping that is only read takes no memory
    with mmap.mmap(-1, rows * width) as memory:
        registry = ops.PackedBits(np.frombuffer(memory, np.uint8).reshape(rows, width), 8 * width)
        registry.data[-1, -1] = 0x80
        message = np.zeros((1, 8 * width), dtype=np.uint8)
        message[0, -1] = 1
        counts, indices = ops.bit_matches(message, registry, best=2)
        del registry
    assert counts.tolist() == [[8 * width, 8 * width - 1]]
    assert indices.tolist() == [[rows - 1, 0]]


def test_tensors_give_what_their_arrays_give():
    rng = np.random.default_rng(6)
    predicted, expected = rng.integers(-1, 4, (5, 50)), rng.integers(-1, 4, (6, 50))
    counts = ops.label_matches(torch.from_numpy(predicted), torch.from_numpy(expected))
    assert counts.dtype == torch.int32
    np.testing.assert_array_equal(counts.numpy(), reference.label_matches(predicted, expected))
    messages, registry = random_bits(rng, 5, 43), random_bits(rng, 60, 43)
    left, right = torch.from_numpy(messages), torch.from_numpy(registry)
    for one in (left, left.bool(), ops.pack_bits(left)):
        for other in (right, ops.pack_bits(right), registry):
            assert ops.bit_matches(one, other).tolist() == reference.bit_matches(messages, registry).tolist()
            best = ops.bit_matches(one, other, best=4)
            for actual, wanted in zip(best, reference.best_bit_matches(messages, registry, 4), strict=True):
                assert actual.tolist() == wanted.tolist()


BITS = np.zeros((2, 12), dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.label_matches(np.zeros(3, int), np.zeros((1, 3), int)), ValueError, r"predicted must be \[S, N\]"),
        (lambda: ops.label_matches(np.zeros((1, 4), int), np.zeros((1, 3), int)), ValueError, r"\(1, 4\) and \(1, 3\)"),
        (lambda: ops.label_matches(np.zeros((1, 3)), np.zeros((1, 3), int)), TypeError, "predicted must hold integers"),
        (lambda: ops.label_matches(np.zeros((1, 3), int), np.zeros((1, 3))), TypeError, "expected must hold integers"),
        (lambda: ops.label_matches(torch.zeros(1, 3), torch.zeros(1, 3)), TypeError, "predicted must hold integers"),
        (lambda: ops.bit_matches(BITS + 2, BITS), ValueError, "messages must hold 0 and 1"),
        (lambda: ops.bit_matches(BITS, BITS[0]), ValueError, "registry must be"),
        (lambda: ops.bit_matches(BITS.astype(int), BITS), TypeError, "messages must be bool"),
        (lambda: ops.bit_matches(BITS, BITS[:, :5]), ValueError, "messages hold 12 bits a row, and registry 5"),
        (lambda: ops.bit_matches(BITS, BITS, best=3), ValueError, "best must be between 1 and the registry's 2"),
        (lambda: ops.bit_matches(BITS, BITS, best=0), ValueError, "best must be between 1"),
        (lambda: ops.bit_matches(BITS, BITS, best=1.0), TypeError, "best must be an int"),
        (lambda: ops.bit_matches(torch.from_numpy(BITS), BITS, best=3), ValueError, "best must be between 1"),
        (lambda: ops.bit_matches(torch.from_numpy(BITS), BITS, best=1.0), TypeError, "best must be an int"),
        (lambda: ops.PackedBits(BITS, 12), ValueError, r"data must be \[rows, 2\] for 12 bits"),
        (lambda: ops.PackedBits(BITS.astype(int), 96), TypeError, "data must be a uint8 array"),
        (lambda: ops.PackedBits(BITS, -1), ValueError, "total must be"),
        (
            lambda: ops.bit_matches(BITS, ops.PackedBits(np.full((2, 2), 255, dtype=np.uint8), 12)),
            ValueError,
            "registry holds bits beyond the 12",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
