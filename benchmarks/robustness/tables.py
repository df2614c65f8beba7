"""The published pages: tables and pictures that are generated from rows, never typed."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import plots, results
from benchmarks.environment import ROOT
from benchmarks.robustness import cells, components, questions, readings
from benchmarks.robustness.cells import Row
from benchmarks.robustness.grid import (
    LINES,
    MARKED,
    SEEDS,
    SERVED_LINES,
    TWIN,
    TWIN_LINE,
    UNMARKED,
    Cell,
    Line,
    cells_of,
    possible,
)
from benchmarks.robustness.problems import CIFAR10, DIGITS, INTENTS, LETTERS, PROBLEMS, Problem
from benchmarks.robustness.rules import MOST_LOSS, PROVEN, outcome, sok_success, sok_threshold

OUT = readings.OUT
NOT_RUN = "not run"
PAGES = {
    "robustness": ROOT / "docs" / "robustness.md",
    "statistics": ROOT / "docs" / "schemes.md",
    "response": ROOT / "docs" / "response.md",
    "settings": ROOT / "docs" / "response.md",
    "law": ROOT / "docs" / "response.md",
    "readings": ROOT / "docs" / "response.md",
    "questions": ROOT / "docs" / "response.md",
    "components": ROOT / "docs" / "response.md",
    "letters": ROOT / "docs" / "response.md",
    "intents": ROOT / "docs" / "response.md",
}
# The copies from which docs/schemes.md tells what each statistic is worth, and the marks that it tells it of.
COMPARED = (
    "untouched",
    *(f"ftal 30 epochs rate {rate}" for rate in ("0.001", "0.003", "0.01", "0.03")),
    *(f"prune {share}%" for share in (50, 80, 90, 95)),
    *(f"noise {sigma}" for sigma in ("0.2", "0.5", "1")),
    *("distil T=1", "stranger 1"),
)
COMPARED_READINGS = (
    ("sketch", "weights", "log10_p_soft"),
    ("uchida", "weights", "log10_p_soft"),
    ("adi", "scores", "log10_p_soft"),
    ("adi", "labels", "log10_p_labels_soft"),
)

Found = Mapping[str, Row]


def steps_over_plain(measured: Sequence[results.Result], presets: Iterable[str]) -> dict[str, float]:
    """How long a training step on the digits takes with each preset, over a plain one, where that was measured."""
    named = {results.step_name(preset): preset for preset in presets}
    rows = [row for one in measured if one["environment"]["slug"] == "cpu" for row in one["rows"]]
    return {named[row["what"]]: 1.0 / row["peers"][0]["ratio"]["median"] for row in rows if row["what"] in named}


def heading(problem: Problem, found: Found, steps: Mapping[str, float] | None = None) -> str:
    """What was measured, on what: the networks' accuracy and what the marks cost them, seed by seed; steps: their
    training steps over plain ones."""
    rows = _measured(problem, found)
    if not rows:
        return f"Nothing is measured yet: `python -m benchmarks.robustness --problem {problem.name} --publish`."
    lines = ["| network | symbols | accuracy, % | the mark costs, points [95 %] |", "|---|---|---|---|"]
    if steps:
        lines = [f"{lines[0]} step over plain |", f"{lines[1]}---|"]
    for preset in (UNMARKED, *problem.presets):
        line = TWIN_LINE if preset == UNMARKED else LINES[0]
        seeds = _seeds(problem, preset, line, found)
        accuracies = ", ".join(NOT_RUN if row is None else f"{100 * row.accuracy:.1f}" for row in seeds)
        costs = (
            ""
            if preset == UNMARKED
            else ", ".join(
                NOT_RUN
                if row is None or row.loss is None
                else f"{row.loss:.1f} [{row.loss_low:.1f}, {row.loss_high:.1f}]"
                for row in seeds
            )
        )
        symbols = next((str(row.total) for row in seeds if row is not None and row.total), "")
        name = "without a mark" if preset == UNMARKED else preset
        shown = [name, symbols, accuracies, costs]
        if steps:
            shown.append("" if preset == UNMARKED else f"{steps[preset]:.2f}" if preset in steps else NOT_RUN)
        lines.append(f"| {' | '.join(shown)} |")
    versions: dict[str, set[str]] = {}
    for said in {row.versions for row in rows}:
        for package, version in json.loads(said).items():
            versions.setdefault(package, set()).add(version)
    devices = ", ".join(sorted({f"{row.device} (threads: {row.threads})" for row in rows}))
    commits = ", ".join(sorted({each for row in rows for each in (row.commit, row.network_commit) if each}))
    named = ", ".join(f"{package} {' and '.join(sorted(versions[package]))}" for package in sorted(versions))
    measured = f"{problem.recipe}; {rows[0].tested} inputs test. Measured on {devices}; {named}; commit {commits}."
    return "\n".join([measured, "", *lines])


def groups_of(problem: Problem) -> dict[str, tuple[str, ...]]:
    """The presets that share a table, by its name: few all of them, many by where the mark lies; none where `response`
    is the only one, which has a page of its own."""
    if problem.presets == ("response",):
        return {}
    if len(problem.presets) < 10:
        return {"": problem.presets}
    kinds = {preset: problem.preset(preset).kind for preset in problem.presets}
    return {kind: tuple(each for each in kinds if kinds[each] == kind) for kind in ("white-box", "black-box")}


def table(problem: Problem, presets: Sequence[str], found: Found, lines: Sequence[Line] = LINES) -> str:
    """Markdown: a row for each attack, a column for each preset; what a cell shows stands in docs/robustness.md."""
    rows = [f"| attack | {' | '.join(presets)} |", "|---" * (1 + len(presets)) + "|"]
    thresholds = {preset: sok_threshold(_nulls(problem, preset, lines, found)) for preset in presets}
    for line, planned in _planned(problem, presets, lines):
        shown = (
            _shown(_seeds(problem, each, line, found), thresholds[each]) if each in planned else "" for each in presets
        )
        rows.append(f"| {line.label} | {' | '.join(shown)} |")
    if any(line.base != MARKED for line in lines):
        shown = (_strangers(_nulls(problem, each, lines, found)) for each in presets)
        rows.append(f"| models without the mark | {' | '.join(shown)} |")
    return "\n".join(rows)


def _planned(problem: Problem, presets: Sequence[str], lines: Sequence[Line]) -> list[tuple[Line, set[str]]]:
    """The attacks on marked networks, each with those of the presets that are measured on it."""
    lines_of = {preset: possible(problem, lines, preset) for preset in presets}
    every = [(line, {preset for preset in presets if line in lines_of[preset]}) for line in lines]
    return [(line, planned) for line, planned in every if planned and line.base == MARKED]


def statistics_table(found: Found, problem: Problem = DIGITS, lines: Sequence[Line] = LINES) -> str:
    """Markdown: for each copy and mark the log10 p of all seeds by each statistic, and by the half of both."""
    rows = ["| copy | mark, read from | matched | matches | soft | either |", "|---|---|---|---|---|---|"]
    for line in lines:
        for preset, read, column in COMPARED_READINGS if line.label in COMPARED else ():
            seeds = [row for row in _seeds(problem, preset, line, found) if row is not None]
            cell = [NOT_RUN] * 4
            if seeds:
                both = [(row.log10_p_matches, getattr(row, column)) for row in seeds]
                matched = " ".join(str(row.matched) for row in seeds)
                halves = [min(0.0, min(each) + math.log10(2.0)) for each in both]
                cell = [f"{matched} of {seeds[0].total}", *map(_numbers, (*zip(*both, strict=True), halves))]
            rows.append(f"| {line.label} | {preset}, {read} | {' | '.join(cell)} |")
    return "\n".join(rows)


def response_table(found: Found, problem: Problem = CIFAR10) -> str:
    """Markdown: of each copy of networks marked by `response` the accuracy, and log10 p from scores and from labels."""
    rows = ["| network | accuracy, % | points lost [95 %] | log10 p: scores / labels |", "|---|---|---|---|"]
    for line in possible(problem, (*LINES, *SERVED_LINES), "response"):
        seeds = [row for row in _seeds(problem, "response", line, found) if row is not None]
        if seeds:
            cells_of_row = [
                ", ".join(f"{100 * row.accuracy:.1f}" for row in seeds),
                ", ".join(_lost(row) for row in seeds),
                ", ".join(f"{row.log10_p:.1f} / {row.log10_p_labels_soft:.1f}" for row in seeds),
            ]
            missing = len(SEEDS) - len(seeds)
            rows.append(f"| {line.label} | {' | '.join(each + f', {NOT_RUN}' * missing for each in cells_of_row)} |")
    return "\n".join(rows)


def settings_table(found: Found, problem: Problem = CIFAR10) -> str:
    """Markdown: of `response` as it is and with other options what it costs, and log10 p of the network and its copies,
    from scores / from labels."""
    lines = possible(problem, LINES, problem.variants[0])
    rows = [f"| setting | accuracy, % | points lost [95 %] | {' | '.join(line.label for line in lines)} |"]
    rows.append("|---" * (3 + len(lines)) + "|")
    for name in ("response", *problem.variants):
        own = _seeds(problem, name, lines[0], found)
        right = (NOT_RUN if row is None else f"{100 * row.accuracy:.1f}" for row in own)
        costs = (NOT_RUN if row is None else _lost(row) for row in own)
        shown = [_setting(name), ", ".join(right), ", ".join(costs)]
        for line in lines:
            planned = line in possible(problem, LINES, name)
            seeds = _seeds(problem, name, line, found) if planned else []
            read = (NOT_RUN if row is None else f"{row.log10_p:.1f} / {row.log10_p_labels_soft:.1f}" for row in seeds)
            shown.append(", ".join(read))
        rows.append(f"| {' | '.join(shown)} |")
    return "\n".join(rows)


def law_table(found: Found, problem: Problem = CIFAR10) -> str:
    """Markdown: mean log10 p of tuned networks and copies at each setting, from scores / from labels, and what `by_law`
    makes of the same at the defaults, seed by seed."""
    lines = possible(problem, LINES, problem.variants[0])
    rows = [f"| setting | {' | '.join(line.label for line in lines)} |", "|---" * (1 + len(lines)) + "|"]
    of_defaults = problem.preset("response").options
    for name in problem.variants:
        if problem.tuned[name] != problem.tuned["response"] or name in problem.lessons:
            continue
        shown, options = [_setting(name)], problem.preset(name).options
        for line in lines:
            pairs = [
                pair
                for pair in zip(*(_seeds(problem, each, line, found) for each in ("response", name)), strict=True)
                if None not in pair
            ]
            read = []
            for column in ("log10_p", "log10_p_labels_soft") if pairs else ():
                before, after = ([getattr(pair[place], column) for pair in pairs] for place in (0, 1))
                told = statistics.fmean(by_law(log10_p, of_defaults, options, problem.classes) for log10_p in before)
                read.append(f"{statistics.fmean(after):.1f} ({told:.1f})")
            planned = line in possible(problem, LINES, name)
            shown.append(" / ".join(read) or NOT_RUN * planned)
        rows.append(f"| {' | '.join(shown)} |")
    return "\n".join(rows)


def by_law(log10_p: float, before: Mapping[str, Any], after: Mapping[str, Any], classes: int) -> float:
    """log10 p with other options of `response`, by -1 / (4.6 (n²/E + 1/T + 1/(D (C - 1)))), where the energy E of the
    pattern goes with the square of its strength and n² is the network's own."""

    def ways(options: Mapping[str, Any]) -> float:
        return 1.0 / options["bits"] + 1.0 / (options["features"] * (classes - 1))

    own = max(0.0, 1.0 / (4.6 * max(-log10_p, 1e-3)) - ways(before))
    return -1.0 / (4.6 * (own * (before["strength"] / after["strength"]) ** 2 + ways(after)))


def _setting(name: str) -> str:
    return name.removeprefix("response").strip() or "as it is"


def _lost(row: Row) -> str:
    return "" if row.loss is None else f"{row.loss:.1f} [{row.loss_low:.1f}, {row.loss_high:.1f}]"


def published(found: Mapping[str, Found], out: Path = OUT) -> dict[str, str]:
    """What stands between the marks of each page."""
    parts = []
    steps = {DIGITS.name: steps_over_plain(results.load(), DIGITS.presets)}
    for name, problem in PROBLEMS.items():
        if groups_of(problem):
            parts += [f"## {name}", "", heading(problem, found[name], steps.get(name)), ""]
        for group, presets in groups_of(problem).items() if found[name] else ():
            seen = f"Worst log10 p of three seeds for every attack and {group} mark on {name}".replace("  ", " ")
            parts += [f"### {name}, {group}", ""] if group else []
            parts += [table(problem, presets, found[name]), "", f"![{seen}]({picture_of(problem, group).name})", ""]
    return {
        "robustness": "\n".join(parts).strip(),
        "statistics": statistics_table(found[DIGITS.name]),
        "response": response_table(found[CIFAR10.name]),
        **{
            each.name: "\n\n".join([heading(each, own), response_table(own, each), settings_table(own, each)])
            for each, own in ((each, found[each.name]) for each in (LETTERS, INTENTS))
        },
        "settings": settings_table(found[CIFAR10.name]),
        "law": law_table(found[CIFAR10.name]),
        "readings": readings.table(readings.kept(out / readings.FILE)),
        "questions": questions.table(readings.kept(out / questions.FILE)),
        "components": components.table(readings.kept(out / components.FILE)),
    }


def publish(out: Path = OUT) -> None:
    """Gather the rows of OUT into a file for each problem, and write pages and pictures from them."""
    found = {name: {row.key: row for row in cells.gather(out, name)} for name in PROBLEMS}
    for name, text in published(found, out).items():
        page = PAGES[name].read_text(encoding="utf-8")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        PAGES[name].write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    for name, problem in PROBLEMS.items():
        for group, presets in groups_of(problem).items() if found[name] else ():
            picture_of(problem, group).write_bytes(picture(problem, presets, found[name]))


def picture_of(problem: Problem, group: str) -> Path:
    return ROOT / "docs" / f"robustness-{problem.name}{group and '-'}{group}.png"


def source_of(found: Found) -> str:
    """What a picture of these rows carries, so that a stale one is found."""
    shown = [f"{key} {row.log10_p} {row.loss}" for key, row in sorted(found.items())]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def picture(problem: Problem, presets: Sequence[str], found: Found, lines: Sequence[Line] = LINES) -> bytes:
    """A PNG, 1200 pixels wide or more: attacks × presets, what it came to in colour, the worst log10 p of the seeds and
    the mean loss in points in digits; hatched on the left where the loss leaves no product."""
    shown = _planned(problem, presets, lines)
    with rc_context(plots.STYLE | {"axes.grid": False, "font.size": 10, "hatch.linewidth": 0.7}):
        width = max(1200, 300 + 130 * len(presets))
        figure = Figure(figsize=(width / plots.DPI, 0.25 * len(shown) + 0.9), layout="constrained")
        axes = figure.subplots()
        for y, (line, planned) in enumerate(shown):
            for x, preset in enumerate(presets):
                if preset in planned:
                    _square(axes, x, y, [row for row in _seeds(problem, preset, line, found) if row is not None])
        axes.set(xlim=(0, len(presets)), ylim=(len(shown), 0))
        axes.set_xticks([x + 0.5 for x in range(len(presets))], [f"{preset}\nlog10 p    loss" for preset in presets])
        axes.set_yticks([y + 0.5 for y in range(len(shown))], [line.label for line, _ in shown])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(
            "log10 p of the worst seed, points of accuracy lost. Green: proven (p < 1e-9). Orange: the thief got away."
            "\nGrey: the attack failed anyway. Hatched: over 5 points are lost, no product is left.",
            fontsize=9,
        )
        return plots.png(figure, source_of(found))


def _square(axes: Axes, x: int, y: int, rows: Sequence[Row]) -> None:
    if not rows:
        axes.text(x + 0.5, y + 0.5, NOT_RUN, ha="center", va="center", color=plots.FLOOR)
        return
    worst, lost = max(map(_log10_p, rows)), _mean_loss(rows)
    faces = {"removed": plots.PEER, "failed anyway": "#dde2e8", "proven": _EVIDENCE((PROVEN - worst) / 50.0)}
    came_to = {outcome(row) for row in rows}
    face = next(faces[each] for each in faces if each in came_to)
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white"))
    if lost > MOST_LOSS:
        axes.add_patch(Rectangle((x, y), 0.09, 1, facecolor=face, edgecolor=plots.FLOOR, hatch="/////", linewidth=0))
    ink = "#1d2733" if "removed" not in came_to and worst > -35.0 else "white"
    for place, value in ((0.47, worst), (0.86, lost)):
        axes.text(x + place, y + 0.52, _numbers([value]), ha="right", va="center", color=ink)


_EVIDENCE = LinearSegmentedColormap.from_list("evidence", ["#bfe3d6", plots.OURS])


def _measured(problem: Problem, found: Found) -> list[Row]:
    every = cells_of(problem, problem.presets, SEEDS, LINES)
    return [found[cell.key] for cell in every if cell.key in found]


def _seeds(problem: Problem, preset: str, line: Line, found: Found) -> list[Row | None]:
    return [found.get(Cell(problem, preset, seed, line).key) for seed in SEEDS]


def _nulls(problem: Problem, preset: str, lines: Sequence[Line], found: Found) -> list[Row]:
    rows = [_seeds(problem, preset, line, found) for line in lines if line.base not in (MARKED, TWIN)]
    return [row for seeds in rows for row in seeds if row is not None]


def _shown(seeds: Sequence[Row | None], threshold: float | None) -> str:
    rows = [row for row in seeds if row is not None]
    if not rows:
        return NOT_RUN
    worst = max(rows, key=_log10_p)
    numbers = (NOT_RUN if row is None else _numbers([_log10_p(row)]) for row in seeds)
    said = " ".join(f"**{each}**" if row is worst else each for row, each in zip(seeds, numbers, strict=True))
    lost = _mean_loss(rows)
    kept = NOT_RUN if threshold is None else f"{sum(not sok_success(row, threshold) for row in rows)}/{len(rows)}"
    signs = " ✗" * any(outcome(row) == "removed" for row in rows) + " †" * (lost > MOST_LOSS)
    return f"{said}{signs}<br>loss {lost:.1f}, SoK {kept}"


def _strangers(rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_RUN
    return f"least of {len(rows)}: {_numbers([min(map(_log10_p, rows))])}"


def _log10_p(row: Row) -> float:
    return 0.0 if row.log10_p is None else row.log10_p


def _mean_loss(rows: Sequence[Row]) -> float:
    return statistics.fmean(row.loss for row in rows if row.loss is not None)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values).replace("-0.0", "0.0")
