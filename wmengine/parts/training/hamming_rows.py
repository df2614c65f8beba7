"""The course of `Hamming`: mixed rows, and a pass of some triggers for their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.second_pass import ROWS, SecondPass, logits_of

if TYPE_CHECKING:
    from wmengine.parts.training.hamming import Hamming


class HammingRows(SecondPass):
    def __init__(self, training: Hamming, setting: Setting) -> None:
        super().__init__(setting)
        self._weight = float(training.weight)

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        inputs, targets = self.trigger_rows(self.some(ROWS), device)
        chances = logits_of(model, inputs).softmax(1)
        other = torch.arange(chances.shape[1], device=device) % 2 != targets[:, None] % 2  # groups as `GroupPoints` has
        wrong: torch.Tensor = (chances * other).sum(1).mean()
        return self._weight * wrong
