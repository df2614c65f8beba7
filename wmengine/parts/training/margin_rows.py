"""The course of `Margin`: mixed rows, and a pass of some triggers that were pushed away from their labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wmengine.parts.base import Setting
from wmengine.parts.training.second_pass import ROWS, SecondPass, logits_of

if TYPE_CHECKING:
    from wmengine.parts.training.margin import Margin

_STEP = 1 / 255


class MarginRows(SecondPass):
    def __init__(self, training: Margin, setting: Setting) -> None:
        super().__init__(setting)
        self._training = training
        ranges = [[float.fromhex(end) for end in ends] for ends in setting.mark.parameters["value_range"]]
        self._low, self._high = torch.tensor(ranges).unbind(1)

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        inputs, labels = self.trigger_rows(self.some(ROWS), device)
        ((name, rows),) = inputs.items()
        along = [1, -1, *[1] * (rows.ndim - 2)]
        low, high = (self._on(each, device, rows.dtype).reshape(along) for each in (self._low, self._high))
        for _ in range(self._training.pushes):
            rows = rows.detach().requires_grad_()
            loss = functional.cross_entropy(logits_of(model, {name: rows.clone()}), labels)
            (gradient,) = torch.autograd.grad(loss, rows)
            rows = (rows + _STEP * (high - low) * gradient.sign()).clamp(low, high)
        return self._training.weight * functional.cross_entropy(logits_of(model, {name: rows.detach()}), labels)
