"""The course of `Entangled`: mixed rows, and a pass of triggers and samples of one class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from wmengine import ops
from wmengine.parts.base import Setting, inputs_of
from wmengine.parts.training.second_pass import ROWS, SecondPass, keeping, last_layers, logits_of
from wmengine.suspects.adapters import to_input

if TYPE_CHECKING:
    from wmengine.parts.training.entangled import Entangled

_RATE = 0.1  # at which the logarithms of the temperatures are learned


class EntangledRows(SecondPass):
    def __init__(self, training: Entangled, setting: Setting) -> None:
        super().__init__(setting)
        self._factor, self._paths = float(training.factor), last_layers(setting, training.layers)
        arrays, parameters = setting.mark.arrays, setting.mark.parameters
        (self._name,) = inputs_of(parameters)
        labels = self._labels
        if "clean" in arrays:  # of the one class that all triggers are to be taken for
            samples, truth = arrays["clean"], labels[:1].expand(len(arrays["clean"]))
        else:
            samples, truth = arrays["samples"], torch.from_numpy(arrays["truth"].copy())
        self._samples = torch.from_numpy(to_input(samples, parameters["value_range"]))
        classes = sorted(set(labels.tolist()))
        every = ((torch.where(labels == each)[0], torch.where(truth == each)[0]) for each in classes)
        self._classes = [each for each in every if len(each[1]) > 1]
        if not self._classes:
            raise ValueError(
                f"scheme {setting.preset_name!r} entangles triggers with samples of their classes, and there are none: "
                "give some of each class, samples=(inputs, labels)"
            )
        self._logs = torch.zeros(len(self._paths))

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        at = int(torch.randint(len(self._classes), (), generator=self._generator))
        triggers, samples = (self.some(ROWS, each) for each in self._classes[at])
        inputs, _ = self.trigger_rows(triggers, device)
        own = self._on(self._samples, device, self._dtypes[self._name])[samples.to(device)]
        kinds = torch.arange(len(triggers) + len(samples), device=device) < len(triggers)
        with keeping(model, self._paths) as features:
            logits_of(model, {self._name: torch.cat([inputs[self._name], own])})
        logs = self._logs.to(device).requires_grad_()
        loss = torch.stack(
            [
                ops.soft_nearest_neighbor(each, kinds, temperature, distance="cosine")
                for each, temperature in zip(features, logs.exp(), strict=True)
            ]
        ).mean()
        (gradient,) = torch.autograd.grad(loss, logs, retain_graph=True)
        self._logs = (logs - _RATE * len(logs) * gradient).detach()
        return -self._factor * loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "temperatures": self._logs.exp().cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._logs = state["temperatures"].log()
