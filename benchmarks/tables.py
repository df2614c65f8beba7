"""Result files to Markdown: README's table and the full one of docs/performance.md, pure functions of the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.harness import byte_size

RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
QUIET = 0.1  # cores used by other processes that a measurement is not disturbed by
ORDER = ("sketch", "project", "embedding_loss", "cross_entropy", "linear_cross_entropy", "match_counts", "training_step")

Result = dict[str, Any]


def load(directory: Path = RESULTS) -> list[Result]:
    """All result files of a directory, CPU first, operators in the order of the design.

    ValueError for a file of another format and for a quick run's: its sizes say nothing about the engine.
    """
    results = []
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("format") != "wmengine-benchmark/1":
            raise ValueError(f"{path.name} is not a wmengine-benchmark/1 file; delete it or run `python -m benchmarks`")
        if result["quick"]:
            raise ValueError(f"{path.name} comes from a quick run; measure it with `python -m benchmarks`")
        results.append(result)
    return sorted(results, key=_place)


def readme_table(results: Sequence[Result]) -> str:
    """The headline rows: time, ratio to the floor, ratio to each peer."""
    return _by_machine(
        results,
        ["operator", "size", "time", "× floor", "times faster than"],
        lambda row: (
            [[row["what"], row["size"], _ms(row["ours"]["ms"]["median"]), _floor(row), "<br>".join(_peers(row))]]
            if row["headline"]
            else []
        ),
    )


def performance_table(results: Sequence[Result]) -> str:
    """Every row, with spreads, bytes, peers' times, what was left out and why, and the aims."""
    return _by_machine(
        results,
        ["operator", "size", "time, p20–p80", "bytes moved", "against", "its time", "ratio, p20–p80", "aim"],
        _full_rows,
    )


def replace_between_markers(text: str, table: str) -> str:
    """`text` with everything between the two marker lines replaced. ValueError where they are missing or doubled."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and, after it, one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{rest.split(END)[1]}"


def documents(results: Sequence[Result]) -> dict[Path, str]:
    """The two generated documents as they should read: path → text."""
    tables = {ROOT / "README.md": readme_table(results), ROOT / "docs" / "performance.md": performance_table(results)}
    return {path: replace_between_markers(path.read_text(), table) for path, table in tables.items()}


def summary(result: Result) -> str:
    """A few lines for the terminal: one a row."""
    lines = [
        f"  {row['what']}, {row['size']}: {_ms(row['ours']['ms']['median'])}, {'; '.join([_floor(row), *_peers(row)])}"
        for row in result["rows"]
    ]
    return "\n".join([f"{result['operator']} on {result['environment']['device']}", *lines])


def _place(result: Result) -> tuple[bool, str, int]:
    described = result["environment"]
    operator = result["operator"]
    return described["kind"] != "cpu", described["device"], ORDER.index(operator) if operator in ORDER else len(ORDER)


def _by_machine(results: Sequence[Result], header: list[str], cells: Any) -> str:
    parts = []
    machines: dict[str, list[Result]] = {}
    for result in results:
        machines.setdefault(_machine(result["environment"]), []).append(result)
    for machine, measured in machines.items():
        runs = dict.fromkeys((result["environment"]["commit"], result["environment"]["date"]) for result in measured)
        heading = machine + "".join(f"; commit {commit}, {date}" for commit, date in runs)
        lines = [" | ".join(header), " | ".join(["---"] * len(header))]
        for result in measured:
            for row in result["rows"]:
                lines += [" | ".join(line) for line in cells(row)]
        parts.append(f"{heading}\n\n" + "\n".join(f"| {line} |" for line in lines))
        parts[-1] += _disturbance(measured)
    return "\n\n".join(parts) if parts else "Nothing has been measured yet: run `python -m benchmarks`."


def _machine(described: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items() if number)
    if described["kind"] == "cpu":
        sets = "/".join(name.upper() for name in described["instruction_sets"])
        place = f"CPU: {described['device']} ({sets}), {described['threads']} threads on {described['cores']} cores"
    else:
        place = f"GPU: {described['device']}, CUDA {described['cuda']}"
    return f"**{place}**; {versions}"


def _disturbance(measured: Sequence[Result]) -> str:
    """A warning under the table where other processes took part of the machine during a case."""
    disturbed = [row for result in measured for row in result["rows"] if row.get("others_cores", 0.0) > QUIET]
    if not disturbed:
        return ""
    worst = max(row["others_cores"] for row in disturbed)
    cases = f"{len(disturbed)} of {sum(len(result['rows']) for result in measured)} cases"
    return f"\n\nOther processes used up to {worst:g} cores during {cases}: measure again on an idle machine."


def _full_rows(row: dict[str, Any]) -> list[list[str]]:
    moved = row["bytes"]
    rate = f"{byte_size(moved)} ({moved / row['ours']['ms']['median'] / 1e6:.3g} GB/s)" if moved else "–"
    ours = [row["what"], row["size"], _spread_ms(row["ours"]["ms"]), rate]
    floor = row["floor"]
    against = [[f"floor: {floor['name']}", _ms(floor["ms"]["median"]), "ours / floor " + _spread(floor["ratio"])]]
    names = [floor["name"]]
    for peer in row["peers"]:
        held = f" ({byte_size(peer['holds_bytes'])} held)" if peer["holds_bytes"] else ""
        against.append([peer["name"] + held, _ms(peer["ms"]["median"]), "peer / ours " + _spread(peer["ratio"])])
        names.append(peer["name"])
    for name, reason in row["left_out"].items():
        against.append([name, "–", reason])
        names.append(name)
    aims = {aim["against"]: aim for aim in row["aims"]}
    lines = [[*line, _aim(aims.get(name))] for name, line in zip(names, against, strict=True)]
    return [(ours if index == 0 else [""] * len(ours)) + line for index, line in enumerate(lines)]


def _aim(aim: dict[str, Any] | None) -> str:
    if aim is None:
        return ""
    bound = f"≤ {aim['at_most']:g}" if "at_most" in aim else f"≥ {aim['at_least']:g}"
    return f"{bound} {'met' if aim['met'] else 'not measured' if aim['reached'] is None else '**missed**'}"


def _floor(row: dict[str, Any]) -> str:
    return f"{_three(row['floor']['ratio']['median'])} × {row['floor']['name']}"


def _peers(row: dict[str, Any]) -> list[str]:
    if not row["peers"]:
        return [f"({name}: {reason})" for name, reason in list(row["left_out"].items())[:1]]
    return [
        f"{_three(peer['ratio']['median'])} × {peer['name']}"
        + (f" ({byte_size(peer['holds_bytes'])})" if peer["holds_bytes"] else "")
        for peer in row["peers"]
    ]


def _three(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(values: dict[str, float]) -> str:
    return f"{_three(values['median'])} ({_three(values['p20'])}–{_three(values['p80'])})"


def _ms(value: float) -> str:
    if value < 1:
        return f"{_three(1e3 * value)} µs"
    return f"{_three(value)} ms" if value < 1000 else f"{_three(value / 1e3)} s"


def _spread_ms(values: dict[str, float]) -> str:
    return f"{_ms(values['median'])} ({_ms(values['p20'])}–{_ms(values['p80'])})"
