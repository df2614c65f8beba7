"""`python -m benchmarks`: run every benchmark, write result files, generate the tables and plots of README and docs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import runner, tables


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where everything ran, 2 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"some of {', '.join(tables.ORDER)} (all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, kept out of the tables")
    parser.add_argument("--out", type=Path, help="directory of the result files (benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="measure nothing: only generate tables and plots again")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch and wmengine alike")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    if options.readme:
        for path in runner.publish():
            print(f"wrote {path.name}")
        return 0
    try:
        report = runner.run(
            options.operators,
            quick=options.quick,
            out=options.out,
            device=options.device,
            threads=options.threads,
        )
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report.to_json()) if options.json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
