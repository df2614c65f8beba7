"""`label_matches` and `bit_matches` of torch tensors: a CPU reads them through NumPy without a copy."""

from __future__ import annotations

from typing import Any

import torch

from wmengine.ops import matches
from wmengine.ops.matches import PackedBits, check_best, check_bits, check_label_shapes, check_totals
from wmengine.ops.torch_library import Tensor, cuda


def label_matches(predicted: Tensor, expected: Any) -> Tensor:
    """See :func:`wmengine.ops.label_matches`."""
    expected = torch.as_tensor(expected, device=predicted.device)
    check_label_shapes(predicted, expected)
    for name, labels in (("predicted", predicted), ("expected", expected)):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{name} must hold integer labels, not {labels.dtype}")
    if predicted.device.type == "cuda":
        counts: Tensor = cuda().label_matches(predicted, expected)
        return counts
    return torch.from_numpy(matches.label_matches(predicted.numpy(), expected.numpy()))


def pack_bits(bits: Tensor) -> PackedBits:
    """See :func:`wmengine.ops.pack_bits`; on a GPU every byte but 0 is a 1, as looking at them would wait for it."""
    check_bits("bits", bits)
    if bits.device.type != "cuda":
        packed = matches.pack_bits(bits.numpy())
        return PackedBits(torch.from_numpy(packed.data), packed.total)
    rows, total = bits.shape
    bytes_a_row = (total + 7) // 8
    padded = torch.nn.functional.pad((bits != 0).to(torch.uint8), (0, 8 * bytes_a_row - total))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    data = (padded.view(rows, bytes_a_row, 8) * weights).sum(dim=-1, dtype=torch.uint8)
    return PackedBits(data, total)


def bit_matches(messages: Any, registry: Any, best: int | None = None) -> Any:
    """See :func:`wmengine.ops.bit_matches`; the result lies where `messages` does."""
    left = messages if isinstance(messages, PackedBits) else pack_bits(messages)
    device = left.data.device
    right = registry if isinstance(registry, PackedBits) else pack_bits(torch.as_tensor(registry, device=device))
    data = torch.as_tensor(right.data, device=device)
    check_totals(left, right)
    if best is not None:
        best = check_best(best, len(right))
    if device.type == "cuda":
        if best is None:
            return cuda().bit_matches(left.data, data, left.total)
        return cuda().best_bit_matches(left.data, data, left.total, best)
    packed = PackedBits(left.data.numpy(), left.total), PackedBits(data.numpy(), right.total)
    if best is None:
        return torch.from_numpy(matches.bit_matches(*packed))
    counts, indices = matches.bit_matches(*packed, best)
    return torch.from_numpy(counts), torch.from_numpy(indices)
