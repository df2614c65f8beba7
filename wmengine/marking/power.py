"""What a mark in answers could prove at best, said before anything is trained or served: its base's answers to the pool
with the whole pattern on top, read as any suspect's are. No network is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wmengine.judging.looks import looks_of_bits
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools
from wmengine.parts.responses.pattern import pattern_of
from wmengine.parts.responses.reading import told, told_by_labels

Floats = NDArray[np.floating[Any]]

LEAST = -9.0  # of log10 p, which proves
_FIRST = 4096  # of the pool, which mostly say enough; only else is all of it read


def log10_p_at_best(
    mark: Watermark, strength: float, hold: Callable[[Floats, Floats], Floats] | None = None
) -> list[float]:
    """By scores and by labels alone, of a network that holds the pattern whole; hold: of the base's logits and the
    pattern [n, C] the scores that a service gives out, whose labels say nothing."""
    source = cast(Pools, mark.preset.source)
    known, best = source.known(mark), [0.0] if hold else [0.0, 0.0]
    for count in dict.fromkeys((min(_FIRST, len(known)), len(known))):
        pattern = pattern_of(mark.arrays["features"][:count], mark.arrays, mark.symbols)
        pattern *= strength / pattern.std()
        held = hold(known[:count], pattern) if hold else known[:count] + pattern
        for place, said in enumerate((told(held), told_by_labels(held.argmax(axis=1), held.shape[1]))[: len(best)]):
            if best[place] > LEAST:
                test = mark.preset.test(mark, mark.total, sequential=False)
                test.add(*looks_of_bits(source.observed(mark, np.arange(count), said), [mark.symbols]))
                best[place] = test.log10_p
    return best


def warn_of_power(mark: Watermark, strength: float, hold: Callable[[Floats, Floats], Floats] | None = None) -> None:
    """A UserWarning where even that would not prove it, by one of both."""
    best = log10_p_at_best(mark, strength, hold)
    if max(best) > LEAST:
        what = "the service" if hold else "a network that holds it whole"
        said = f"{best[0]:.1f} by its scores" + ("" if hold else f" and {best[1]:.1f} by its labels alone")
        warnings.warn(
            f"the mark {mark.scheme!r} is weak: even {what} would prove log10 p = {said}, where {LEAST:.0f} is needed; "
            "give more probes, a greater strength= or more features=",
            stacklevel=3,
        )
