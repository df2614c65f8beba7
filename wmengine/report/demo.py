"""The demo's result: the table that is printed, the same as JSON, and the page that shows it with its pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wmengine._version import __version__
from wmengine.judging.verdict import Verdict
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.tails import threshold
from wmengine.report import html, pictures

Kind = Literal["copy", "student", "stranger"]


@dataclass(frozen=True)
class Row:
    """One model of the table: what it is, its file, its test accuracy in [0, 1], and what each mark says of it.

    kind: a copy of the marked network, a student that learned from its answers, or a stranger.
    """

    model: str
    made: str
    file: str
    kind: Kind
    accuracy: float
    white_box: Verdict
    black_box: Verdict


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where it wrote it.

    accuracy_cost: (difference, low, high), the unmarked network's test accuracy less the marked one's, in [-1, 1],
    with its paired 95 % interval. others: (white-box, black-box) matches of other keys' marks on the marked network.
    """

    rows: tuple[Row, ...]
    accuracy_cost: tuple[float, float, float]
    others: tuple[tuple[int, int], ...]
    training_images: int
    thief_images: int
    test_images: int
    seconds: float
    report: Path
    table: Path

    @property
    def proven(self) -> bool:
        """Both marks prove every copy, and neither claims the independent network."""
        return all(
            verdict.owned == (row.kind == "copy")
            for row in self.rows
            if row.kind != "student"
            for verdict in (row.white_box, row.black_box)
        )

    def to_json(self) -> dict[str, Any]:
        """The table as JSON: one object per model, with both verdicts under the names of `Verdict.to_json`."""
        rows = [
            {
                "model": row.model,
                "file": row.file,
                "kind": row.kind,
                "test_accuracy": row.accuracy,
                "white_box": json.loads(row.white_box.to_json()),
                "black_box": json.loads(row.black_box.to_json()),
            }
            for row in self.rows
        ]
        difference, low, high = self.accuracy_cost
        return {
            "version": __version__,
            "rows": rows,
            "test_images": self.test_images,
            "accuracy_cost": {"difference": difference, "low": low, "high": high, "level": 0.95},
            "other_keys": [{"white_box": bits, "black_box": hits} for bits, hits in self.others],
            "seconds": self.seconds,
            "report": os.fspath(self.report),
        }


def print_table(result: DemoResult, file: IO[str] | None = None) -> None:
    """The table, the accuracy cost and where the report is, to stdout or another text file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=80)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("\nmodel", no_wrap=True)
    table.add_column("test\nright", justify="right")
    for kind in ("weights\nmatched", "answers\nmatched"):
        table.add_column(kind, justify="right")
        table.add_column("\nlog10 p", justify="right")
        table.add_column("\nverdict", no_wrap=True)
    for row in result.rows:
        cells = [f"[bold]{row.model}[/]" if row.kind == "copy" else row.model, html.percent(row.accuracy)]
        for verdict in (row.white_box, row.black_box):
            style = {"owned": "green", "error": "red"}.get(verdict.decision, "default")
            decision = f"[{style}]{html.DECISIONS[verdict.decision]}[/]"
            cells += [f"{verdict.matched}/{verdict.total}", html.log10_p(verdict.log10_p), decision]
        table.add_row(*cells)
    console.print(table)
    console.print()
    difference, low, high = (html.points(value) for value in result.accuracy_cost)
    console.print(f"Accuracy cost of both marks: {difference} points, 95 % interval {low} … {high}.", soft_wrap=True)
    said = "A student of the marked network's answers shares no weight with it: for that there is the scheme response."
    console.print(said, soft_wrap=True)
    console.print(f"Report: {result.report}   table: {result.table}   {result.seconds:.0f} s", soft_wrap=True)


def page(
    result: DemoResult, marks: Sequence[Watermark], digits: NDArray[np.float32], digit_labels: NDArray[np.int64]
) -> str:
    """The HTML page. marks: the white-box one, then the black-box one; digits [n, 1, 8, 8]: some that were learned."""
    white_box, black_box = marks
    panels = [
        _panel("white-box: bits in the weights", white_box, [(row, row.white_box) for row in result.rows], 0, result),
        _panel("black-box: labels of triggers", black_box, [(row, row.black_box) for row in result.rows], 1, result),
    ]
    triggers, labels = black_box.arrays["triggers"], black_box.arrays["labels"]
    return html.render(
        "demo.html.j2",
        result=result,
        alpha=result.rows[0].white_box.alpha,
        version=__version__,
        white_box=white_box,
        black_box=black_box,
        panels=panels,
        classes=black_box.parameters["num_classes"],
        digit_count=len(digits),
        match_rates=html.data_uri(pictures.svg(pictures.match_rates(panels)), "image/svg+xml"),
        triggers=html.data_uri(pictures.png(pictures.image_sheet(triggers, list(labels))), "image/png"),
        digits=html.data_uri(pictures.png(pictures.image_sheet(digits, list(digit_labels))), "image/png"),
    )


def _panel(
    title: str, mark: Watermark, judged: list[tuple[Row, Verdict]], kind: int, result: DemoResult
) -> pictures.MatchRates:
    chance = mark.preset.chance(mark.parameters)
    # Where a file leaves open how to read it, the way that the mark recorded has a share of the evidence only.
    paid = [verdict.evidence.log10_share for _, verdict in judged if verdict.owned and verdict.evidence is not None]
    return pictures.MatchRates(
        title=title,
        total=mark.total,
        chance=chance,
        threshold=threshold(mark.total, chance, math.log10(judged[0][1].alpha) + min(paid, default=0.0)),
        suspects=[(row.model, verdict.matched, verdict.decision) for row, verdict in judged],
        others=[matched[kind] for matched in result.others],
    )
