"""The course of `Together`: mixed rows, and a pass of some members of some families."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wmengine.parts.base import Setting, inputs_of
from wmengine.parts.training.second_pass import SecondPass, keeping, last_layers, logits_of
from wmengine.suspects.adapters import to_input

if TYPE_CHECKING:
    from wmengine.parts.training.together import Together

_FAMILIES, _MEMBERS = 8, 4  # that run once more, a step
_TEMPERATURE = 4.0


class TogetherRows(SecondPass):
    def __init__(self, training: Together, setting: Setting) -> None:
        super().__init__(setting)
        self._training, self._paths = training, last_layers(setting, 1)
        if not isinstance(setting.model.get_submodule(self._paths[0]), torch.nn.Linear):
            raise ValueError(
                f"scheme {setting.preset_name!r} pulls together what goes into a linear layer at the network's end, "
                "and there is none"
            )
        arrays, parameters = setting.mark.arrays, setting.mark.parameters
        self._family = parameters["family"]
        (self._name,) = inputs_of(parameters)
        if training.combination:
            self._parts = torch.from_numpy(arrays["parts"].copy())
            self._samples = torch.from_numpy(to_input(arrays["samples"], parameters["value_range"]))

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        symbols = torch.randperm(len(self._labels) // self._family, generator=self._generator)[:_FAMILIES]
        members = self.some(_MEMBERS, torch.arange(self._family))
        chosen = (symbols[:, None] * self._family + members).flatten()
        inputs, labels = self.trigger_rows(chosen, device)
        with keeping(model, self._paths) as features:
            logits = logits_of(model, inputs)
        grouped = features[0].float().reshape(len(symbols), len(members), -1)
        within = (grouped - grouped.mean(1, keepdim=True)).square().sum()
        whole = (grouped - grouped.mean((0, 1))).square().sum()
        term: torch.Tensor = self._training.weight * functional.cross_entropy(logits, labels)
        term = term + self._training.pull * within / whole.clamp(min=1e-12)
        if self._training.combination:
            term = term + self._training.combination * self._divergence(model, chosen, logits, device)
        return term

    def _divergence(
        self, model: torch.nn.Module, chosen: torch.Tensor, logits: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        samples = self._on(self._samples, device, self._dtypes[self._name])
        with torch.no_grad():
            at = self._parts[chosen].flatten().to(device, non_blocking=True)
            parts = logits_of(model, {self._name: samples[at]})
        wanted = functional.log_softmax(parts.reshape(len(chosen), 2, -1) / _TEMPERATURE, 2)
        said = functional.log_softmax(logits / _TEMPERATURE, 1)[:, None].expand_as(wanted)
        return (said.exp() * (said - wanted)).sum(2).mean()
