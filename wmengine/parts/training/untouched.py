"""No training: a fingerprint is of the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wmengine.parts.base import Course, Setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Untouched:
    """The loop runs as it would without the mark, if there is a loop."""

    def begin(self, setting: Setting) -> Course:
        return _Nothing()


class _Nothing:
    projected: torch.Tensor | None = None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
