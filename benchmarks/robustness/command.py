"""What `wmengine bench robustness` does: list the cells that are asked for, or measure and publish them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import choose_device, use_threads
from benchmarks.robustness import cells, tables
from benchmarks.robustness.grid import STRANGER_SEEDS, Cell, cells_of, chosen
from benchmarks.robustness.problems import PROBLEMS
from benchmarks.robustness.runner import fill

Names = Sequence[str] | None


def wanted(
    problems: Names = None, presets: Names = None, attacks: Names = None, seeds: Sequence[str] = ("1", "2", "3")
) -> dict[str, list[Cell]]:
    """The cells that are asked for, by problem; None asks for all. ValueError for a name or a seed that is none."""
    known = dict.fromkeys(each for problem in PROBLEMS.values() for each in (*problem.presets, *problem.variants))
    for what, given, there in (("problem", problems, PROBLEMS), ("preset", presets, known)):
        for name in given or ():
            if name not in there:
                raise ValueError(f"the table has no {what} {name!r}: it has {', '.join(there)}")
    if not all(seed.isdigit() and int(seed) < STRANGER_SEEDS for seed in seeds):
        said = f"seeds are whole numbers under {STRANGER_SEEDS}, such as 1,2,3"
        raise ValueError(f"{said}, and these are {','.join(seeds)}")
    numbers, lines = [int(seed) for seed in seeds], chosen(attacks)
    return {
        name: cells_of(
            each,
            [preset for preset in (*each.presets, *each.variants) if presets is None or preset in presets],
            numbers,
            lines,
        )
        for name, each in PROBLEMS.items()
        if problems is None or name in problems
    }


def listing(asked: dict[str, list[Cell]], out: Path | None = None) -> str:
    """A line for each problem, preset and attack: its seeds, those that are missing in parentheses."""
    said = []
    for name, every in asked.items():
        done = cells.read(out or tables.OUT, name)
        said.append(f"{name}: {len(every)} cells, {sum(cell.key not in done for cell in every)} missing")
        seeds: dict[tuple[str, str], list[str]] = {}
        for cell in every:
            shown = f"{cell.seed}" if cell.key in done else f"({cell.seed})"
            seeds.setdefault((cell.preset, cell.line.label), []).append(shown)
        said += [f"  {preset:<12} {label:<28} {' '.join(each)}" for (preset, label), each in seeds.items()]
    return "\n".join(said)


def measure(
    asked: dict[str, list[Cell]],
    *,
    data: Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    again: bool = False,
) -> list[str]:
    """Measure what is missing of the cells, and say what could not be, a sentence each."""
    device = choose_device(device)
    use_threads(threads)
    failed: list[str] = []
    for name, every in asked.items():
        try:
            rows = PROBLEMS[name].load(data)
        except ValueError as error:  # its data are not there
            failed.append(str(error))
        else:
            failed += fill(PROBLEMS[name], rows, every, out or tables.OUT, device=device, again=again)
    return failed


def publish(out: Path | None = None) -> None:
    """Gather the rows and write pages and pictures from them."""
    tables.publish(out or tables.OUT)
