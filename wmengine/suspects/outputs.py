"""What a torch module answers, taken apart: its outputs by name, and the logits among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def outputs_of(answer: Any) -> list[tuple[str, Any]]:
    """Every output by name: the members of a mapping, a dataclass or a named tuple, those of a tuple or a list by their
    places, or the answer itself."""
    if isinstance(answer, Mapping):
        return [(str(name), value) for name, value in answer.items()]
    if dataclasses.is_dataclass(answer):
        return [(each.name, getattr(answer, each.name)) for each in dataclasses.fields(answer)]
    if isinstance(answer, tuple | list):
        names = getattr(answer, "_fields", range(len(answer)))
        return [(str(name), value) for name, value in zip(names, answer, strict=True)]
    return [("output", answer)]


def tensors_of(answer: Any) -> dict[str, torch.Tensor]:
    """The outputs that are tensors, by name."""
    import torch

    return {name: value for name, value in outputs_of(answer) if isinstance(value, torch.Tensor)}


def logits_of(answer: Any, num_classes: int | None = None) -> Any:
    """The logits among what a module answers: the output `logits`, or the first [n, C], C num_classes where that is
    known. Where none is of that shape, the first output, whatever it is.

    Of two classes one number [n] or [n, 1] is logits [n, 2], whose cross entropy is its binary one.
    """
    import torch

    tensors = tensors_of(answer)
    known = [tensors["logits"]] if "logits" in tensors else list(tensors.values())
    wide = [each for each in known if each.ndim == 2 and each.shape[1] == (num_classes or max(2, each.shape[1]))]
    single = [each for each in known if num_classes in (None, 2) and each.ndim > 0 and each.shape[1:] in ((), (1,))]
    if wide or not single:
        return next(iter(wide or known), answer)
    return torch.stack([torch.zeros_like(single[0]), single[0]], -1).reshape(-1, 2)
