"""What reading alone changes: networks marked by `response` and copies of them, read on other probes and controls.

python -m benchmarks.robustness.readings DATA [SEED …]

Nothing is trained for it but what `python -m benchmarks.robustness --problem cifar10 --presets response` trains. It is
for choosing pools and no proof, as is `verify(probes=)`, which would ask each network anew for every reading.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from benchmarks.environment import ROOT
from benchmarks.robustness.grid import LINES, MARKED, SEEDS, Cell
from benchmarks.robustness.problems import CIFAR10, Problem
from benchmarks.robustness.runner import Bench
from wmengine.judging.looks import looks_of_bits
from wmengine.marks.watermark import Watermark
from wmengine.parts.responses.bases import base_of, features_of, tensors
from wmengine.parts.responses.gathering import Candidates, Whitening, answers_of, undecided_first
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.parts.responses.source import ResponsePool
from wmengine.parts.responses.views import viewed
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import to_input, to_levels

OUT = ROOT / "benchmarks" / "results" / "robustness"
FILE = "readings.parquet"
READ = ("untouched", "copy by labels", "copy by labels to another architecture", "stranger 1")
CONTROLS = {"b": "base", "s": "student", "o": "student of another architecture"}

Levels = NDArray[np.uint8]
Found = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What is asked and what it is read against. pool: "natural" inputs as they come, the "undecided" of them first,
    "mixtures" of two or "both", the undecided first too; count of them, in so many views; controls: of CONTROLS."""

    pool: str = "both"
    count: int = 4096
    views: int = 1
    controls: str = "bso"


READINGS = (
    *(Reading(pool) for pool in ("natural", "undecided", "mixtures")),
    *(Reading(count=count) for count in (256, 1024, 4096, 16384)),
    *(Reading(views=views) for views in (2, 6)),
    *(Reading(controls=controls) for controls in ("b", "bs", "bo")),
)


def measure(
    problem: Problem, folder: Path | None, seeds: Sequence[int], out: Path, readings: Sequence[Reading] = READINGS
) -> list[Found]:
    """A row for each seed, reading and network: log10 p from scores and from labels."""
    rows, lines = [], {line.label: line for line in LINES}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(problem, problem.load(folder), out, "cpu", Path(scratch))
        for seed in seeds:
            mark, controls = bench.network("response", seed, MARKED).mark, bench.controls("response", seed)
            assert mark is not None
            suspects = {name: bench.copy(Cell(problem, "response", seed, lines[name]))[0] for name in READ}
            natural = to_levels(bench.data.test[0].cpu().numpy(), mark.parameters["value_range"])
            for pool in dict.fromkeys(reading.pool for reading in readings):
                own = [reading for reading in readings if reading.pool == pool]
                found = read(mark, candidates(mark, pool, natural, controls[0]), own, controls, suspects)
                rows += [{"seed": seed, **each} for each in found]
                print(f"seed {seed}, {pool}: {len(rows)} rows", file=sys.stderr, flush=True)
    return rows


def networks_of(
    problem: Problem, folder: Path | None, seeds: Sequence[int], out: Path
) -> Iterator[tuple[int, str, Watermark, Any]]:
    """Of each seed and each of READ the mark and the network, trained now, or before and kept."""
    lines = {line.label: line for line in LINES}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(problem, problem.load(folder), out, "cpu", Path(scratch))
        for seed in seeds:
            mark = bench.network("response", seed, MARKED).mark
            assert mark is not None
            for name in READ:
                yield seed, name, mark, bench.copy(Cell(problem, "response", seed, lines[name]))[0]


def candidates(mark: Watermark, pool: str, natural: Levels, base: Any) -> Levels:
    """The probes of a pool, those that are asked first in front."""
    if pool == "natural":
        return natural
    ends = mark.parameters["value_range"]
    made = Candidates(to_input(natural, ends), 2 * len(natural), ends)
    mixed = made[len(natural) :]
    levels = {"undecided": natural, "mixtures": mixed, "both": np.concatenate([natural, mixed])}[pool]
    return levels[undecided_first(answers_of([base], [_inputs(mark, levels)], _classes(mark))[0])]


def read(
    mark: Watermark, probes: Levels, readings: Sequence[Reading], controls: Sequence[Any], suspects: Mapping[str, Any]
) -> list[Found]:
    """log10 p of suspects by each reading of one pool; controls: of CONTROLS, the base first.

    Raises ValueError for a base that is not the mark's.
    """
    source, classes = cast(ResponsePool, mark.preset.source), _classes(mark)
    base = base_of(controls[0], tensors(_inputs(mark, probes[:1])))
    if not source.fits(mark, features_of(base, [source.examples(mark, 64)])):
        raise ValueError("the first of controls is not the base of this mark")
    whitening = Whitening(mark.arrays["centre"], mark.arrays["whitening"])
    features, known = [], []
    said: dict[str, list[NDArray[Any]]] = {name: [] for name in suspects}
    for view in range(max(reading.views for reading in readings)):
        most = max(reading.count for reading in readings if reading.views > view)
        rows = _inputs(mark, viewed(probes[:most], view))
        features.append(whitening(features_of(base, [rows])))
        known.append(answers_of(controls, [rows], classes))
        for name, suspect in suspects.items():
            said[name].append(open_suspect(suspect).answer(rows, classes).values)
    found = []
    for reading in readings:
        count, views = reading.count, range(reading.views)
        there = [list(CONTROLS).index(each) for each in reading.controls]
        u = np.concatenate([features[view][:count] for view in views])
        answers = np.concatenate([known[view][there, :count] for view in views], axis=1)
        for name, scores in said.items():
            given = np.concatenate([scores[view][:count] for view in views])
            p = {
                kind: log10_p(mark, projected(unexplained(rest, answers), u, mark.arrays))
                for kind, rest in (("scores", told(given)), ("labels", told_by_labels(given.argmax(axis=1), classes)))
            }
            found.append({"network": name, **vars(reading), **p})
    return found


def log10_p(mark: Watermark, y: NDArray[np.float64]) -> float:
    """What y [T] proves."""
    test = mark.preset.test(mark, mark.total, sequential=False)
    test.add(*looks_of_bits(y, [mark.symbols]))
    return test.log10_p


def _inputs(mark: Watermark, levels: Levels) -> dict[str, NDArray[np.float32]]:
    (given,) = mark.parameters["inputs"]
    return {given["name"]: to_input(levels, mark.parameters["value_range"])}


def _classes(mark: Watermark) -> int:
    return int(mark.parameters["num_classes"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each reading, of each network log10 p of all seeds, from scores and from labels."""
    lines = [f"| pool | probes | views | controls | {' | '.join(READ)} |", "|---" * (4 + len(READ)) + "|"]
    for reading in READINGS:
        against = ", ".join(CONTROLS[each] for each in reading.controls)
        shown = [reading.pool, f"{reading.count:,}", str(reading.views), against]
        for name in READ:
            same = [row for row in rows if {"network": name, **vars(reading)}.items() <= row.items()]
            shown.append(", ".join(f"{row['scores']:.1f} / {row['labels']:.1f}" for row in same))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def keep(file: Path, rows: Sequence[Found]) -> None:
    """Put rows in the place of those of the same seeds."""
    measured = {row["seed"] for row in rows}
    others = [row for row in kept(file) if row["seed"] not in measured]
    parquet.write_table(pyarrow.Table.from_pylist(sorted([*others, *rows], key=lambda row: row["seed"])), file)


def kept(file: Path) -> list[Found]:
    """What was measured before."""
    return parquet.read_table(file).to_pylist() if file.exists() else []


if __name__ == "__main__":
    data, *numbers = sys.argv[1:]
    measured = measure(CIFAR10, Path(data), [int(number) for number in numbers] or SEEDS, OUT)
    keep(OUT / FILE, measured)
    print(table(measured))
