"""Which processors this thread may use, and keeping threads to some of them: a preference, never a reason to fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable


def available() -> list[int]:
    """The numbers of the processors that the calling thread may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def keep_to(processors: Iterable[int], process: int = 0) -> None:
    """Have the calling thread, or a process of one thread, use these alone, where the system knows how and lets it."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a container may have lost them meanwhile, or forbid the call
            os.sched_setaffinity(process, processors)
