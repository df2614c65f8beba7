"""Along which of the base's components the pattern of `response` arrives, in marked networks and copies of them, and
what these prove if each group of components is left out of the reading.

python -m benchmarks.robustness.components DATA [SEED …]

Nothing is trained for it but what `python -m benchmarks.robustness --problem cifar10 --presets response` trains.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.robustness.grid import SEEDS
from benchmarks.robustness.problems import CIFAR10, Problem
from benchmarks.robustness.readings import OUT, READ, Found, keep, log10_p, networks_of
from wmengine.marks.watermark import Watermark
from wmengine.parts.responses.pattern import pattern_of
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.parts.responses.source import ResponsePool
from wmengine.suspects import open_suspect

FILE = "components.parquet"
ENDS = (0, 9, 16, 24, 32, 40, 48)  # of ten classes' nine first
PROBES = 4096  # of the pool


def measure(problem: Problem, folder: Path | None, seeds: Sequence[int], out: Path) -> list[Found]:
    """A row for each seed, network and group of components, as `arrived` has it."""
    rows = []
    for seed, name, mark, network in networks_of(problem, folder, seeds, out):
        rows += [{"seed": seed, "network": name, **each} for each in arrived(mark, network)]
        print(f"seed {seed}, {name}", file=sys.stderr, flush=True)
    return rows


def arrived(mark: Watermark, network: Any) -> list[Found]:
    """Of each group of components, `begin` to `end` counted from 0, by "scores" and by "labels" the slope of what the
    network's answers hold along them over what the base's hold with the whole pattern on top, both less what the
    controls explain, so that 1 is all of it; "there": what that is a component, of all that is there; and log10 p of
    the reading without this group, "without_scores" and "without_labels". The first group is none."""
    source, count = cast(ResponsePool, mark.preset.source), min(PROBES, int(mark.parameters["pool"]))
    features, classes = mark.arrays["features"][:count].astype(np.float64), int(mark.parameters["num_classes"])
    pattern = pattern_of(features, mark.arrays, mark.symbols)
    whole = source.known(mark)[:count] + mark.preset.options["strength"] / pattern.std() * pattern
    given = open_suspect(network, isolation="none").answer(source.examples(mark, count), classes).values
    said = {
        "scores": (told(given), told(whole)),
        "labels": tuple(told_by_labels(each.argmax(axis=1), classes) for each in (given, whole)),
    }
    rest = {
        kind: tuple(unexplained(each, mark.arrays["answers"][:, :count]) for each in both)
        for kind, both in said.items()
    }
    along = {
        kind: tuple(np.linalg.lstsq(features, each, rcond=None)[0] for each in both) for kind, both in rest.items()
    }
    energy, found = np.square(along["scores"][1]).sum(axis=1), list[Found]()
    for begin, end in ((0, 0), *pairwise(end for end in ENDS if end <= features.shape[1])):
        row: Found = {"begin": begin, "end": end}
        kept = features.copy()
        kept[:, begin:end] = 0.0
        for kind, (own, every) in along.items():
            row[kind] = _slope(own[begin:end], every[begin:end]) if end else None
            row[f"without_{kind}"] = log10_p(mark, projected(rest[kind][0], kept, mark.arrays))
        found.append(row | {"there": float(energy[begin:end].mean() / energy.mean()) if end else None})
    return found


def _slope(own: NDArray[np.float64], every: NDArray[np.float64]) -> float:
    return float((own * every).sum() / np.square(every).sum())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each group of components, of each network how much arrived and what it proves without."""
    lines = [f"| components | there | {' | '.join(READ)} |", "|---" * (2 + len(READ)) + "|"]
    for begin, end in ((0, 0), *pairwise(ENDS)):
        group = [row for row in rows if (row["begin"], row["end"]) == (begin, end)]
        there = ", ".join(f"{row['there']:.2f}" for row in group if row["network"] == READ[0] and end)
        shown = []
        for name in READ:
            own = [row for row in group if row["network"] == name]
            slopes = ", ".join(f"{row['scores']:.2f} / {row['labels']:.2f}" for row in own if end)
            proves = ", ".join(f"{row['without_scores']:.1f} / {row['without_labels']:.1f}" for row in own)
            shown.append("<br>".join(each for each in (slopes, proves) if each))
        lines.append(f"| {f'{begin + 1} to {end}' if end else 'all'} | {there} | {' | '.join(shown)} |")
    return re.sub(r"-(0\.0+)\b", r"\1", "\n".join(lines))


if __name__ == "__main__":
    data, *numbers = sys.argv[1:]
    measured = measure(CIFAR10, Path(data), [int(number) for number in numbers] or SEEDS, OUT)
    keep(OUT / FILE, measured)
    print(table(measured))
