"""The course of a mark that a keyed function reads from one weight: the link of y as it is at this step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wmengine.ops.torch_reference import link_loss
from wmengine.parts.base import Setting
from wmengine.parts.sources.extracted import extractor_of
from wmengine.parts.sources.weights import folded
from wmengine.parts.training.weight_term import carriers_in
from wmengine.suspects.weights import live_factors, live_filters


class ExtractedTerm:
    """See `Link`. Of the live weight in every step; plain torch, on its device."""

    def __init__(self, link: str, strength: float, margin: float, setting: Setting) -> None:
        (self._carrier,) = carriers_in(setting.model, setting.example, setting.preset_name, setting.mark.parameters)
        self._link, self._strength, self._margin = link, strength, margin
        self._bits = torch.from_numpy(setting.mark.arrays[setting.symbols.name].copy())
        self._read = extractor_of(setting.mark, len(self._bits))
        self.projected: torch.Tensor | None = None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        return self._pull(self._values(model))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""

    def _values(self, model: torch.nn.Module) -> torch.Tensor:
        """w [M]."""
        weight = folded(live_filters(model, self._carrier), live_factors(model, self._carrier), "flat")
        values: torch.Tensor = weight.flatten()
        return values if values.dtype == torch.float64 else values.float()

    def _pull(self, values: torch.Tensor) -> torch.Tensor:
        y = self._read(values)
        self.projected = y.detach()
        if self._bits.device != y.device:
            self._bits = self._bits.to(y.device)
        return self._strength * link_loss(y, self._bits, self._link, self._margin)
