"""`match_counts`, `label_matches` and `bit_matches` of torch tensors: a CPU reads them through NumPy without a copy."""

from __future__ import annotations

from typing import Any

import torch

from wmengine.ops import cpu, matches
from wmengine.ops.matches import PackedBits, check_best, check_bits, check_label_shapes, check_totals
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define


def _match_counts_cpu(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    bfloat16 = outputs.dtype == torch.bfloat16  # which NumPy lacks: it goes there as its bits
    scores = (outputs.view(torch.uint16) if bfloat16 else outputs).numpy()
    counts, invalid = cpu.match_counts(scores, expected.numpy(), bfloat16=bfloat16)
    return torch.from_numpy(counts), torch.from_numpy(invalid)


def _match_counts_cuda(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.dtype == torch.float64:
        counts, invalid = _match_counts_cpu(outputs.cpu(), expected.cpu())
        return counts.to(outputs.device), invalid.to(outputs.device)
    result: tuple[Tensor, Tensor] = cuda().match_counts(outputs, expected)
    return result


define(
    "match_counts(Tensor outputs, Tensor expected) -> (Tensor counts, Tensor invalid)",
    _match_counts_cpu,
    _match_counts_cuda,
    lambda outputs, expected: (
        outputs.new_empty((outputs.shape[0], expected.shape[0]), dtype=torch.int32),
        outputs.new_empty(outputs.shape[0], dtype=torch.int32),
    ),
)
define(
    "label_matches(Tensor predicted, Tensor expected) -> Tensor",
    lambda predicted, expected: torch.from_numpy(matches.label_matches(predicted.numpy(), expected.numpy())),
    lambda predicted, expected: cuda().label_matches(predicted, expected),
    lambda predicted, expected: predicted.new_empty((predicted.shape[0], expected.shape[0]), dtype=torch.int32),
)


def _pack_bits_cuda(bits: Tensor) -> Tensor:
    rows, total = bits.shape
    bytes_a_row = (total + 7) // 8
    padded = torch.nn.functional.pad((bits != 0).to(torch.uint8), (0, 8 * bytes_a_row - total))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.view(rows, bytes_a_row, 8) * weights).sum(dim=-1, dtype=torch.uint8)


define(
    "pack_bits(Tensor bits) -> Tensor",
    lambda bits: torch.from_numpy(matches.pack_bits(bits.numpy()).data),
    _pack_bits_cuda,
    lambda bits: bits.new_empty((bits.shape[0], (bits.shape[1] + 7) // 8), dtype=torch.uint8),
)


def _bit_matches_cpu(messages: Tensor, registry: Tensor, total: int) -> Tensor:
    return torch.from_numpy(matches.bit_matches(*_arrays(messages, registry, total)))


def _best_bit_matches_cpu(messages: Tensor, registry: Tensor, total: int, best: int) -> tuple[Tensor, Tensor]:
    counts, indices = matches.bit_matches(*_arrays(messages, registry, total), best)
    return torch.from_numpy(counts), torch.from_numpy(indices)


def _arrays(messages: Tensor, registry: Tensor, total: int) -> tuple[PackedBits, PackedBits]:
    return PackedBits(messages.numpy(), total), PackedBits(registry.numpy(), total)


define(
    "bit_matches(Tensor messages, Tensor registry, int total) -> Tensor",
    _bit_matches_cpu,
    lambda messages, registry, total: cuda().bit_matches(messages, registry, total),
    lambda messages, registry, total: messages.new_empty((messages.shape[0], registry.shape[0]), dtype=torch.int32),
)
define(
    "best_bit_matches(Tensor messages, Tensor registry, int total, int best) -> (Tensor counts, Tensor indices)",
    _best_bit_matches_cpu,
    lambda messages, registry, total, best: cuda().best_bit_matches(messages, registry, total, best),
    lambda messages, registry, total, best: (
        messages.new_empty((messages.shape[0], best), dtype=torch.int32),
        messages.new_empty((messages.shape[0], best), dtype=torch.int64),
    ),
)


def match_counts(outputs: Tensor, expected: Any) -> tuple[Tensor, Tensor]:
    """See :func:`wmengine.ops.match_counts`."""
    check_tensor("outputs", outputs, 3)
    expected = torch.as_tensor(expected, device=outputs.device)
    if expected.ndim != 2 or expected.shape[1] != outputs.shape[1]:
        raise ValueError(
            f"outputs must be [S, N, C] and expected [K, N], not {tuple(outputs.shape)} and {tuple(expected.shape)}"
        )
    result: tuple[Tensor, Tensor] = torch.ops.wmengine.match_counts(outputs.detach(), expected)
    return result


def label_matches(predicted: Tensor, expected: Any) -> Tensor:
    """See :func:`wmengine.ops.label_matches`."""
    expected = torch.as_tensor(expected, device=predicted.device)
    check_label_shapes(predicted, expected)
    for name, labels in (("predicted", predicted), ("expected", expected)):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{name} must hold integer labels, not {labels.dtype}")
    counts: Tensor = torch.ops.wmengine.label_matches(predicted, expected)
    return counts


def pack_bits(bits: Tensor) -> PackedBits:
    """See :func:`wmengine.ops.pack_bits`; on a GPU every byte but 0 is a 1, as looking at them would wait for it."""
    check_bits("bits", bits)
    return PackedBits(torch.ops.wmengine.pack_bits(bits), bits.shape[1])


def bit_matches(messages: Any, registry: Any, best: int | None = None) -> Any:
    """See :func:`wmengine.ops.bit_matches`; the result lies where `messages` does."""
    left = messages if isinstance(messages, PackedBits) else pack_bits(messages)
    device = left.data.device
    right = registry if isinstance(registry, PackedBits) else pack_bits(torch.as_tensor(registry, device=device))
    data = torch.as_tensor(right.data, device=device)
    check_totals(left, right)
    if best is None:
        return torch.ops.wmengine.bit_matches(left.data, data, left.total)
    return torch.ops.wmengine.best_bit_matches(left.data, data, left.total, check_best(best, len(right)))
