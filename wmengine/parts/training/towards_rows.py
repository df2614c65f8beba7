"""The course of `TowardsClass`: mixed rows, and the distance of triggers from samples in a pass of one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.class_pass import ClassPass

if TYPE_CHECKING:
    from wmengine.parts.training.towards_class import TowardsClass


class TowardsRows(ClassPass):
    def __init__(self, training: TowardsClass, setting: Setting) -> None:
        super().__init__(1, setting)
        self._pull = float(training.pull)

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        features, triggers = self.features(model, device)
        rows = features[0].float()
        samples = rows[triggers:].detach()  # which stay where the task has them
        distance = torch.linalg.vector_norm(rows[:triggers] - samples.mean(0), dim=1).mean()
        term: torch.Tensor = self._pull * distance / samples.square().sum(1).mean().sqrt().clamp(min=1e-6)
        return term
