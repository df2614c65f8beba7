"""What `match_counts` gives in a real scan: the same scan with 1, 10 and 1,000 marks, and with NumPy in its place.

    python -m benchmarks.scan_marks

Small networks in sandboxes, the sequential test; interleaved rounds in one process, medians. Two minutes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.bench_scan import CLASSES, SHAPE, save_network
from benchmarks.environment import describe
from wmengine import ops
from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.ops.reference import MOST_LEVEL, MatchCounts, standard_levels
from wmengine.parts.base import Task
from wmengine.scanning.scanner import scan
from wmengine.suspects.base import InputSpec

MARKS, SUSPECTS, ROUNDS = (1, 10, 1000), {1: 12, 10: 12, 1000: 1}, 3
OUT = Path(__file__).with_name("results") / "statistics" / "scan_marks.json"


def by_numpy(outputs: Any, expected: Any, group: Any = None, groups: int = 1, *, levels: bool = False) -> MatchCounts:
    """The same numbers, an array operation after the other."""
    rows = np.arange(len(outputs))
    scores = np.asarray(outputs, np.float64)
    level = standard_levels(scores)
    predicted = scores.argmax(axis=1).astype(np.int32)
    histogram = np.zeros((len(rows), 2 * MOST_LEVEL + 1), np.uint32)
    np.add.at(histogram, (rows[:, None], level.astype(np.int64) + MOST_LEVEL), 1)
    of = np.zeros(len(rows), np.int64) if group is None else group
    hits = np.bincount(of[predicted == expected], minlength=groups).astype(np.int32)
    none = np.zeros(groups, np.int32)
    return MatchCounts(predicted, level[rows, expected], histogram, hits, none, level if levels else None)


def main() -> None:
    preset = scheme("adi", count=100)
    task = Task({"input": InputSpec(tuple(SHAPE), "float32")}, num_classes=CLASSES, value_range=[(-1.0, 1.0)])
    key = Key("benchmark", bytes(range(32)))
    marks = [Watermark.create(key, preset, preset.describe(task, f"mark {number}")) for number in range(max(MARKS))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.onnx" for number in range(max(SUSPECTS.values()))]
        for number, file in enumerate(files):
            save_network(file, number, np.zeros((1, *SHAPE), np.float32), None)
        for count in MARKS:
            seconds: dict[str, list[float]] = {"match_counts": [], "numpy": []}
            spent: dict[str, list[float]] = {"match_counts": [], "numpy": []}
            for _ in range(ROUNDS):
                for name, function in {"match_counts": ops.match_counts, "numpy": by_numpy}.items():
                    inside = [0.0]

                    def timed(*given: Any, _run: Any = function, _in: Any = inside, **options: Any) -> MatchCounts:
                        began = time.thread_time()
                        found: MatchCounts = _run(*given, **options)
                        _in[0] += time.thread_time() - began
                        return found

                    with mock.patch.object(ops, "match_counts", timed):
                        began = time.perf_counter()
                        scan(files[: SUSPECTS[count]], marks[:count])
                        seconds[name].append(time.perf_counter() - began)
                    spent[name].append(inside[0])
            row: dict[str, Any] = {"marks": count, "suspects": SUSPECTS[count], "rounds": ROUNDS}
            for name in seconds:
                row[f"{name}_scan_s"] = round(statistics.median(seconds[name]), 4)
                row[f"{name}_counting_s"] = round(statistics.median(spent[name]), 5)
            rows.append(row)
            print(json.dumps(row), flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"format": "wmengine-scan-marks/1", "environment": describe("cpu", 2)})
    lines = ",\n".join(map(json.dumps, rows))
    OUT.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
