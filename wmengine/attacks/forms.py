"""The forms of a model that attacks take, each made from a torch module or a file, and the result put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmengine._optional import require
from wmengine.attacks.attack import Attack
from wmengine.attacks.data import Data
from wmengine.suspects.weights import unwrap

if TYPE_CHECKING:
    import torch


def attack_module(
    attack: Attack, model: torch.nn.Module, data: Data | None, out: Path | None, seed: int, options: Mapping[str, Any]
) -> Any:
    """The attacked copy of a torch module, in eval mode."""
    torch = require("torch", extra="train")
    attacked = copy.deepcopy(unwrap(model))
    random = np.random.default_rng(seed)
    devices = range(torch.cuda.device_count())  # manual_seed seeds every one
    with torch.random.fork_rng(devices=devices):
        # Not the seed itself: layers drawn anew would be those that an owner drew who chose the same.
        torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        attacked = attack.run(attacked, data, random, **options)
    return attacked.eval()


def attack_file(
    attack: Attack, source: Path, data: Data | None, out: Path | None, seed: int, options: Mapping[str, Any]
) -> Path:
    """The attacked file, written to `out`."""
    if attack.takes == "module":
        raise ValueError(f"the attack {attack.name!r} trains: give the torch module, not a file of it")
    raise ValueError(f"{source} is no file of a model that can be attacked")
