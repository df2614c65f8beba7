"""Pictures of evidence: match rates against the bar that a verdict sets, and what the triggers look like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from wmengine.parts.statistics.tails import binomial_interval

INK, FAINT, GRID = "#1d2733", "#6b7785", "#e3e7ec"
COLOURS = {"owned": "#0b7a5b", "not_proven": "#8a94a0", "error": "#b3392f"}
BAR = "#b3392f"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "svg.fonttype": "path",  # the same letters on every machine
    "svg.hashsalt": "wmengine",  # and the same file for the same data
}


@dataclass(frozen=True)
class MatchRates:
    """One panel of `match_rates`: a mark, and how many of its symbols each suspect matches.

    total: the symbols, T or N; chance: p0, a stranger's chance for each; threshold: the least number that is `owned`,
    or None where no number is; suspects: (label, matched, decision); others: the matches of marks made with other
    keys on the marked model, which show what chance looks like.
    """

    title: str
    total: int
    chance: float
    threshold: int | None
    suspects: Sequence[tuple[str, int, str]]
    others: Sequence[int] = ()


def match_rates(panels: Sequence[MatchRates]) -> Figure:
    """A panel for each mark, side by side: every suspect's match rate with its 95 % interval (Wilson), chance and
    threshold.
    """
    rows = max(len(panel.suspects) + bool(panel.others) for panel in panels)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(panels) + 1.2, 0.34 * rows + 1.25), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})[0]
        for axis, panel in zip(axes, panels, strict=True):
            _match_panel(axis, panel)
        axes[0].invert_yaxis()
    return figure


def _match_panel(axis: Axes, panel: MatchRates) -> None:
    labels = [label for label, _, _ in panel.suspects]
    for row, (_, matched, decision) in enumerate(panel.suspects):
        rate, colour = matched / panel.total, COLOURS[decision]
        low, high = binomial_interval(matched, panel.total)
        axis.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="butt", zorder=3)
        face = colour if decision == "owned" else "white"
        axis.plot(
            rate, row, "o", markersize=7, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.6, zorder=4
        )
    if panel.others:
        labels.append(f"other keys' marks ({len(panel.others)})")
        row = len(labels) - 1
        rates = np.array(panel.others) / panel.total
        # Spread over the row's height, so that equal counts do not hide each other.
        spread = 0.28 * np.sin(2.4 * np.arange(len(rates)))
        axis.plot(rates, row + spread, ".", markersize=4, color=FAINT, alpha=0.55, zorder=3)
    axis.axvline(panel.chance, color=FAINT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    _line_label(axis, panel.chance, "chance ", "right", FAINT)
    if panel.threshold is not None:
        bar = panel.threshold / panel.total
        axis.axvline(bar, color=BAR, linewidth=1.2, zorder=2)
        _line_label(axis, bar, f" owned from {panel.threshold} of {panel.total}", "left", BAR)
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=18)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(-0.6, len(labels) - 0.4)
    axis.set_xlim(0, 1.03)
    axis.set_xlabel("symbols matched")
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _line_label(axis: Axes, x: float, text: str, side: Literal["left", "right"], colour: str) -> None:
    axis.text(x, 1.01, text, transform=axis.get_xaxis_transform(), color=colour, fontsize=8, ha=side, va="bottom")


def image_sheet(images: NDArray[Any], captions: Sequence[object], columns: int = 20) -> Figure:
    """Images [N, C, H, W] in a grid, each with its caption: one channel is drawn in grey, three in colour.

    Each image is shown over its own range of values. Raises ValueError for inputs that are no images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"images must be [N, 1 or 3, H, W] with a caption each, and they are {list(images.shape)}")
    rows = -(-len(images) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(0.47 * columns, 0.62 * rows), dpi=200)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, image, caption in zip(axes, images, captions, strict=False):
            pixels = image.transpose(1, 2, 0).astype(np.float64)
            pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12)
            axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", interpolation="nearest")
            axis.text(
                0.5, -0.06, str(caption), transform=axis.transAxes, ha="center", va="top", fontsize=7, color=FAINT
            )
        figure.subplots_adjust(left=0.002, right=0.998, top=0.998, bottom=0.05 / rows + 0.02, wspace=0.1, hspace=0.22)
    return figure


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same data."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    return _saved(figure, "png", {"Software": None})


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
