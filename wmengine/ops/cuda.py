"""The operators that count, for CUDA tensors: the fronts of `_cuda` (CUDA C++).

Every call queues its work on the current stream of the tensor's device and returns without waiting for it.
"""

from __future__ import annotations

from types import ModuleType

import torch

Tensor = torch.Tensor

_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INTEGERS = {torch.int32: 0, torch.int64: 1}
_NARROW = (torch.uint8, torch.int8, torch.int16)
_MOST_BEST = 1024  # of best_bit_matches: what a thread block's shared memory holds


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


def match_counts(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """(counts int32[S, K], invalid int32[S]) of outputs[S, N, C], not float64, against labels expected[K, N]."""
    if outputs.dtype not in _SCALARS:
        raise TypeError(f"outputs must be float32, float16 or bfloat16, not {outputs.dtype}")
    suspects, rows, classes = outputs.shape
    labels = _labels(expected, rows, "outputs", outputs)
    module, place = _compiled(), _place(outputs)
    outputs = outputs.detach().contiguous()
    sets = labels.shape[0]
    predicted, counts, invalid = (
        torch.empty(shape, dtype=torch.int32, device=outputs.device)
        for shape in (suspects * rows, (suspects, sets), suspects)
    )
    module.match_counts(
        *place,
        outputs.data_ptr(),
        _SCALARS[outputs.dtype],
        suspects,
        rows,
        classes,
        labels.data_ptr(),
        sets,
        predicted.data_ptr(),
        counts.data_ptr(),
        invalid.data_ptr(),
    )
    return counts, invalid


def label_matches(predicted: Tensor, expected: Tensor) -> Tensor:
    """int32[S, K]: places at which labels predicted[S, N] and expected[K, N] agree; a negative label never does."""
    if predicted.dtype in _NARROW:
        predicted = predicted.int()
    if predicted.dtype not in _INTEGERS:
        raise TypeError(f"predicted must be integer labels, not {predicted.dtype}")
    if predicted.ndim != 2:
        raise ValueError(f"predicted must have shape [S, N], not {tuple(predicted.shape)}")
    suspects, rows = predicted.shape
    labels = _labels(expected, rows, "predicted", predicted)
    module, place = _compiled(), _place(predicted)
    predicted = predicted.contiguous()
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


def _labels(expected: Tensor, rows: int, name: str, beside: Tensor) -> Tensor:
    """`expected` as contiguous int64[K, rows] on the device of `beside`, which errors call `name`."""
    if expected.ndim != 2 or expected.shape[1] != rows:
        raise ValueError(
            f"expected must have shape [K, {rows}] for {name} {tuple(beside.shape)}, not {tuple(expected.shape)}"
        )
    if expected.is_floating_point() or expected.is_complex():
        raise TypeError(f"expected must be integer labels, not {expected.dtype}")
    return expected.to(beside.device, torch.int64).contiguous()


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
    if not 1 <= best <= min(registered, _MOST_BEST):
        raise ValueError(
            f"best must lie between 1 and {min(registered, _MOST_BEST)}, the lesser of registry's {registered} rows "
            f"and {_MOST_BEST}, not {best}"
        )
    if not total:  # all are tied
        counts = torch.zeros((suspects, best), dtype=torch.int32, device=messages.device)
        return counts, torch.arange(best, device=messages.device).repeat(suspects, 1)
    module = _compiled()
    size = module.best_bit_matches_workspace(suspects, registered, best)
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
    """Both as contiguous rows of bytes on the messages' device, and the place to run; errors name the argument."""
    size = (total + 7) // 8
    for name, value in (("messages", messages), ("registry", registry)):
        if value.dtype != torch.uint8:
            raise TypeError(f"{name} must be packed uint8 bits, not {value.dtype}")
        if value.ndim != 2 or value.shape[1] != size:
            raise ValueError(f"{name} must have {size} bytes a row for {total} bits, not shape {tuple(value.shape)}")
    place = _place(messages)
    return messages.contiguous(), registry.to(messages.device).contiguous(), place
