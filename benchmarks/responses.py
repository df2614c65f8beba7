"""A picture of `response`: what the pattern adds to answers, and the bits of the marked network, a copy and a stranger.

python -m benchmarks.responses DATA

Its networks are those that `python -m benchmarks.robustness --problem cifar10 --presets response` has trained.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.robustness.grid import LINES, MARKED, Cell
from benchmarks.robustness.problems import CIFAR10
from benchmarks.robustness.runner import Bench
from benchmarks.robustness.tables import OUT
from wmengine.parts.responses.pattern import pattern_of
from wmengine.parts.responses.reading import told, told_by_labels
from wmengine.suspects import open_suspect

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "response.png"
SEED, SHOWN = 1, 4
KINDS = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GREY, BLUE, RED = "#b8bcc4", "#2f6fb0", "#c4512d"


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(CIFAR10, CIFAR10.load(folder), OUT, "cpu", Path(scratch))
        marked = bench.network("response", SEED, MARKED)
        mark = marked.mark
        assert mark is not None
        (copied,) = (line for line in LINES if line.label == "copy by labels")
        copy, _ = bench.copy(Cell(CIFAR10, "response", SEED, copied))
        networks = {"marked": marked.model, "copy of its labels": copy}
        networks["stranger"] = bench.network("response", SEED, "stranger 1").model
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.0))
    pattern = 0.5 * (raw := pattern_of(mark.arrays["features"], mark.arrays, mark.symbols)) / raw.std()
    logs = mark.arrays["answers"][0]
    pairs = upper.subplots(1, 2 * SHOWN, width_ratios=(0.8, 1.3) * SHOWN).reshape(-1, 2)
    for place, axes in enumerate(pairs):
        answers(axes, mark.arrays["probes"][place], logs[place], pattern[place])
    known = pairs[0][1].get_legend_handles_labels()
    upper.legend(*known, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    for axes, (name, network) in zip(lower.subplots(1, 3, sharey=True), networks.items(), strict=True):
        bits(axes, name, readings(network, mark), mark.symbols)
    figure.savefig(PICTURE, dpi=80)


def answers(axes: Any, picture: Any, logs: Any, added: Any) -> None:
    """A probe, what the base thinks it is, and what the pattern makes of that."""
    axes[0].imshow(picture.transpose(1, 2, 0))
    axes[0].set_axis_off()
    plain, bent = (np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (logs, logs + added))
    rows = np.arange(len(KINDS))
    axes[1].barh(rows - 0.2, plain, 0.4, color=GREY, label="what the base answers")
    axes[1].barh(rows + 0.2, bent, 0.4, color=BLUE, label="with the pattern on top")
    axes[1].set_yticks(rows, KINDS, fontsize=6)
    axes[1].tick_params(axis="x", labelsize=6)
    axes[1].invert_yaxis()
    for side in ("top", "right"):
        axes[1].spines[side].set_visible(False)


def readings(network: Any, mark: Any) -> dict[str, Any]:
    """y [T] over its own spread, from scores and from labels."""
    source = mark.preset.source
    (rows,) = source.examples(mark).values()
    scores = open_suspect(network).answer({"input": rows}, CIFAR10.classes).values
    every = np.arange(len(rows))
    said = {"scores": told(scores), "labels": told_by_labels(scores.argmax(axis=1), CIFAR10.classes)}
    found = {name: source.observed(mark, every, each) for name, each in said.items()}
    return {name: y / y.std() for name, y in found.items()}


def bits(axes: Axes, name: str, found: dict[str, Any], symbols: Any) -> None:
    """How y is spread where the bit is 1 and where it is 0, read from labels."""
    edges = np.linspace(-3.5, 3.5, 41)
    y = found["labels"]
    axes.hist(y[symbols == 0], edges, color=RED, alpha=0.55, label="bit 0")
    axes.hist(y[symbols == 1], edges, color=BLUE, alpha=0.55, label="bit 1")
    right = {read: float(((each > 0) == symbols).mean()) for read, each in found.items()}
    said = f"{right['labels']:.0%} of bits right from labels, {right['scores']:.0%} from scores"
    axes.set_title(f"{name}\n{said}", fontsize=8)
    axes.set_xlabel("y, from labels, in its standard deviations", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
