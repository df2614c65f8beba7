"""One run of the benchmarks, for `python -m benchmarks` and `wmengine bench` alike: measure, write, report."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment, publish, results


@dataclass(frozen=True)
class Report:
    """What a run has written: its result files' folder, their contents, and the seconds it took."""

    out: Path
    results: list[results.Result]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out), "seconds": round(self.seconds, 1), "results": self.results}

    def text(self) -> str:
        """For the terminal: a line a case."""
        lines = [publish.summary(result) for result in self.results]
        return "\n".join([*lines, f"{self.seconds:.0f} s altogether; results in {self.out}"])


def run(
    operators: Sequence[str] = (),
    *,
    quick: bool = False,
    out: Path | None = None,
    device: str = "auto",
    threads: int = 2,
) -> Report:
    """Measure the operators (all of results.ORDER where none is named) and write a result file for each into `out`.

    Without `out`, results go to benchmarks/results, and the tables and pictures of README and docs are generated from
    them; a quick run's go to a new temporary folder. Progress goes to stderr where that is a terminal. ValueError for
    an unknown operator or device, and where a benchmark fails; pytest's account of it is on stderr then. After
    KeyboardInterrupt the operators measured so far have their result files.
    """
    unknown = sorted(set(operators) - set(results.ORDER))
    if unknown:
        raise ValueError(f"unknown operator {unknown[0]!r}: known are {', '.join(results.ORDER)}")
    if threads < 1:
        raise ValueError(f"threads is {threads}: expected 1 or more")
    environment.choose_device(device)
    out = out or (Path(tempfile.mkdtemp(prefix="benchmarks-")) if quick else results.DIRECTORY)
    here = Path(__file__).parent
    files = [str(here / f"bench_{name}.py") for name in results.ORDER if name in operators or not operators]
    switches = ["--benchmark-only", "--benchmark-quiet", "--no-header", "-pno:cacheprovider"]
    switches += [f"--rootdir={environment.ROOT}", "-ofaulthandler_timeout=0"]  # which is for tests
    switches += [f"--device={device}", f"--threads={threads}", f"--out={out}", *(["--quick"] if quick else [])]
    started = time.time()
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = pytest.main([*files, *switches])
    if status != pytest.ExitCode.OK:
        if isinstance(shown, io.StringIO):
            print(shown.getvalue(), file=sys.stderr)
        if status == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        raise ValueError("a benchmark failed, as told above; its operator's results were not written")
    if out == results.DIRECTORY:
        publish.publish()
    written = [path for path in sorted(out.glob("*.json")) if path.stat().st_mtime >= started]
    return Report(out, [json.loads(path.read_text()) for path in written], time.time() - started)
