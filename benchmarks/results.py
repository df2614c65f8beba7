"""Result files: one JSON file a device and operator, a line a row, written by a run and read for the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

FORMAT = "wmengine-benchmark/2"
DIRECTORY = ROOT / "benchmarks" / "results"
ORDER = (
    *("sketch", "project", "embedding_loss", "cross_entropy", "soft_nearest_neighbor"),
    *(
        "match_counts",
        "label_matches",
        "bit_matches",
        "training_step",
        "scheme_step",
        "resnet_step",
        "response",
        "scan",
    ),
)

Result = dict[str, Any]
Row = dict[str, Any]


def step_name(scheme: str) -> str:
    """What the row of a scheme's training step on the digits is called."""
    return f"training step of the demo's network with {scheme}"


def write(
    directory: Path, operator: str, quick: bool, environment: dict[str, Any], roofs: dict[str, float], rows: list[Row]
) -> Path:
    """Write `<device>-<operator>.json` and return its path."""
    head = {"format": FORMAT, "operator": operator, "quick": quick, "environment": environment, "roofs": roofs}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{environment['slug']}-{operator}.json"
    path.write_text(f'{text},\n "rows": [\n{lines}\n]\n}}\n')
    return path


def load(directory: Path = DIRECTORY) -> list[Result]:
    """All result files of a directory, CPU first, operators in ORDER.

    ValueError for a file of another format and for a quick run's: its sizes say nothing about the engine.
    """
    results = [(path, json.loads(path.read_text())) for path in directory.glob("*.json")]
    for path, result in results:
        if result.get("format") != FORMAT or result["quick"]:
            raise ValueError(f"{path.name} has another format or is of a quick run: measure it with `wmengine bench`")

    def place(result: Result) -> tuple[bool, str, int]:
        slug = result["environment"]["slug"]
        return not slug.startswith("cpu"), slug, ORDER.index(result["operator"])

    return sorted((result for _, result in results), key=place)
