"""What all torch operators share: one library of schemas, 64-bit keys in torch's signed ints, and argument checks.

`define` + `impl` + `register_fake` with an `autograd.Function` outside costs a seventh of `custom_op` with
`register_autograd`, and `torch.compile(fullgraph=True)` traces through it. float64 runs the plain formulas of
:mod:`wmengine.ops.torch_reference`. float16 and bfloat16 are read as they are by cross entropies, and on a GPU by the
embedding loss; the other operators widen them.
"""

from __future__ import annotations

from typing import Any

import torch

from wmengine.ops.cpu import check_key

Tensor = torch.Tensor

LIBRARY = torch.library.Library("wmengine", "DEF")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def define(schema: str, cpu: Any, on_cuda: Any, fake: Any) -> None:
    """Register an operator with its implementations for the two devices and for tracing."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"wmengine::{name}", fake, lib=LIBRARY)


def cuda() -> Any:
    """The GPU fronts, loaded when the first CUDA tensor arrives: they need Triton and the compiled ``_cuda``."""
    from wmengine.ops import cuda

    return cuda


def unsigned(key: int) -> int:
    """The key 0 ≤ key < 2⁶⁴ that a signed one stands for."""
    return key & 0xFFFF_FFFF_FFFF_FFFF


def signed(key: int) -> int:
    """A 64-bit key as torch's schemas carry it."""
    key = check_key(key)
    return key - (1 << 64) if key >= 1 << 63 else key


def rows_of(values: Tensor) -> Tensor:
    """A matrix whose columns lie side by side; rows may be any distance apart."""
    return values if values.stride(1) == 1 else values.contiguous()


def check_tensor(name: str, value: object, dimensions: int | None = None) -> Tensor:
    """A floating tensor, of so many dimensions; TypeError or ValueError naming the argument otherwise."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {value.dtype}")
    if dimensions is not None and value.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), not shape {tuple(value.shape)}")
    return value
