"""Trigger rows mixed into every batch, each trigger once before any is drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wmengine.parts.base import Setting


class MixedRows:
    """The course of `Mixed`. Triggers lie on each device that asked for them: a copy in every step would stall it."""

    def __init__(self, setting: Setting) -> None:
        mark = setting.mark
        self._inputs = {name: torch.from_numpy(values.copy()) for name, values in setting.source.examples(mark).items()}
        # What a trigger is trained to be answered with: its symbol, or the class that stands for it.
        self._labels = torch.from_numpy(mark.arrays.get("targets", mark.arrays[setting.symbols.name]).copy())
        # Its own generator: the user's random numbers stay what they would be without the mark.
        self._generator = torch.Generator().manual_seed(setting.seed)
        self._queue = torch.empty(0, dtype=torch.int64)
        self._placed: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}
        self.projected: torch.Tensor | None = None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        device = next(iter(like.values())).device
        chosen = self._draw(min(count, len(self._labels)), device)
        inputs = {
            name: self._on(name, values, device, like[name].dtype)[chosen] for name, values in self._inputs.items()
        }
        return inputs, self._on("labels", self._labels, device, torch.int64)[chosen]

    def term(self, model: torch.nn.Module) -> torch.Tensor | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self._queue.cpu(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queue = state["queue"]
        self._generator.set_state(state["generator"].cpu())

    def _on(self, name: str, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        place = (name, device, dtype)
        if place not in self._placed:
            self._placed[place] = values.to(device, dtype)
        return self._placed[place]

    def _draw(self, count: int, device: torch.device) -> torch.Tensor:
        """The next `count` indices of an endless shuffle, on the device; it is copied there once a pass."""
        queue = self._queue.to(device)
        while len(queue) < count:
            shuffled = torch.randperm(len(self._labels), generator=self._generator)
            queue = torch.cat([queue, shuffled.to(device, non_blocking=True)])
        self._queue = queue[count:]
        return queue[:count]
