"""How each Triton kernel is launched: warps, pipeline stages and, where they may differ, block sizes, by size class.

What is fixed and what may be tuned. A reduction inside a program adds in an order that follows from its block sizes and
its warps (that of a cross entropy also from where rows begin, as its loads are as wide as this allows). So every kernel
that adds across threads has one launch for a size class, the same on every card: a mark is read through such sums, and
tuning must not move its last bit. Kernels that compute each element alone list `others`, which give the same bits; they
are tried only where the environment says ``WMENGINE_AUTOTUNE=1``. The fastest is kept in
``$XDG_CACHE_HOME/wmengine/launches.json`` (``~/.cache`` without it), by kernel, size class, dtype, card, and the
versions of Triton and wmengine. Sizes that belong to the layout, such as the 4096 values of a block of signs, are the
same everywhere and stand with the kernels.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from wmengine import __version__

FORMAT = "wmengine-launches/1"


@dataclass(frozen=True)
class Launch:
    """One configuration: what a launch takes beside the arguments."""

    warps: int
    stages: int = 3
    blocks: Mapping[str, int] = field(default_factory=dict)

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch, the block sizes among them."""
        return {"num_warps": self.warps, "num_stages": self.stages, **self.blocks}


@dataclass(frozen=True)
class SizeClass:
    """The launch for sizes up to `up_to`, and others with the same result that tuning may prefer."""

    up_to: float
    launch: Launch
    others: tuple[Launch, ...] = ()


def _always(launch: Launch, *others: Launch) -> tuple[SizeClass, ...]:
    return (SizeClass(math.inf, launch, others),)


def _tile(tile: int, step: int, warps: int) -> Launch:
    """A program's share: so many rows, and so many of what it adds up at a time."""
    return Launch(warps, blocks={"TILE": tile, "STEP": step})


# Kernel → its size classes, smallest first. The size is what the class's comment says.
TABLE: dict[str, tuple[SizeClass, ...]] = {
    "addresses": _always(Launch(1)),
    "many_addresses": _always(Launch(1)),
    "sketch_tables": _always(Launch(1)),
    "sketch_sums": _always(Launch(8)),
    "dense_sums": _always(Launch(2)),
    "total": _always(Launch(8)),
    "link": _always(Launch(4)),
    "inverse_norms": _always(Launch(4)),
    "column_means": _always(Launch(4)),
    "filter_gradients": _always(Launch(4)),
    # One value at a time, each the work of one thread: any number of warps gives the same bits. Size: values; up to a
    # million are a few waves of programs at most, which may like another launch than many.
    "sketch_adjoint": (
        SizeClass(2**20, Launch(4), (Launch(2), Launch(8))),
        SizeClass(math.inf, Launch(4), (Launch(2), Launch(8))),
    ),
    "dense_adjoint": _always(Launch(4), Launch(8)),  # two warps would not have the registers for 4096 sums
    # Rows and classes of one program. Size: classes. Up to 1024 a row is a warp's, so that nothing waits for another
    # warp; above 8192 it is read by steps, wide ones where a step more or less at its end is little.
    "cross_entropy": (
        SizeClass(16, _tile(16, 16, 4)),
        SizeClass(32, _tile(16, 32, 4)),
        SizeClass(64, _tile(16, 64, 4)),
        SizeClass(128, _tile(16, 128, 4)),
        SizeClass(256, _tile(16, 256, 4)),
        SizeClass(512, _tile(8, 512, 4)),
        SizeClass(1024, _tile(4, 1024, 4)),
        SizeClass(2048, _tile(2, 2048, 4)),
        SizeClass(4096, _tile(1, 4096, 4)),
        SizeClass(8192, _tile(1, 8192, 8)),
        SizeClass(65536, _tile(1, 4096, 8)),
        SizeClass(math.inf, _tile(1, 8192, 16)),
    ),
    "cross_entropy_sums": _always(Launch(8)),
    "cross_entropy_scale": _always(Launch(8, blocks={"BLOCK": 4096})),
    # Tiles of the matrix of distances, and of its product with the features. Size: rows.
    "soft_neighbor_tiles": (SizeClass(32, _tile(16, 32, 2)), SizeClass(math.inf, _tile(64, 32, 8))),
    # One row of that matrix, so many of its columns at a time. Size: rows.
    "soft_neighbor_rows": (
        *(SizeClass(step, Launch(4, blocks={"STEP": step})) for step in (32, 64, 128, 256, 512)),
        SizeClass(math.inf, Launch(4, blocks={"STEP": 1024})),
    ),
}

# What was read from the file or measured by this process, by key.
_TUNED: dict[str, Launch] = {}


def size_class(kernel: str, size: int) -> SizeClass:
    """The row of the table for one size."""
    return next(row for row in TABLE[kernel] if size <= row.up_to)


def chosen(kernel: str, size: int = 0) -> Launch:
    """The table's launch, which no tuning changes."""
    return size_class(kernel, size).launch


def run(kernel: str, size: int, dtype: torch.dtype, device: torch.device, call: Callable[[Launch], object]) -> None:
    """Launch the kernel by `call`, as the table says or, where tuning is asked for, the fastest way for this card.

    Tuning waits for the GPU and calls `call` many times, which must do no harm; it happens once for a key, and never
    while a CUDA graph is captured.
    """
    row = size_class(kernel, size)
    if not row.others or os.environ.get("WMENGINE_AUTOTUNE") != "1":
        call(row.launch)
        return
    key = "|".join((kernel, str(row.up_to), str(dtype), _card(device), triton.__version__, __version__))
    launch = _TUNED.get(key) or _stored(key, row)
    if launch is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            call(row.launch)
            return
        seconds = {index: measure(call, one) for index, one in enumerate((row.launch, *row.others))}
        launch = (row.launch, *row.others)[min(seconds, key=lambda index: seconds[index])]
        _store(key, launch)
    _TUNED[key] = launch
    call(launch)


def measure(call: Callable[[Launch], object], launch: Launch) -> float:
    """Median seconds of one call on the current stream of a GPU."""
    call(launch)  # compiles
    times: list[float] = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(launch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times)[len(times) // 2]


def cache_file() -> Path:
    """Where tuned launches are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "wmengine" / "launches.json"


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read() -> dict[str, Any]:
    """The file's launches; none, with a warning, where it is not a file of ours."""
    path = cache_file()
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is left aside, it cannot be read: {error}", stacklevel=4)
        return {}
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("launches"), dict)
    ):
        warnings.warn(f"{path} is left aside: it is not a {FORMAT} file", stacklevel=4)
        return {}
    launches: dict[str, Any] = content["launches"]
    return launches


def _stored(key: str, row: SizeClass) -> Launch | None:
    """The file's launch for a key, if the table knows it."""
    entry = _read().get(key)
    if entry is None:
        return None
    for launch in (row.launch, *row.others):
        if asdict(launch) == entry:
            return launch
    warnings.warn(f"{cache_file()} holds a launch that is not among those of {key!r}: left aside", stacklevel=3)
    return None


def _store(key: str, launch: Launch) -> None:
    """Add a launch to the file, which other processes see whole or not at all; warns where it cannot be written."""
    path = cache_file()
    content = {"format": FORMAT, "launches": {**_read(), key: asdict(launch)}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path} cannot be written, tuning will be repeated: {error}", stacklevel=3)
