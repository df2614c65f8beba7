"""What a scan shows while it runs: a bar on a terminal's stderr, rows as JSON lines on stdout, a summary at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

from wmengine.errors import printable


class Report:
    """Counts rows as they are done. Use as a context around the scan, and `summarise` afterwards."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._decisions: Counter[str] = Counter()
        self._owned: list[dict[str, Any]] = []
        self._errors: Counter[str] = Counter()
        self._suspects = 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Report:
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task("scanning", total=None, speed="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, done: int, total: int, rows: list[dict[str, Any]]) -> None:
        """One more suspect is done."""
        self._suspects += 1
        for row in rows:
            self._decisions[row["decision"]] += 1
            if row["decision"] == "owned":
                self._owned.append(row)
            if row["error"] is not None:
                self._errors[row["suspect"]] += 1
            if self._as_json:
                print(json.dumps({name: value for name, value in row.items() if name != "log10_e"}), flush=True)
        if self._bar is not None:
            speed = self._suspects / max(1e-9, time.monotonic() - self._started)
            self._bar.update(self._task, completed=done, total=total, speed=f"{speed:.1f} suspects/s")

    def summarise(self, out: str | os.PathLike[str]) -> None:
        """The counts by decision, what is owned, and where the table is."""
        seconds = time.monotonic() - self._started
        counts = {name: self._decisions[name] for name in ("owned", "not_proven", "error")}
        if self._as_json:
            print(json.dumps({"suspects": self._suspects, "seconds": seconds, **counts, "out": os.fspath(out)}))
            return
        for row in self._owned:
            mark, log10_p = f"{row['watermark']} ({row['scheme']})", row["log10_p_corrected"]
            print(f"{printable(row['suspect'])}: owned, {mark}, log10 p {log10_p:.2f}")
        said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        print(f"{self._suspects} suspects in {seconds:.1f} s: {said}; {len(self._errors)} could not be judged")
        print(f"{out}: every pair with its p-value, paid for all pairs of the scan")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True))
