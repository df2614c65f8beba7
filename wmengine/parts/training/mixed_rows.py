"""Trigger rows mixed into every batch, each trigger once before any is drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wmengine.parts.base import Setting


class DrawnRows:
    """A mark's triggers in an endless shuffle. They lie on each device that asked for them: a copy in every step would
    stall it."""

    def __init__(self, setting: Setting) -> None:
        mark = setting.mark
        self._inputs = {name: torch.from_numpy(values.copy()) for name, values in setting.source.examples(mark).items()}
        # What a trigger is trained to be answered with: its symbol, or the class that stands for it.
        labels = torch.from_numpy(mark.arrays.get("targets", mark.arrays[setting.symbols.name]).copy())
        count = len(next(iter(self._inputs.values())))
        self._labels = labels.repeat_interleave(count // len(labels))  # a symbol may have several inputs
        # Its own generator: the user's random numbers stay what they would be without the mark.
        self._generator = torch.Generator().manual_seed(setting.seed)
        self._queue = torch.empty(0, dtype=torch.int64)
        self._placed: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self.projected: torch.Tensor | None = None

    def following(
        self, count: int, device: torch.device, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The numbers of the next `count` triggers, their inputs by name, and their labels."""
        chosen = self._draw(min(count, len(self._labels)), device)
        inputs = {name: self._on(values, device, dtypes[name])[chosen] for name, values in self._inputs.items()}
        return chosen, inputs, self._on(self._labels, device, torch.int64)[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self._queue.cpu(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        queue = state["queue"].cpu()
        if (
            queue.dtype != torch.int64
            or queue.ndim != 1
            or not bool(((queue >= 0) & (queue < len(self._labels))).all())
        ):
            raise TypeError("its queue holds no numbers of triggers")
        self._queue = queue
        self._generator.set_state(state["generator"].cpu())

    def _on(self, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Values that the course holds, as they lie on a device."""
        place = (id(values), device, dtype)
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


class MixedRows(DrawnRows):
    """The course of `Mixed`."""

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        device = next(iter(like.values())).device
        _, inputs, labels = self.following(count, device, {name: values.dtype for name, values in like.items()})
        return inputs, labels

    def term(self, model: torch.nn.Module) -> torch.Tensor | None:
        return None
