"""Letter Recognition (Frey, Slate 1991): a table of 20,000 rows, 16 columns of a printed letter, 26 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.robustness.training import Recipe
from wmengine.demo import Data

RECIPE = Recipe(40, 64, 3e-3)
FILE, COLUMNS, CLASSES, LEVELS = "letter-recognition.data", 16, 26, 15
OWNED = 8000  # rows that the owner trains on, and as many that the thief has


def load(folder: Path | None) -> Data:
    """Rows float32 [n, 16] in [0, 1] and labels: 8,000 of the owner's, as many of the thief's, 4,000 of the test.

    The folder holds letter-recognition.data as UCI gives it out, with or without a line of headings: a letter and 16
    whole numbers from 0 to 15 a line. Raises ValueError where it does not.
    """
    file = None if folder is None else folder / FILE
    if file is None or not file.exists():
        raise ValueError(f"letters needs --data DIR (or WMENGINE_DATA), a folder with {FILE} of UCI")
    lines = [line.split(",") for line in file.read_text(encoding="ascii").split()]
    lines = [line for line in lines if line[1:] != [str(number) for number in range(1, COLUMNS + 1)]]
    x = torch.tensor([[int(number) for number in line[1:]] for line in lines]).float() / LEVELS
    y = torch.tensor([ord(line[0]) - ord("A") for line in lines])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    return Data(*((x[part], y[part]) for part in order.split([OWNED, OWNED, len(y) - 2 * OWNED])))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        layer
        for before, width in ((COLUMNS, 128), (128, 128))
        for layer in (nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(128, CLASSES))


def other_network(seed: int) -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(COLUMNS, 192), nn.BatchNorm1d(192), nn.Tanh(), nn.Linear(192, CLASSES))
