"""`wmengine bench`."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption
from wmengine.cli.output import print_json


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="OPERATOR", help="Which operators to measure; all unless told.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, under a minute: does everything run?")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where result files go (benchmarks/results, with new tables and plots; with --quick a temporary one).",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", help="CPU threads, for torch and wmengine alike.")] = 2,
    as_json: JsonOption = False,
) -> int:
    """Measure every operator beside its floor and its peers. Needs a checkout: benchmarks are not installed."""
    runner = _benchmarks()
    report = runner.run(operators or (), quick=quick, out=out, device=device, threads=threads)
    if as_json:
        print_json(report.to_json())
    else:
        print(report.text())
    return 0


def _benchmarks() -> Any:
    """benchmarks.runner of the checkout that this package is installed from, or else of the current folder."""
    for root in (Path(__file__).resolve().parent.parent.parent, Path.cwd()):
        if (root / "benchmarks" / "runner.py").is_file() and (root / "wmengine" / "presets.py").is_file():
            sys.path.insert(0, str(root))
            try:
                return importlib.import_module("benchmarks.runner")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("benchmarks"):
                    raise
                raise ImportError(f"{error.name} is not installed: pip install -e '.[bench]' in {root}") from error
    raise ValueError(
        "the benchmarks are not part of the installed package: clone wmengine's repository and run this in the clone"
    )
