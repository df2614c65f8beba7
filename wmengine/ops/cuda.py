"""The operators that count, for CUDA tensors: the fronts of `_cuda` (CUDA C++).

Every call queues its work on the current stream of the tensor's device and returns without waiting for it.
"""

from __future__ import annotations

from types import ModuleType

import torch

from wmengine.ops.cpu import check_matching
from wmengine.ops.matches import PackedBits, check_labels
from wmengine.ops.reference import MOST_LEVEL, MatchCounts

Tensor = torch.Tensor

_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INTEGERS = {torch.int32: 0, torch.int64: 1}


def _compiled() -> ModuleType:
    """The compiled module, or an ImportError that says how to get it."""
    try:
        from wmengine import _cuda
    except ImportError as error:
        raise ImportError(
            f"wmengine._cuda does not load ({error}): put nvcc on PATH and install wmengine again with WMENGINE_CUDA=ON"
        ) from error
    return _cuda


def _place(tensor: Tensor) -> tuple[int, int]:
    """(device, stream) for `_cuda`; raises TypeError for a tensor that is not on a GPU."""
    if tensor.device.type != "cuda":
        raise TypeError(f"this operator runs on CUDA tensors, not on {tensor.device}")
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def match_counts(outputs: Tensor, expected: Tensor, group: Tensor | None, groups: int, levels: bool) -> MatchCounts:
    """As :func:`wmengine.ops.match_counts`, of outputs that are not float64."""
    check_matching(outputs, expected, group, groups)
    if outputs.dtype not in _SCALARS:
        raise TypeError(f"outputs must be float32, float16 or bfloat16, not {outputs.dtype}")
    module, place, device = _compiled(), _place(outputs), outputs.device
    outputs, labels = outputs.detach().contiguous(), _wide(expected, device)
    of = None if group is None else _wide(group, device)
    rows, classes = outputs.shape
    found = MatchCounts(
        predicted=torch.empty(rows, dtype=torch.int32, device=device),
        at=torch.empty(rows, dtype=torch.int8, device=device),
        histogram=torch.empty((rows, 2 * MOST_LEVEL + 1), dtype=torch.uint32, device=device),
        hits=torch.empty(groups, dtype=torch.int32, device=device),
        invalid=torch.empty(groups, dtype=torch.int32, device=device),
        levels=torch.empty((rows, classes), dtype=torch.int8, device=device) if levels else None,
    )
    module.match_counts(
        *place,
        outputs.data_ptr(),
        _SCALARS[outputs.dtype],
        rows,
        classes,
        labels.data_ptr(),
        0 if of is None else of.data_ptr(),
        groups,
        *(0 if tensor is None else tensor.data_ptr() for tensor in found),
    )
    return found


def label_matches(predicted: Tensor, expected: Tensor) -> Tensor:
    """int32[S, K]: places at which labels predicted[S, N] and expected[K, N] agree; a negative label never does."""
    check_labels(predicted, expected)
    module, place = _compiled(), _place(predicted)
    predicted = (predicted if predicted.dtype in _INTEGERS else predicted.long()).contiguous()
    labels = _wide(expected, predicted.device)
    suspects, rows = predicted.shape
    counts = torch.empty((suspects, labels.shape[0]), dtype=torch.int32, device=predicted.device)
    module.label_matches(
        *place,
        predicted.data_ptr(),
        _INTEGERS[predicted.dtype],
        suspects,
        rows,
        labels.data_ptr(),
        labels.shape[0],
        counts.data_ptr(),
    )
    return counts


def _wide(labels: Tensor, device: torch.device) -> Tensor:
    return labels.to(device, torch.int64).contiguous()


def bit_matches(messages: Tensor, registry: Tensor, total: int) -> Tensor:
    """int32[S, K]: equal bits among the first `total` of packed messages[S, B] and registry[K, B].

    Both are uint8 with B = ⌈total / 8⌉, bit t in byte t // 8, the lowest first; bits past `total` do not count.
    """
    messages, registry, place = _packed(messages, registry, total)
    counts = torch.empty((messages.shape[0], registry.shape[0]), dtype=torch.int32, device=messages.device)
    if not total:
        return counts.zero_()
    _compiled().bit_matches(
        *place,
        messages.data_ptr(),
        messages.shape[0],
        registry.data_ptr(),
        registry.shape[0],
        total,
        counts.data_ptr(),
    )
    return counts


def best_bit_matches(messages: Tensor, registry: Tensor, total: int, best: int) -> tuple[Tensor, Tensor]:
    """(counts int32[S, best], indices int64[S, best]): of `bit_matches`, each message's greatest, most matches first.

    Equal counts go to the lower index; the S × K counts are never stored. `best` is at most 1024.
    """
    messages, registry, place = _packed(messages, registry, total)
    suspects, registered = messages.shape[0], registry.shape[0]
    module = _compiled()
    size = module.best_bit_matches_workspace(suspects, registered, best)  # a ValueError where there is no such best
    if not total:  # all are tied
        counts = torch.zeros((suspects, best), dtype=torch.int32, device=messages.device)
        return counts, torch.arange(best, device=messages.device).repeat(suspects, 1)
    workspace = torch.empty(size, dtype=torch.int64, device=messages.device)
    counts = torch.empty((suspects, best), dtype=torch.int32, device=messages.device)
    indices = torch.empty((suspects, best), dtype=torch.int64, device=messages.device)
    module.best_bit_matches(
        *place,
        messages.data_ptr(),
        suspects,
        registry.data_ptr(),
        registered,
        total,
        best,
        workspace.data_ptr(),
        counts.data_ptr(),
        indices.data_ptr(),
    )
    return counts, indices


def _packed(messages: Tensor, registry: Tensor, total: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Both as contiguous rows of bytes on the messages' device, and the place to run."""
    rows = [PackedBits(value.to(messages.device), total).data.contiguous() for value in (messages, registry)]
    return rows[0], rows[1], _place(messages)
