"""Trigger rows mixed into every batch."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting


@dataclass(frozen=True)
class Mixed:
    """max(2, batch // 8) rows a batch, with the cross entropy that the task's own rows have (Adi et al. 2018)."""

    def begin(self, setting: Setting) -> Course:
        from wmengine.parts.training.mixed_rows import MixedRows

        return MixedRows(setting)
