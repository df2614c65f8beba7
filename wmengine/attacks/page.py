"""The page of attacks: one entry each."""

from __future__ import annotations

from wmengine.attacks.attack import Attack

PAGE: tuple[Attack, ...] = ()
