"""The course of `OwnPass`: the next triggers go through the model alone, and what it answers is read as symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.mixed_rows import DrawnRows
from wmengine.parts.training.passport_course import by_running_statistics
from wmengine.parts.triggers.readings import ReadTriggers
from wmengine.suspects.outputs import tensors_of
from wmengine.suspects.weights import call


class OwnRows(DrawnRows):
    """Of the marks whose answers `ReadTriggers` read, and of those whose answers are classes."""

    def __init__(self, count: int, strength: float, setting: Setting) -> None:
        super().__init__(setting)
        self._count, self._strength = min(count, len(self._labels)), strength
        self._name, self._source, self._parameters = setting.preset_name, setting.source, setting.mark.parameters
        self._types = {name: rows.dtype for name, rows in setting.example.items()}
        others = setting.mark.arrays.keys() - {"triggers", setting.symbols.name}
        self._arrays = {name: torch.from_numpy(setting.mark.arrays[name].copy()) for name in others}
        classes = setting.symbols.classes(self._parameters)
        self._reads = isinstance(self._source, ReadTriggers)
        self._width = self._source.width(self._parameters) if self._reads else classes

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        """Raises ValueError where the model answers with nothing of the mark's width."""
        device = next(model.parameters()).device
        chosen, rows, labels = self.following(self._count, device, self._types)
        with by_running_statistics(model):
            scores = self._answers(call(model, rows)).float()
        if self._reads:
            arrays = {name: self._on(each, device, each.dtype) for name, each in self._arrays.items()}
            scores = self._source.scored(scores, chosen, self._parameters, arrays)
        return self._strength * torch.nn.functional.cross_entropy(scores, labels)

    def _answers(self, outputs: Any) -> torch.Tensor:
        """[n, width] of the first output that has it: [n], where one number is asked for, and of boxes [n, K, width]
        the highest score of each class."""
        for output in tensors_of(outputs).values():
            if self._width == 1 and output.shape == (self._count,):
                return output[:, None]
            if output.ndim in (2, 3) and len(output) == self._count and output.shape[-1] == self._width:
                return output if output.ndim == 2 else output.amax(1)
        raise ValueError(f"the mark {self._name!r} is for answers [n, {self._width}], and the model gives none")
