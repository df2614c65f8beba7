"""Views of a probe: a picture as it is, mirrored and moved a little: the same to the task, and not quite to a network.

What a copy has of the pattern shows in each of them, and its own whims less: a suspect is asked more and told apart
better, from nothing but the probes that there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_VIEWS = 6
_LEAST_SIDE = 8
_SHARE = 16  # of a side, by which a picture is moved


def views_of(shape: Sequence[int], most: int) -> int:
    """How many views inputs of this shape have: 1 of what is no picture [C, H, W], or of a small one."""
    return most if len(shape) == 3 and min(shape[1:]) >= _LEAST_SIDE else 1


def viewed(rows: NDArray[np.uint8], view: int) -> NDArray[np.uint8]:
    """Pictures [n, C, H, W] in one view: 0 as they are, 1 mirrored left to right, 2 to 5 moved down, up, right and left
    by a sixteenth of the side, what comes in at the edge being the edge again."""
    if view < 2:
        return rows[..., ::-1] if view else rows
    axis = -2 if view < 4 else -1
    side = rows.shape[axis]
    step = side // _SHARE or 1
    places = np.arange(side) + (step if view % 2 else -step)
    return np.take(rows, places.clip(0, side - 1), axis=axis)
