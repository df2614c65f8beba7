"""`match_counts`, `label_matches` and `bit_matches` of torch tensors: a CPU reads them through NumPy without a copy."""

from __future__ import annotations

from typing import Any

import torch

from wmengine.ops import cpu, matches
from wmengine.ops.matches import PackedBits, check_best, check_bits, check_totals
from wmengine.ops.reference import MOST_LEVEL, MatchCounts
from wmengine.ops.torch_library import Tensor, check_tensor, cuda, define

Tensors = tuple[Tensor, ...]


def _match_counts_cpu(outputs: Tensor, expected: Tensor, group: Tensor | None, groups: int, levels: bool) -> Tensors:
    bfloat16 = outputs.dtype == torch.bfloat16  # which NumPy lacks: it goes there as its bits
    scores, of = (outputs.view(torch.uint16) if bfloat16 else outputs).numpy(), None if group is None else group.numpy()
    found = cpu.match_counts(scores, expected.numpy(), of, groups, levels=levels, bfloat16=bfloat16)
    return tuple(outputs.new_empty(0, dtype=torch.int8) if part is None else torch.from_numpy(part) for part in found)


def _match_counts_cuda(outputs: Tensor, expected: Tensor, group: Tensor | None, groups: int, levels: bool) -> Tensors:
    if outputs.dtype == torch.float64:
        of = None if group is None else group.cpu()
        return tuple(
            part.to(outputs.device) for part in _match_counts_cpu(outputs.cpu(), expected.cpu(), of, groups, levels)
        )
    found = cuda().match_counts(outputs, expected, group, groups, levels)
    return tuple(outputs.new_empty(0, dtype=torch.int8) if part is None else part for part in found)


def _match_counts_fake(outputs: Tensor, expected: Tensor, group: Tensor | None, groups: int, levels: bool) -> Tensors:
    rows, classes = outputs.shape
    shapes = (rows,), (rows,), (rows, 2 * MOST_LEVEL + 1), (groups,), (groups,), (rows, classes) if levels else (0,)
    types = torch.int32, torch.int8, torch.uint32, torch.int32, torch.int32, torch.int8
    return tuple(outputs.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True))


define(
    "match_counts(Tensor outputs, Tensor expected, Tensor? group, int groups, bool levels) -> "
    "(Tensor predicted, Tensor at, Tensor histogram, Tensor hits, Tensor invalid, Tensor levels)",
    _match_counts_cpu,
    _match_counts_cuda,
    _match_counts_fake,
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


def match_counts(
    outputs: Tensor, expected: Any, group: Any = None, groups: int = 1, *, levels: bool = False
) -> MatchCounts:
    """See :func:`wmengine.ops.match_counts`."""
    check_tensor("outputs", outputs, 2)
    expected = torch.as_tensor(expected, device=outputs.device)
    of = None if group is None else torch.as_tensor(group, device=outputs.device)
    found = MatchCounts(*torch.ops.wmengine.match_counts(outputs.detach(), expected, of, groups, levels))
    return found if levels else found._replace(levels=None)


def label_matches(predicted: Tensor, expected: Any) -> Tensor:
    """See :func:`wmengine.ops.label_matches`."""
    expected = torch.as_tensor(expected, device=predicted.device)
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
