"""Repainting: a little Gaussian noise on every weight, the cheapest laundering there is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def noise(weights: dict[str, NDArray[np.float32]], random: np.random.Generator, sigma: float) -> None:
    """Add noise whose standard deviation is `sigma` times that of the tensor it is added to."""
    if not 0.0 <= sigma < np.inf:
        raise ValueError(f"sigma must be a number from 0, and it is {sigma!r}")
    for array in weights.values():
        array += np.float32(sigma * array.std()) * random.standard_normal(array.shape, np.float32)
