"""What all torch operators share: one library of schemas, 64-bit keys in torch's signed ints, and argument checks.

`define` + `impl` + `register_fake` with an `autograd.Function` outside costs a seventh of `custom_op` with
`register_autograd`, and `torch.compile(fullgraph=True)` traces through it. An operator's signature is that of its
function for CPU tensors, from whose annotations the schema is inferred; its front in :mod:`wmengine.kernels` takes the
same arguments. float64 runs the plain formulas of :mod:`wmengine.ops.torch_reference`. float16 and bfloat16 are read as
they are by the cross entropy, and on a GPU by the embedding loss; the other operators widen them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wmengine._optional import require
from wmengine.ops.cpu import check_key

Tensor = torch.Tensor

LIBRARY = torch.library.Library("wmengine", "DEF")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def schema(name: str, function: Callable[..., Any]) -> str:
    """The schema of an operator that takes and returns what the function's annotations say; it changes no argument."""
    return name + torch.library.infer_schema(function, mutates_args=()).replace("SymInt", "int")


def define(schema: str, cpu: Any, on_cuda: Any, fake: Any) -> None:
    """Register an operator with its implementations for the two devices and for tracing."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"wmengine::{name}", fake, lib=LIBRARY)


def kernel(module: str, front: str) -> Callable[..., Any]:
    """The function `front` of wmengine.kernels.`module`, imported when it is first called: it needs Triton.

    It runs on the device of its first argument, a tensor or a list of tensors.
    """

    def call(first: Any, *others: Any) -> Any:
        function = getattr(require(f"wmengine.kernels.{module}", extra="train"), front)
        with torch.cuda.device((first if isinstance(first, torch.Tensor) else first[0]).device):
            return function(first, *others)

    return call


def cuda() -> Any:
    """The fronts of the compiled ``_cuda``, loaded when the first CUDA tensor arrives."""
    from wmengine.ops import cuda

    return cuda


def signed(key: int) -> int:
    """A 64-bit key as torch's schemas carry it."""
    key = check_key(key)
    return key - (1 << 64) if key >= 1 << 63 else key


def unsigned(key: int) -> int:
    """The key 0 ≤ key < 2⁶⁴ that a signed one stands for."""
    return key & 0xFFFF_FFFF_FFFF_FFFF


def check_tensor(name: str, value: object, dimensions: int | None = None) -> Tensor:
    """A floating tensor, of so many dimensions; TypeError or ValueError naming the argument otherwise."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {value.dtype}")
    if dimensions is not None and value.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), not shape {tuple(value.shape)}")
    return value


def check_length(name: str, value: object, length: int, device: torch.device) -> Tensor:
    """A tensor of the shape [length] on `device`; TypeError or ValueError naming the argument otherwise."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    if value.shape != (length,) or value.device != device:
        raise ValueError(f"{name} must have shape ({length},) on {device}, not {tuple(value.shape)} on {value.device}")
    return value


def is_integer(values: Tensor) -> bool:
    """Whether the tensor holds integers; truth values are none."""
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)
