"""The course of `Exponential`: mixed rows, and a pass of some triggers through exponential weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.mixed_rows import MixedRows
from wmengine.parts.training.passport_course import by_running_statistics
from wmengine.suspects.computed import check_unsharded
from wmengine.suspects.weights import arguments, module_tensors

if TYPE_CHECKING:
    from wmengine.parts.training.exponential import Exponential

_ROWS = 16  # that go through exponential weights, a step


class ExponentialRows(MixedRows):
    def __init__(self, training: Exponential, setting: Setting) -> None:
        super().__init__(setting)
        self._temperature = training.temperature
        self._like = {name: rows[:0] for name, rows in setting.example.items()}
        weights = {id(each.weight) for each in module_tensors(setting.model, setting.example)}
        self._names = [name for name, weight in setting.model.named_parameters() if id(weight) in weights]
        check_unsharded(setting.model)
        if len(self._names) < len(weights):
            raise ValueError(
                f"scheme {setting.preset_name!r} puts other weights in place of the model's, and some of these are "
                "computed from others: remove their parametrisation, or merge the adapter, first"
            )

    def term(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        own = dict(model.named_parameters())
        device = own[self._names[0]].device
        inputs, labels = self.rows(_ROWS, {name: rows.to(device) for name, rows in self._like.items()})
        other = {name: self._weighted(own[name]) for name in self._names}
        given, named = arguments(model, inputs)
        with by_running_statistics(model):
            logits = torch.func.functional_call(model, other, given, named)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    def _weighted(self, weight: torch.Tensor) -> torch.Tensor:
        size = self._temperature * weight.abs()
        return weight * (size - size.max()).exp()
