"""`wmengine bench`."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption
from wmengine.cli.output import print_json


class _Bench(TyperGroup):
    """`bench` measures operators, which need no word of their own, unless another of its commands is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["operators", *args])


benches = typer.Typer(cls=_Bench, rich_markup_mode=None)
app.add_typer(benches, name="bench", help="Measure operators, or, with `bench robustness`, what marks survive.")


@benches.command()
def operators(
    names: Annotated[
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
    """Measure every operator beside its floor and its peers. Needs a checkout: benchmarks are not installed.

    `wmengine bench robustness` measures what attacks leave of marks.
    """
    runner = _benchmarks("runner")
    report = runner.run(names or (), quick=quick, out=out, device=device, threads=threads)
    if as_json:
        print_json(report.to_json())
    else:
        print(report.text())
    return 0


@benches.command()
def robustness(
    problems: Annotated[
        str | None,
        typer.Option("--problem", metavar="NAME,…", help="digits, digits-tokens, cifar10, letters or intents; all."),
    ] = None,
    presets: Annotated[str | None, typer.Option("--presets", metavar="NAME,…", help="Which schemes; all.")] = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", metavar="NAME,…", help="Which lines of the table: ftal, 'prune*'; all.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,…", help="Which seeds.")] = "1,2,3",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", envvar="WMENGINE_DATA", help="Where the data of cifar10, letters and intents are."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where rows go (benchmarks/results/robustness).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where networks train: auto, cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", help="CPU threads.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure cells anew that are there.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Measure nothing: say which cells there are.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write tables and pictures of docs/ from all rows there are.")
    ] = False,
) -> int:
    """Attack marked networks and write a row for each cell: preset × attack × seed × task. Needs a checkout.

    Rows are kept as they come; after an interruption the same command goes on with the cells that are missing.
    """
    command = _benchmarks("robustness.command")
    asked = command.wanted(_names(problems), _names(presets), _names(attacks), _names(seeds))
    failed: list[str] = []
    if listed:
        print(command.listing(asked, out))
    else:
        failed = command.measure(asked, data=data, out=out, device=device, threads=threads, again=again)
    if publish:
        command.publish(out)
    if failed:
        raise ValueError(f"{len(failed)} of it could not be measured, first {failed[0]}")
    return 0


def _names(given: str | None) -> list[str] | None:
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def _benchmarks(module: str) -> Any:
    """A module of the benchmarks of the checkout that this package is installed from, or else of the current folder."""
    for root in (Path(__file__).resolve().parent.parent.parent, Path.cwd()):
        if (root / "benchmarks" / "runner.py").is_file() and (root / "wmengine" / "presets.py").is_file():
            sys.path.insert(0, str(root))
            try:
                return importlib.import_module(f"benchmarks.{module}")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("benchmarks"):
                    raise
                raise ImportError(f"{error.name} is not installed: pip install -e '.[bench]' in {root}") from error
    raise ValueError(
        "the benchmarks are not part of the installed package: clone wmengine's repository and run this in the clone"
    )
