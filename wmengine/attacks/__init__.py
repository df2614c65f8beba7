"""Attacks: what a thief does to a copy so that nobody can prove whose it is; `wm.attacks.run` carries them out."""

from wmengine.attacks.attack import Attack
from wmengine.attacks.catalogue import ATTACKS, attack, run

__all__ = ["ATTACKS", "Attack", "attack", "run"]
