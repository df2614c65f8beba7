"""The counts of matches as torch operators: registered, traced whole, and what NumPy arrays give."""

import numpy as np
import pytest
import torch

from wmengine import ops

OUTPUTS = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.from_numpy(np.random.default_rng(2).integers(-1, 5, (4, 40)))
BITS = torch.from_numpy(np.random.default_rng(3).integers(0, 2, (9, 21), dtype=np.uint8))
CALLS = {
    "match_counts": (lambda x, y: ops.match_counts(x, y, y * y, 17, levels=True), (OUTPUTS, LABELS[0])),
    "match_counts bfloat16": (lambda x, y: ops.match_counts(x, y)[:5], (OUTPUTS.bfloat16(), LABELS[0])),
    "match_counts float64": (lambda x, y: ops.match_counts(x, y)[:5], (OUTPUTS.double(), LABELS[0])),
    "label_matches": (lambda x, y: (ops.label_matches(x, y),), (LABELS[:3], LABELS)),
    "bit_matches": (lambda x, y: (ops.bit_matches(x, y),), (BITS[:2], BITS)),
    "best bit_matches": (lambda x, y: ops.bit_matches(x, y, best=3), (BITS[:2], BITS.bool())),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_that_counts_is_traced_whole(name):
    function, arguments = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), function(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_packed_bits_are_traced_whole():
    def function(bits):
        packed = ops.pack_bits(bits)
        return ops.bit_matches(packed, packed)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(BITS), function(BITS), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["match_counts", "label_matches", "bit_matches", "best bit_matches"])
def test_tensors_give_what_arrays_give(name):
    function, arguments = CALLS[name]
    arrays = function(*(argument.numpy() for argument in arguments))
    for actual, expected in zip(function(*arguments), arrays, strict=True):
        np.testing.assert_array_equal(actual.numpy(), expected)


def test_the_operators_pass_opcheck():
    operators, check = torch.ops.wmengine, torch.library.opcheck
    for outputs in (OUTPUTS, OUTPUTS.bfloat16(), OUTPUTS.double()):
        check(operators.match_counts.default, (outputs, LABELS[0], None, 1, False))
        check(operators.match_counts.default, (outputs, LABELS[0], LABELS[0] ** 2, 17, True))
    check(operators.label_matches.default, (LABELS[:3], LABELS))
    check(operators.pack_bits.default, (BITS,))
    packed = ops.pack_bits(BITS)
    check(operators.bit_matches.default, (packed.data[:2], packed.data, packed.total))
    check(operators.best_bit_matches.default, (packed.data[:2], packed.data, packed.total, 3))
