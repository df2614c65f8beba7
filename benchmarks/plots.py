"""Two small pictures of a machine's results: headline rows beside floor and peers, and time over size."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image, PngImagePlugin

from benchmarks.environment import ROOT
from benchmarks.harness import quantity
from benchmarks.results import Result, Row

OURS, PEER, FLOOR = "#0b7a5b", "#c2570c", "#8a94a0"
DPI = 110
DIRECTIONS = r", forward \+ [^,]*"  # in a row's name; a dtype behind them stays
STYLE: Any = {
    **rcParamsDefault,
    "font.size": 8.5,
    "axes.edgecolor": "#c9d0d8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
}


def drawn(measured: Sequence[Result]) -> dict[str, str]:
    """The names of one machine's pictures with what they show; none where it was held below its best, or where there is
    no headline."""
    described = measured[0]["environment"]
    if described["slug"].startswith("cpu-") or not any(row["headline"] for one in measured for row in one["rows"]):
        return {}
    return {
        f"speed-{described['slug']}.png": f"Time of floor and peers relative to ours on {described['device']}",
        f"scaling-{described['slug']}.png": f"Time over size on {described['device']}: ours, floor, fastest peer",
    }


def pictures(measured: Sequence[Result]) -> dict[Path, bytes]:
    """The pictures of docs/: path → PNG, which holds the digest of the results that it shows."""
    machines: dict[str, list[Result]] = {}
    for result in measured:
        machines.setdefault(result["environment"]["slug"], []).append(result)
    found = {}
    for ones in machines.values():
        for name in drawn(ones):
            draw = _speed if name.startswith("speed") else _scaling
            with rc_context(STYLE):
                found[ROOT / "docs" / name] = png(draw(ones), digest(ones))
    return found


def digest(measured: Sequence[Result]) -> str:
    """What a picture of these results carries as its Source, so that a stale one is found."""
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def png(figure: Figure, source: str) -> bytes:
    """A PNG of 48 colours with its Source noted."""
    drawing, buffer, note = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(drawing, dpi=DPI)
    note.add_text("Source", source)
    Image.open(drawing).convert("RGB").quantize(48).save(buffer, "PNG", optimize=True, pnginfo=note)
    return buffer.getvalue()


def _speed(measured: Sequence[Result]) -> Figure:
    """Each headline row on a line: our time is 1, the floor's to its left, the peers' to the right."""
    rows = [row for result in measured for row in result["rows"] if row["headline"]]
    figure = Figure(figsize=(8.8, 0.26 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        peers = [peer["ratio"]["median"] for peer in row["peers"]]
        axes.plot(peers, [place] * len(peers), "o", mfc="white", mec=PEER, label="a peer" if not place else None)
        floor = 1 / row["floor"]["ratio"]["median"]
        axes.plot([floor], [place], "D", ms=5, mec="none", color=FLOOR, label="its floor" if not place else None)
    axes.axvline(1, color=OURS, linewidth=2, label="wmengine")
    axes.set(
        xscale="log",
        xlabel="time relative to ours in the same round; to the right is slower",
        ylim=(len(rows) - 0.5, -0.5),
    )
    labels = [f"{re.sub(DIRECTIONS, '', row['what'])}, {row['size']}" for row in rows]
    axes.set_yticks(range(len(rows)), [textwrap.shorten(label, 52, placeholder=" …") for label in labels])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def _scaling(measured: Sequence[Result]) -> Figure:
    """A panel for each curve of three sizes or more that has a headline row; ∝ n^e is fitted to our times."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in (row for result in measured for row in result["rows"] if row["axis"]):
        curves.setdefault((row["what"], row["axis"][0]), []).append(row)
    chosen = {
        key: sorted(rows, key=lambda row: row["axis"][1])
        for key, rows in curves.items()
        if len(rows) >= 3 and any(row["headline"] for row in rows)
    }
    columns = 3
    height = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(8.8, 2.0 * height + 0.35), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, ((what, axis), rows) in zip(panels, chosen.items(), strict=False):
        _curve(axes, what, axis, rows)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def _curve(axes: Axes, what: str, axis: str, rows: Sequence[Row]) -> None:
    sizes = [row["axis"][1] for row in rows]
    ours = [row["ours"]["ms"]["median"] for row in rows]
    peers = [min((peer["ms"]["median"] for peer in row["peers"]), default=math.nan) for row in rows]
    floors = [row["floor"]["ms"]["median"] for row in rows]
    for name, colour, times in (("wmengine", OURS, ours), ("fastest peer", PEER, peers), ("floor", FLOOR, floors)):
        axes.plot(sizes, times, "-o", color=colour, linewidth=1.3, markersize=3, label=name)
    exponent = np.polyfit(np.log(sizes), np.log(ours), 1)[0]
    axes.set(xscale="log", yscale="log", xlabel=f"{axis}; ours ∝ n^{exponent:.2f}")
    axes.set_title("\n".join(textwrap.wrap(what, 42)[:2]), loc="left", fontsize=8, x=-0.14)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(round(value)).replace(" ", "")))
    axes.yaxis.set_major_formatter(FuncFormatter(_time))
    for one in (axes.xaxis, axes.yaxis):
        one.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7.5)


def _time(milliseconds: float, _: object) -> str:
    """A tick's label: '1 µs', '100 ms', '10 s'."""
    for unit, size in (("s", 1e3), ("ms", 1.0)):
        if milliseconds >= 0.999 * size:
            return f"{milliseconds / size:g} {unit}"
    return f"{1e3 * milliseconds:g} µs"
