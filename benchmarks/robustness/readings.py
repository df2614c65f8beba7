"""What reading alone changes: networks marked by `response` and copies of them, read by other probes and controls.

python -m benchmarks.robustness.readings DATA [SEED …]

Nothing is trained for it but what `python -m benchmarks.robustness --problem cifar10 --presets response` trains. A mark
is read as it says itself only on its own pool; here its bits are read on pools that were never bound, to choose by.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from benchmarks.robustness.grid import LINES, MARKED, Cell
from benchmarks.robustness.problems import CIFAR10, Problem
from benchmarks.robustness.runner import Bench
from benchmarks.robustness.tables import OUT
from wmengine.judging.looks import looks_of_bits
from wmengine.marks.watermark import Watermark
from wmengine.parts.responses.gathering import (
    Whitening,
    answers_of,
    base_of,
    mixtures,
    raw_features,
    undecided_first,
)
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.parts.responses.views import viewed
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import to_input, to_levels

FILE = "readings.parquet"
READ = ("untouched", "copy by labels", "copy by labels to another architecture", "stranger 1")
CONTROLS = "bso"  # the base, a student of its labels, one of another architecture


@dataclass(frozen=True)
class Reading:
    """What is asked and what it is read against. pool: "natural" inputs as they come, "undecided" ones of them first,
    "mixtures" of two, the undecided first, or "both" of these; count of them, each in so many views; controls: which of
    the base (0), a student of its labels (1) and one of another architecture (2)."""

    pool: str = "both"
    count: int = 4096
    views: int = 1
    controls: str = CONTROLS


READINGS = (
    *(Reading(pool) for pool in ("natural", "undecided", "mixtures")),
    *(Reading(count=count) for count in (256, 1024, 4096, 16384)),
    *(Reading(views=views) for views in (2, 6)),
    *(Reading(controls=controls) for controls in ("b", "bs", "bo")),
)


def measure(problem: Problem, folder: Path | None, seeds: list[int], out: Path = OUT) -> list[dict[str, Any]]:
    """A row for each seed, reading and network: log10 p from scores and from labels."""
    rows = []
    lines = {line.label: line for line in LINES}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(problem, problem.load(folder), out, "cpu", Path(scratch))
        for seed in seeds:
            mark = bench.network("response", seed, MARKED).mark
            assert mark is not None
            suspects = {name: bench.copy(Cell(problem, "response", seed, lines[name]))[0] for name in READ}
            controls = bench.controls("response", seed)
            levels = to_levels(bench.data.test[0].cpu().numpy(), mark.parameters["value_range"])
            for pool in dict.fromkeys(reading.pool for reading in READINGS):
                readings = [reading for reading in READINGS if reading.pool == pool]
                rows += _of_pool(mark, _pool(mark, pool, levels, controls[0]), readings, controls, suspects, seed)
                print(f"seed {seed}, {pool}: {len(rows)} rows", file=sys.stderr, flush=True)
    return rows


def _pool(mark: Watermark, pool: str, natural: NDArray[np.uint8], base: Any) -> NDArray[np.uint8]:
    ends = mark.parameters["value_range"]
    if pool == "natural":
        return natural
    mixed = to_levels(mixtures(to_input(natural, ends), 2 * len(natural)), ends)
    levels = {"undecided": natural, "mixtures": mixed, "both": np.concatenate([natural, mixed])}[pool]
    (name,) = (each["name"] for each in mark.parameters["inputs"])
    return levels[undecided_first(answers_of([base], name, to_input(levels, ends), mark.parameters["num_classes"])[0])]


def _of_pool(
    mark: Watermark,
    levels: NDArray[np.uint8],
    readings: list[Reading],
    controls: list[Any],
    suspects: dict[str, Any],
    seed: int,
) -> list[dict[str, Any]]:
    ((name, _),) = mark.preset.source.examples(mark, 1).items()
    classes, arrays, whitening = int(mark.parameters["num_classes"]), mark.arrays, None
    whitening = Whitening(arrays["centre"], arrays["whitening"])
    features, known, said = [], [], {network: [] for network in suspects}
    for view in range(max(reading.views for reading in readings)):
        most = max(reading.count for reading in readings if reading.views > view)
        rows = to_input(viewed(levels[:most], view), mark.parameters["value_range"])
        features.append(whitening(raw_features(base_of(controls[0], torch.from_numpy(rows[:1])), rows)))
        known.append(answers_of(controls, name, rows, classes))
        for network, suspect in suspects.items():
            said[network].append(open_suspect(suspect).answer({name: rows}, classes).values)
    found = []
    for reading in readings:
        count, views = reading.count, range(reading.views)
        there = [CONTROLS.index(each) for each in reading.controls]
        u = np.concatenate([features[view][:count] for view in views])
        answers = np.concatenate([known[view][there, :count] for view in views], axis=1)
        for network, scores in said.items():
            given = np.concatenate([scores[view][:count] for view in views])
            log10_p = {}
            for kind, rest in (("scores", told(given)), ("labels", told_by_labels(given.argmax(axis=1), classes))):
                y = projected(unexplained(rest, answers), u, arrays)
                test = mark.preset.test(mark, mark.total, sequential=False)
                test.add(looks_of_bits(y, [mark.symbols])[0])
                log10_p[kind] = test.log10_p
            found.append({"seed": seed, "network": network, **vars(reading), **log10_p})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each reading, log10 p of all seeds from scores and from labels for each network."""
    lines = [f"| pool | asked | views | controls | {' | '.join(READ)} |", "|---" * (4 + len(READ)) + "|"]
    for reading in READINGS:
        shown = [reading.pool, str(reading.count), str(reading.views), reading.controls]
        for network in READ:
            same = [
                row
                for row in rows
                if row["network"] == network and all(row[name] == value for name, value in vars(reading).items())
            ]
            shown.append(", ".join(f"{row['scores']:.1f} / {row['labels']:.1f}" for row in same))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    data, *numbers = sys.argv[1:]
    measured = measure(CIFAR10, Path(data), [int(number) for number in numbers] or [1, 2, 3])
    parquet.write_table(pyarrow.Table.from_pylist(measured), OUT / FILE)
    print(table(measured))
