"""`python -m benchmarks`: run every benchmark, write the result files, and generate the tables of README and docs."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import tables

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Exit status of pytest, 0 where everything ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"some of {', '.join(tables.ORDER)} (all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, kept out of the tables")
    parser.add_argument("--out", type=Path, help="directory of the result files (benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="measure nothing: only generate the tables again")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch and wmengine alike")
    options = parser.parse_args(arguments)
    if options.readme:
        write_tables()
        return 0
    unknown = sorted(set(options.operators) - set(tables.ORDER))
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}: known are {', '.join(tables.ORDER)}")
    out = options.out or (Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.quick else tables.RESULTS)
    files = [str(HERE / f"bench_{name}.py") for name in options.operators or tables.ORDER]
    switches = ["--benchmark-only", "--benchmark-columns=median,iqr,rounds,iterations", "-q", "-p", "no:cacheprovider"]
    switches += ["--device", options.device, "--threads", str(options.threads), "--out", str(out)]
    started = time.time()
    status = int(pytest.main([*files, *switches, *(["--quick"] if options.quick else [])]))
    for path in sorted(out.glob("*.json")):
        if path.stat().st_mtime >= started:
            print(tables.summary(json.loads(path.read_text())))
    print(f"results in {out}")
    if status == 0 and out == tables.RESULTS:
        write_tables()
    return status


def write_tables() -> None:
    """Put the generated tables between their markers in README.md and docs/performance.md."""
    for path, text in tables.documents(tables.load()).items():
        path.write_text(text)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    sys.exit(main())
