"""How many questions a service that names classes alone is asked: `verify(test="sequential")` of labels, of networks
marked by `response`, of copies, and of a stranger.

python -m benchmarks.robustness.questions DATA [SEED …]

Nothing is trained for it but what `python -m benchmarks.robustness --problem cifar10 --presets response` trains.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.robustness.grid import SEEDS
from benchmarks.robustness.problems import CIFAR10, Problem
from benchmarks.robustness.readings import OUT, READ, Found, keep, networks_of
from wmengine.judging.verification import verify

FILE = "questions.parquet"


def measure(problem: Problem, folder: Path | None, seeds: Sequence[int], out: Path) -> list[Found]:
    """A row for each seed and network: the decision, after how many questions, and log10 p."""
    rows = []
    for seed, name, mark, network in networks_of(problem, folder, seeds, out):
        found = verify(_labels_of(network), mark, test="sequential")
        row = {"seed": seed, "network": name, "pool": mark.parameters["pool"] * mark.parameters["views"]}
        rows.append(row | {"decision": found.decision, "queries": found.queries, "log10_p": found.log10_p})
        print(f"seed {seed}, {name}: {found.decision} after {found.queries}", file=sys.stderr, flush=True)
    return rows


def _labels_of(network: torch.nn.Module) -> Any:
    def named(inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(inputs)).argmax(dim=1))

    return named


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: of each network how many questions were asked, and log10 p, seed by seed."""
    lines = ["| network | decision | questions | log10 p |", "|---|---|---|---|"]
    for name in READ:
        own = [row for row in rows if row["network"] == name]
        said = [row["decision"].replace("_", " ") for row in own]
        said = said[:1] if len(set(said)) == 1 else said
        asked = ", ".join(f"{row['queries']:,}" for row in own)
        read = ", ".join(f"{row['log10_p']:.1f}".replace("-0.0", "0.0") for row in own)
        lines.append(f"| {name} | {', '.join(said)} | {asked} | {read} |")
    return "\n".join(lines)


if __name__ == "__main__":
    data, *numbers = sys.argv[1:]
    measured = measure(CIFAR10, Path(data), [int(number) for number in numbers] or SEEDS, OUT)
    keep(OUT / FILE, measured)
    print(table(measured))
