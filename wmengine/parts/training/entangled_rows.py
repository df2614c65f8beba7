"""The course of `Entangled`: mixed rows, and the soft nearest neighbour loss of a pass of one class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from wmengine import ops
from wmengine.parts.base import Setting
from wmengine.parts.training.class_pass import ClassPass

if TYPE_CHECKING:
    from wmengine.parts.training.entangled import Entangled

_RATE = 0.1  # at which the logarithms of the temperatures are learned


class EntangledRows(ClassPass):
    def __init__(self, training: Entangled, setting: Setting) -> None:
        super().__init__(training.layers, setting)
        self._factor, self._logs = float(training.factor), torch.zeros(len(self._paths))

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        features, triggers = self.features(model, device)
        kinds = torch.arange(len(features[0]), device=device) < triggers
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
