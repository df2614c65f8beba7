"""Result files to pictures: a roofline plot and a scaling plot of each machine, the same bytes for the same results."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import tables
from benchmarks.environment import ROOT
from benchmarks.harness import quantity

INK, FAINT, GRID = "#1d2733", "#6b7785", "#e3e7ec"
OURS, PEER, FLOOR = "#0b7a5b", "#c2570c", "#8a94a0"
WIDTH = 8.8  # inches; README shows it at about 96 pixels an inch
LINE = 0.19  # inches between two labels

_PLACES = re.compile(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)', re.DOTALL)  # in an SVG; scales keep all their digits
_DIRECTIONS = re.compile(r", forward \+ [^,]*")  # in a row's name; a dtype behind them stays

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "svg.fonttype": "path",  # the same letters on every machine
    "svg.hashsalt": "wmengine",  # and the same file for the same data
}


def pictures(results: Sequence[tables.Result]) -> dict[Path, str]:
    """The plots of docs/ as they should be: path → SVG. A machine without roofs or without curves has no such plot."""
    drawn = {}
    for measured in tables.by_machine(results).values():
        name = tables.slug(measured)
        if tables.roofline_rows(measured):
            drawn[ROOT / "docs" / f"roofline-{name}.svg"] = roofline(measured)
        if any(curve.headline for curve in tables.curves(measured)):
            drawn[ROOT / "docs" / f"scaling-{name}.svg"] = scaling(measured)
    return drawn


def roofline(measured: Sequence[tables.Result]) -> str:
    """SVG of one machine's headline rows, each with its fastest peer, below the roofs measured in the same run.

    Above: rows that count operations, 10⁹ of them a second over operations per byte, both of the least work. Below:
    rows whose work is moving bytes, GB/s.
    """
    rows, roofs = tables.roofline_rows(measured), tables.roofs(measured)
    computing = [row for row in rows if row.get("operations")]
    moving = [row for row in rows if not row.get("operations")]
    # Everything is placed in inches, so that a label's angle and distance are known without drawing first.
    above = max(3.3, LINE * len(computing) + 0.3) if computing else 0.0
    below = 0.3 * len(moving) + 0.25 if moving else 0.0
    height = 0.5 + (above + 0.6) * bool(computing) + (below + 0.8) * bool(moving)
    with _drawing(height) as figure:
        top = height - 0.5
        if computing:
            top -= above
            axes = figure.add_axes((0.65 / WIDTH, top / height, 5.0 / WIDTH, above / height))
            _roofline_panel(axes, computing, roofs, (5.0, above))
            top -= 0.6
        if moving:
            top -= 0.3 + below
            axes = figure.add_axes((3.95 / WIDTH, top / height, 4.6 / WIDTH, below / height))
            _bandwidth_panel(axes, moving, roofs)
        described = measured[0]["environment"]
        held = f", held to {'/'.join(described['instruction_sets']).upper()}" if described.get("capped") else ""
        title = f"{described['device']}{held}"
        text = figure.text(0.12 / WIDTH, 1 - 0.2 / height, title, weight="bold", va="center")
        for label, colour in (("● wmengine", OURS), ("○ the fastest peer that ran", PEER)):
            text = figure.axes[0].annotate(
                label, (1, 0.5), xycoords=text, xytext=(12, 0), textcoords="offset points", va="center", color=colour
            )
        return _svg(figure, "Headline rows below the measured roofs")


def _roofline_panel(
    axes: Axes, rows: Sequence[tables.Row], roofs: dict[str, float], inches: tuple[float, float]
) -> None:
    points = []
    for row in rows:
        peer = tables.best_peer(row)
        rate = row["operations"] / row["ours"]["ms"]["median"] / 1e6
        peer_rate = None if peer is None else row["operations"] / peer["ms"]["median"] / 1e6
        points.append((row["operations"] / row["bytes"], rate, peer_rate, _label(row)))
    peaks = {name: value for name, value in roofs.items() if name.endswith("_gflop_s")}
    highest = max(peaks.values())
    intensities = [point[0] for point in points]
    rates = [rate for point in points for rate in point[1:3] if rate is not None]
    left = min(*intensities, 0.3 * highest / roofs["cache_gb_s"]) / 2.5
    right = max(*intensities, 3 * highest / roofs["copy_gb_s"]) * 2
    low, high = min(*rates, left * roofs["copy_gb_s"]) / 1.6, max(*rates, highest) * 2.2
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="operations per byte", ylabel="Gop/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_amount))
    _only_decades(axes)
    axes.grid(linewidth=0.6)
    steepness = (inches[1] / math.log10(high / low)) / (inches[0] / math.log10(right / left))
    slant = math.degrees(math.atan(steepness))
    for name, text, side in (("copy_gb_s", "copy from memory", -1), ("cache_gb_s", "copy from cache", 1)):
        bandwidth = roofs[name]
        axes.plot([left, highest / bandwidth], [left * bandwidth, highest], color=INK, linewidth=1.2)
        start = left * 1.3
        away = 3 * side
        axes.annotate(
            f"{text}, {tables.rate(bandwidth, 'B/s')}",
            (start, start * bandwidth),
            xytext=(-away * math.sin(math.radians(slant)), away * math.cos(math.radians(slant))),
            textcoords="offset points",
            rotation=slant,
            rotation_mode="anchor",
            fontsize=7.5,
            va="bottom" if side > 0 else "top",
        )
    for name, peak in peaks.items():
        axes.plot([peak / roofs["cache_gb_s"], right], [peak, peak], color=INK, linewidth=1.2)
        label = f"{name.removesuffix('_gflop_s')} matrix product, {tables.rate(peak, 'FLOP/s')}"
        axes.annotate(
            label, (right, peak), xytext=(-3, 3), textcoords="offset points", fontsize=8, va="bottom", ha="right"
        )
    for intensity, rate, peer_rate, _ in points:
        _pair_of_points(axes, (intensity, rate), None if peer_rate is None else (intensity, peer_rate))
    # Labels stand in a column beside the axes, in the order of their points, far enough from each other.
    per_inch = math.log10(high / low) / inches[1]
    ordered = sorted(points, key=lambda point: point[1])
    wanted = [math.log10(point[1] / low) / per_inch for point in ordered]
    for (intensity, rate, _, label), place in zip(ordered, apart(wanted, LINE, 0.0, inches[1]), strict=True):
        axes.annotate(
            label,
            (intensity, rate),
            xytext=(1.03, place / inches[1]),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": FLOOR, "linewidth": 0.5, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def _bandwidth_panel(axes: Axes, rows: Sequence[tables.Row], roofs: dict[str, float]) -> None:
    values = []
    for place, row in enumerate(rows):
        peer = tables.best_peer(row)
        ours = row["bytes"] / row["ours"]["ms"]["median"] / 1e6
        theirs = None if peer is None else row["bytes"] / peer["ms"]["median"] / 1e6
        _pair_of_points(axes, (ours, place), None if theirs is None else (theirs, place))
        values += [ours, *([] if theirs is None else [theirs])]
    for name, text, side in (("copy_gb_s", "copy from memory", "right"), ("cache_gb_s", "from cache", "left")):
        axes.axvline(roofs[name], color=INK, linewidth=1.2, zorder=1)
        axes.annotate(
            f"{text}\n{tables.rate(roofs[name], 'B/s')}",
            (roofs[name], 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if side == "right" else 3, 1),
            textcoords="offset points",
            fontsize=8,
            ha=side,
            va="bottom",
        )
    axes.set(xscale="log", xlabel="GB/s of the bytes that have to move", ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlim(min(*values, roofs["copy_gb_s"]) / 1.8, max(*values, roofs["cache_gb_s"]) * 5)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _only_decades(axes)
    axes.grid(axis="x", linewidth=0.6)
    axes.spines["left"].set_visible(False)


def _pair_of_points(axes: Axes, ours: tuple[float, float], peer: tuple[float, float] | None) -> None:
    """Ours filled, the peer hollow, and a line that shows that they belong together."""
    if peer is not None:
        axes.plot(*zip(ours, peer, strict=True), color=FLOOR, linewidth=1.0, zorder=2)
        axes.plot(*peer, "o", markersize=5, markerfacecolor="white", markeredgecolor=PEER, markeredgewidth=1.3)
    axes.plot(*ours, "o", markersize=6, color=OURS, markeredgewidth=0, zorder=4)


def scaling(measured: Sequence[tables.Result]) -> str:
    """SVG of one machine's curves with a headline row, time over size, a panel each: ours, the floor, and the fastest
    peer at every size.
    """
    found = [curve for curve in tables.curves(measured) if curve.headline]
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    panel, margin = 1.75, 0.95
    height = lines * (panel + margin) + 0.1
    with _drawing(height) as figure:
        for index, curve in enumerate(found):
            line, column = divmod(index, columns)
            room = WIDTH / columns
            bottom = height - (line + 1) * (panel + margin) + 0.45
            spot = ((column * room + 0.55) / WIDTH, bottom / height, (room - 1.4) / WIDTH, panel / height)
            _curve_panel(figure.add_axes(spot), curve, panel)
        return _svg(figure, "Time over size")


def _curve_panel(axes: Axes, curve: tables.Curve, inches: float) -> None:
    sizes = [point.value for point in curve.points]
    ours = [point.ours for point in curve.points]
    peers = [(point.value, point.peer) for point in curve.points if point.peer is not None]
    drawn = [("floor", FLOOR, sizes, [point.floor for point in curve.points])]
    if peers:
        drawn.append(("fastest\npeer", PEER, [size for size, _ in peers], [time for _, time in peers]))
    drawn.append((f"wmengine\n∝ n^{tables.growth(sizes, ours):.2f}", OURS, sizes, ours))
    for _, colour, x, y in drawn:
        axes.plot(x, y, "-o", color=colour, linewidth=1.4, markersize=3.2, markeredgewidth=0)
    times = [time for _, _, _, y in drawn for time in y]
    low, high = min(times) / 1.5, max(times) * 1.5
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel=curve.axis)
    axes.set_title("\n".join(textwrap.wrap(curve.what, 38)[:2]), loc="left", fontsize=8.5, x=-0.2)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_time))
    axes.xaxis.set_major_formatter(FuncFormatter(_amount))
    _only_decades(axes)
    axes.tick_params(labelsize=8)
    axes.grid(linewidth=0.6)
    per_inch = math.log10(high / low) / inches
    ordered = sorted(drawn, key=lambda line: line[3][-1])
    wanted = [math.log10(line[3][-1] / low) / per_inch for line in ordered]
    # Two lines high: its middle stays so far below the top that a long title has the room above to itself.
    for (label, colour, _, _), place in zip(ordered, apart(wanted, 0.29, 0.0, inches - 0.14), strict=True):
        axes.annotate(
            label,
            (1.03, place / inches),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            linespacing=1.05,
        )


def _only_decades(axes: Axes) -> None:
    """No ticks between the powers of ten: they would be most of the file."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _amount(value: float, _: object) -> str:
    """A tick's label: '0.1', '10', '1k', '10M'."""
    return quantity(round(value)).replace(" ", "") if value >= 1 else f"{value:g}"


def _time(milliseconds: float, _: object) -> str:
    """A tick's label: '1 µs', '100 ms', '10 s'."""
    for unit, size in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if milliseconds >= 0.999 * size:
            return f"{milliseconds / size:g} {unit}"
    return f"{1e6 * milliseconds:g} ns"


def _label(row: tables.Row) -> str:
    """What is done, without its directions, and the size; as much of it as there is room for."""
    text = f"{_DIRECTIONS.sub('', row['what'])}, {row['size']}"
    return text if len(text) <= 50 else f"{text[:49].rstrip(' ,')}…"


def apart(wanted: Sequence[float], gap: float, least: float, most: float) -> list[float]:
    """Places near the `wanted` ones (ascending) that are `gap` apart and, where there is room, within the limits."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else least))
    for index in reversed(range(len(places))):
        limit = most if index == len(places) - 1 else places[index + 1] - gap
        places[index] = min(places[index], limit)
    return places


@contextmanager
def _drawing(height: float) -> Iterator[Figure]:
    """An empty figure, drawn in this module's style whatever the user's own settings are."""
    with rc_context({**rcParamsDefault, **_STYLE}):
        yield Figure(figsize=(WIDTH, height), facecolor="white")


def _svg(figure: Figure, title: str) -> str:
    """The figure without date and version, and without digits and blanks that nobody can see."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    text = _PLACES.sub(lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), buffer.getvalue())
    return "".join(f"{line.strip()}\n" for line in text.splitlines())
