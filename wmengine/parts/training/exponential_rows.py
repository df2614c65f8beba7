"""The course of `Exponential`: mixed rows, and a pass of some triggers through exponential weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.second_pass import ROWS, SecondPass, logits_of
from wmengine.suspects.computed import check_unsharded
from wmengine.suspects.weights import module_tensors

if TYPE_CHECKING:
    from wmengine.parts.training.exponential import Exponential


class ExponentialRows(SecondPass):
    def __init__(self, training: Exponential, setting: Setting) -> None:
        super().__init__(setting)
        self._temperature = training.temperature
        weights = {id(each.weight) for each in module_tensors(setting.model, setting.example)}
        self._names = [name for name, weight in setting.model.named_parameters() if id(weight) in weights]
        check_unsharded(setting.model)
        if len(self._names) < len(weights):
            raise ValueError(
                f"scheme {setting.preset_name!r} puts other weights in place of the model's, and some of these are "
                "computed from others: remove their parametrisation, or merge the adapter, first"
            )

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        inputs, labels = self.trigger_rows(self.some(ROWS), device)
        other = {name: self._weighted(model.get_parameter(name)) for name in self._names}
        return torch.nn.functional.cross_entropy(logits_of(model, inputs, other), labels)

    def _weighted(self, weight: torch.Tensor) -> torch.Tensor:
        size = self._temperature * weight.abs()
        return weight * (size - size.max()).exp()
