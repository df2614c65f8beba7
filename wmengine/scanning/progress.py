"""What a scan shows while it runs: a bar on a terminal's stderr, rows as JSON lines on stdout, a summary at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from wmengine.errors import ScanError, printable
from wmengine.scanning.results import DECISIONS
from wmengine.scanning.schema import EMPTY, OTHERS

NAMED = 10  # suspects with an error


class Report:
    """What is said while suspects are judged. Use as a context around the scan, and `summarise` afterwards."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._judged = 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Report:
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task("scanning", total=None, speed="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, done: int, total: int, rows: list[dict[str, Any]]) -> None:
        """One more suspect is done. Raises ScanError where nobody reads the rows any more."""
        self._judged += len({row["suspect"] for row in rows})
        if self._as_json:
            try:
                for row in rows:
                    print(json.dumps(row), flush=True)
            except BrokenPipeError:
                raise ScanError(
                    "nobody reads the rows any more: the scan stopped, and the same command resumes"
                ) from None
        if self._bar is not None:
            speed = self._judged / max(1e-9, time.monotonic() - self._started)
            self._bar.update(self._task, completed=done, total=total, speed=f"{speed:.1f} suspects/s")

    def summarise(self, table: Any, out: str | os.PathLike[str]) -> None:
        """The counts by decision, what is owned, and where the table is: of the whole scan, however often resumed."""
        seconds = time.monotonic() - self._started
        decisions = table.column("decision").to_pylist()
        counts = {name: decisions.count(name) for name in DECISIONS}
        names = table.column("suspect").to_pylist()
        suspects = len(set(names))
        resumed = suspects - self._judged
        empty, others = (int((table.schema.metadata or {}).get(name.encode(), 0)) for name in (EMPTY, OTHERS))
        if self._as_json:
            print(
                json.dumps(
                    {"suspects": suspects, "resumed": resumed, "empty": empty, "others": others, "seconds": seconds}
                    | counts
                    | {"out": os.fspath(out)}
                )
            )
            return
        for place in (place for place, decision in enumerate(decisions) if decision == "owned"):
            (row,) = table.slice(place, 1).to_pylist()
            mark, log10_p = f"{row['watermark']} ({row['scheme']})", row["log10_p_corrected"]
            print(f"{printable(row['suspect'])}: owned, {mark}, log10 p {log10_p:.2f}")
        said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        failed: dict[str, str] = {}
        for name, error in zip(names, table.column("error").to_pylist(), strict=True):
            if error is not None:
                failed.setdefault(name, error)
        for error in list(failed.values())[:NAMED]:
            print(printable(error))
        if len(failed) > NAMED:
            print(f"… and {_counted(len(failed) - NAMED, 'suspect')} more with an error")
        before = f", {_counted(resumed, 'suspect')} before it was interrupted" if resumed else ""
        print(
            f"{_counted(suspects, 'suspect')}, {_counted(len(names), 'pair')} in {seconds:.1f} s{before}: {said}; "
            f"{_counted(len(failed), 'suspect')} could not be judged"
        )
        for left_out, what in ((empty, "empty file"), (others, "other file")):
            if left_out:
                print(f"{_counted(left_out, what)} {'was' if left_out == 1 else 'were'} left out")
        or_error = ", or its error" if failed else ""
        print(f"{out}: every pair with its p-value, paid for all pairs of the scan{or_error}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True))
