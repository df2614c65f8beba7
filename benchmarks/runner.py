"""One run of the benchmarks, for `python -m benchmarks` and `wmengine bench` alike: measure, write, report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest

from benchmarks import environment, plots, tables

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Report:
    """What a run has written: its result files' folder, their contents, and the seconds it took."""

    out: Path
    results: list[tables.Result]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out), "seconds": round(self.seconds, 1), "results": self.results}

    def text(self) -> str:
        """For the terminal: a line a case, and what each operator took."""
        lines = [tables.summary(result) for result in self.results]
        return "\n".join([*lines, f"{self.seconds:.0f} s altogether; results in {self.out}"])


class Progress:
    """A pytest plugin that keeps one line on a terminal up to date with the case that is being measured."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.total, self.done = stream, 0, 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.done += 1
        case = nodeid.rpartition("/")[2].replace("bench_", "").replace(".py::test_", ": ")
        self.stream.write(f"\r\x1b[K{self.done}/{self.total}  {case}"[:110])
        self.stream.flush()

    def pytest_sessionfinish(self) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()


def run(
    operators: Sequence[str] = (),
    *,
    quick: bool = False,
    out: Path | None = None,
    device: str = "auto",
    threads: int = 2,
) -> Report:
    """Measure the operators (all of tables.ORDER where none is named) and write a result file for each into `out`.

    Without `out`, results go to benchmarks/results, and the tables and plots of README and docs are generated from
    them; a quick run's go to a new temporary folder. Progress goes to stderr where that is a terminal. ValueError for
    an unknown operator or device, and where a benchmark fails; pytest's account of it is on stderr then. After
    KeyboardInterrupt the operators measured so far have their result files.
    """
    unknown = sorted(set(operators) - set(tables.ORDER))
    if unknown:
        raise ValueError(f"unknown operator {unknown[0]!r}: known are {', '.join(tables.ORDER)}")
    if threads < 1:
        raise ValueError(f"threads is {threads}: expected 1 or more")
    environment.choose_device(device)
    out = out or (Path(tempfile.mkdtemp(prefix="benchmarks-")) if quick else tables.RESULTS)
    names = [name for name in tables.ORDER if name in operators or not operators]
    files = [str(HERE / f"bench_{name}.py") for name in names]
    switches = [
        "--benchmark-only",
        "--benchmark-quiet",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={environment.ROOT}",
    ]
    switches += [f"--device={device}", f"--threads={threads}", f"--out={out}", *(["--quick"] if quick else [])]
    started = time.time()
    printed = io.StringIO()
    with _progress() as plugins, contextlib.redirect_stdout(printed):
        status = pytest.main([*files, *switches], plugins=plugins)
    if status != pytest.ExitCode.OK:
        print(printed.getvalue(), file=sys.stderr)
        if status == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        raise ValueError("a benchmark failed, as told above; its operator's results were not written")
    written = [path for path in sorted(out.glob("*.json")) if path.stat().st_mtime >= started]
    if out == tables.RESULTS:
        publish()
    return Report(out, [json.loads(path.read_text()) for path in written], time.time() - started)


def publish() -> list[Path]:
    """Generate the tables of README and docs and the plots from the committed results; what was written."""
    results = tables.load()
    pictures = plots.pictures(results)
    texts = tables.documents(results)
    for path, text in {**pictures, **texts}.items():
        path.write_text(text)
    return [*pictures, *texts]


@contextlib.contextmanager
def _progress() -> Iterator[list[object]]:
    """The plugins to give to pytest: none unless stderr is a terminal. pytest captures stderr, so a copy is kept."""
    if not sys.stderr.isatty():
        yield []
        return
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as stream:
        yield [Progress(stream)]
