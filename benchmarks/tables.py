"""Result files to Markdown: README's table and the full ones of docs/performance.md, pure functions of the files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.harness import byte_size, quantity

RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
QUIET = 0.1  # cores used by other processes that a measurement is not disturbed by
STEADY = 1.15  # p80 over p20 of a roof that has not drifted
README_ROWS = 10  # of one machine
ORDER = (
    *("sketch", "project", "embedding_loss", "cross_entropy", "soft_nearest_neighbor"),
    *("match_counts", "label_matches", "bit_matches", "training_step", "scan"),
)

Result = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A size on a curve: the axis' value and milliseconds of ours, the floor, and the fastest peer that ran there."""

    value: int
    ours: float
    floor: float
    peer: float | None


@dataclass(frozen=True)
class Curve:
    """Rows of one operator that differ in the size named `axis` alone, smallest first."""

    operator: str
    what: str
    axis: str
    headline: bool
    points: Sequence[Point]


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


def by_machine(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each machine, under a line that names it with its versions."""
    machines: dict[str, list[Result]] = {}
    for result in results:
        machines.setdefault(_machine(result["environment"]), []).append(result)
    return machines


def slug(results: Sequence[Result]) -> str:
    """'cpu', 'cpu-avx2' where it was capped, or the GPU's name: what result files and plots are called after."""
    described = results[0]["environment"]
    if described.get("capped"):
        return "-".join(["cpu", *described["instruction_sets"][-1:]])
    lower = "".join(letter if letter.isalnum() else "-" for letter in described["device"].lower())
    return "cpu" if described["kind"] == "cpu" else "-".join(part for part in lower.split("-") if part)


def roofs(results: Sequence[Result]) -> dict[str, float]:
    """The machine's measured roofs: the median of a run's measurements, and of the runs where there were several."""
    found: dict[str, set[float]] = {}
    for result in results:
        for name, measured in result["environment"].get("roofs", {}).items():
            found.setdefault(name, set()).add(measured["median"])
    return {name: statistics.median(values) for name, values in found.items()}


def best_peer(row: Row) -> dict[str, Any] | None:
    """The fastest peer of a row, which flatters us least; None where no peer ran."""
    return min(row["peers"], key=lambda peer: peer["ratio"]["median"], default=None)


def roofline_rows(results: Sequence[Result]) -> list[Row]:
    """The headline rows that have a place below the measured roofs: bytes are their point."""
    if not roofs(results):
        return []
    return [row for result in results for row in result["rows"] if row["headline"] and row["bytes"]]


def curves(results: Sequence[Result]) -> list[Curve]:
    """The scaling curves of three points or more."""
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for result in results:
        for row in result["rows"]:
            if axis := row.get("axis"):
                found.setdefault((result["operator"], row["what"], axis["name"]), {})[axis["value"]] = row
    return [
        Curve(
            *key,
            headline=any(row["headline"] for row in rows.values()),
            points=[_point(value, rows[value]) for value in sorted(rows)],
        )
        for key, rows in found.items()
        if len(rows) >= 3
    ]


def _point(value: int, row: Row) -> Point:
    peer = best_peer(row)
    times = [None if timed is None else timed["ms"]["median"] for timed in (row["ours"], row["floor"], peer)]
    return Point(value, *times)


def rate(billions: float, unit: str) -> str:
    """'41.5 GB/s', '3.35 TB/s': three digits."""
    return f"{billions:.3g} G{unit}" if billions < 999.5 else f"{billions / 1e3:.3g} T{unit}"


def growth(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent e of the power law time ∝ size^e that fits best: least squares over the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    return statistics.linear_regression(x, y).slope


def readme_table(results: Sequence[Result]) -> str:
    """The headline rows: time, ratio to the floor, ratios to peers; and the two plots. No capped machines."""
    parts = []
    for machine, measured in by_machine([one for one in results if not one["environment"].get("capped")]).items():
        table = [["operator", "size", "time", "× floor", "against peers"]]
        chosen = _headlines(measured)
        for row in chosen:
            size = _marked(row["size"], row)
            floor = f"{_three(row['floor']['ratio']['median'])} × {row['floor']['name']}"
            table.append([row["what"], size, _ms(row["ours"]["ms"]["median"]), floor, "<br>".join(_peers(row))])
        parts.append("\n\n".join([_heading(machine, measured), _markdown(table), *_footnotes(chosen)]))
        parts += _pictures(measured, "docs/")
    return "\n\n".join(parts) if parts else "Nothing has been measured yet: run `python -m benchmarks`."


def performance_table(results: Sequence[Result]) -> str:
    """Every row, a section an operator: spreads, bytes, rates, memory, every peer, what was left out and why, aims."""
    parts = []
    for machine, measured in by_machine(results).items():
        parts += [_heading(machine, measured), *_pictures(measured, "")]
        for result in measured:
            took = f" ({result['seconds']:.0f} s to measure)" if "seconds" in result else ""
            parts.append(f"### `{result['operator']}`{took}")
            for what, rows in _grouped(result["rows"], "what").items():
                parts.append("\n\n".join([f"**{what}**", _markdown(_full(rows)), *_notes(rows), *_footnotes(rows)]))
        parts += _scaling(measured)
    return "\n\n".join(parts) if parts else "Nothing has been measured yet: run `python -m benchmarks`."


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
    lines = []
    for row in result["rows"]:
        floor = f"{_three(row['floor']['ratio']['median'])} × {row['floor']['name']}"
        against = "; ".join([floor, *_peers(row)])
        lines.append(f"  {row['what']}, {row['size']}: {_ms(row['ours']['ms']['median'])}, {against}")
    return "\n".join([f"{result['operator']} on {result['environment']['device']}, {result['seconds']:g} s", *lines])


def _place(result: Result) -> tuple[bool, str, bool, int]:
    described = result["environment"]
    operator = result["operator"]
    order = ORDER.index(operator) if operator in ORDER else len(ORDER)
    return described["kind"] != "cpu", described["device"], bool(described.get("capped")), order


def _machine(described: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items() if number)
    if described["kind"] == "cpu":
        sets = "/".join(name.upper() for name in described["instruction_sets"])
        sets = f"held to {sets}" if described.get("capped") else sets
        place = f"CPU: {described['device']} ({sets}), {described['threads']} threads on {described['cores']} cores"
    else:
        place = f"GPU: {described['device']}, CUDA {described['cuda']}"
    return f"**{place}**; {versions}"


def _heading(machine: str, measured: Sequence[Result]) -> str:
    """The machine, when it was measured, and what it reaches at its best."""
    runs = dict.fromkeys((result["environment"]["commit"], result["environment"]["date"]) for result in measured)
    text = machine + "".join(f"; commit {commit}, {date}" for commit, date in runs)
    reached = roofs(measured)
    if not reached:
        return text
    products = [
        f"{name.removesuffix('_gflop_s')} matrix product {rate(value, 'FLOP/s')}"
        for name, value in reached.items()
        if name.endswith("_gflop_s")
    ]
    copies = f"copy {rate(reached['copy_gb_s'], 'B/s')} from memory, {rate(reached['cache_gb_s'], 'B/s')} from cache"
    drift = [
        roof["p80"] / roof["p20"] for result in measured for roof in result["environment"].get("roofs", {}).values()
    ]
    unsteady = f" They drifted by up to {100 * (max(drift) - 1):.0f} %." if max(drift) > STEADY else ""
    return f"{text}. Measured in the same run: {', '.join([copies, *products])}.{unsteady}"


def _headlines(measured: Sequence[Result]) -> list[Row]:
    """README_ROWS headline rows at most: every operator's first, then their second, …; in the results' order."""
    ranked = [
        (rank, place, row)
        for place, result in enumerate(measured)
        for rank, row in enumerate(row for row in result["rows"] if row["headline"])
    ]
    chosen = sorted(ranked, key=lambda entry: entry[:2])[:README_ROWS]
    return [row for _, _, row in sorted(chosen, key=lambda entry: (entry[1], entry[0]))]


def _full(rows: Sequence[Row]) -> list[list[str]]:
    """A table of rows that differ in size: a line a size, a column a peer."""
    floors = dict.fromkeys(row["floor"]["name"] for row in rows)
    names = dict.fromkeys(name for row in rows for name in [*(peer["name"] for peer in row["peers"]), *row["left_out"]])
    moved, computed = any(row["bytes"] for row in rows), any(row.get("operations") for row in rows)
    memory = any("peak_bytes" in row["ours"] for row in rows)
    head = ["size", "ours, p20–p80", f"× floor ({next(iter(floors))})" if len(floors) == 1 else "× floor"]
    head += ["GB/s (of copy)"] * moved + ["Gop/s (of peak)"] * computed + ["memory"] * memory + list(names)
    table = [head]
    for row in rows:
        floor = _spread(row["floor"]["ratio"]) + (f" {row['floor']['name']}" if len(floors) > 1 else "")
        line = [_marked(row["size"], row), _spread_ms(row["ours"]["ms"]), floor]
        line += [_rate(row, "bytes", "of_copy")] * moved + [_rate(row, "operations", "of_peak")] * computed
        line += [_memory(row["ours"])] * memory
        found = {peer["name"]: peer for peer in row["peers"]}
        table.append([*line, *(_peer(found[name]) if name in found else "–" for name in names)])
    return table


def _rate(row: Row, amount: str, share: str) -> str:
    if not row.get(amount):
        return "–"
    billions = f"{row[amount] / row['ours']['ms']['median'] / 1e6:.3g}"
    return f"{billions} ({100 * row[share]:.3g} %)" if share in row else billions


def _memory(timed: Mapping[str, Any]) -> str:
    """What a contender holds beside inputs: between calls, and at its peak during one."""
    if "peak_bytes" not in timed and not timed.get("holds_bytes"):
        return "–"
    held = timed.get("holds_bytes", 0) + timed.get("peak_bytes", 0)
    return byte_size(held) if held >= 1e6 else "< 1 MB"


def _peer(peer: Mapping[str, Any]) -> str:
    held = "" if _memory(peer) == "–" else f"; {_memory(peer)}"
    return f"**{_three(peer['ratio']['median'])} ×** ({_range(peer['ratio'])}), {_ms(peer['ms']['median'])}{held}"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Aims, and what was left out with the reason, once for all sizes that share it."""
    aims = [f"{row['size']}: {_aim(aim)}" for row in rows for aim in row["aims"]]
    if aims:
        yield "Aims: " + "; ".join(aims) + "."
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            reasons.setdefault((name, reason), []).append(row["size"])
    left_out = [
        f"{name}{'' if len(sizes) == len(rows) else ' at ' + ', '.join(sizes)} ({reason})"
        for (name, reason), sizes in reasons.items()
    ]
    if left_out:
        yield "Left out: " + "; ".join(left_out) + "."


def _aim(aim: dict[str, Any]) -> str:
    if "more_ms" in aim:
        verdict = "met" if aim["met"] else "**missed**"
        return f"≤ {aim['more_ms']:g} ms more than {aim['against']}: {_three(aim['reached'])} ms, {verdict}"
    bound = f"≤ {aim['at_most']:g}" if "at_most" in aim else f"≥ {aim['at_least']:g}"
    reached = "not measured" if aim["reached"] is None else f"{_three(aim['reached'])}, "
    verdict = "met" if aim["met"] else "" if aim["reached"] is None else "**missed**"
    return f"{bound} × {aim['against']}: {reached}{verdict}"


def _disturbed(row: Row) -> bool:
    return row.get("others_cores", 0.0) > QUIET


def _marked(text: str, row: Row) -> str:
    return f"{text} †" if _disturbed(row) else text


def _footnotes(rows: Sequence[Row]) -> Iterator[str]:
    """What † means, where other processes took part of the machine during a case."""
    disturbed = [row["others_cores"] for row in rows if _disturbed(row)]
    if disturbed:
        yield f"† Other processes used up to {max(disturbed):g} cores meanwhile: measure again on an idle machine."


def _scaling(measured: Sequence[Result]) -> list[str]:
    found = curves(measured)
    if not found:
        return []
    table = [["operator", "over", "from – to", "ours", "floor", "fastest peer", "ours, largest half"]]
    for curve in found:
        sizes = [point.value for point in curve.points]
        ours = [point.ours for point in curve.points]
        with_peer = [(point.value, point.peer) for point in curve.points if point.peer is not None]
        half = len(sizes) // 2 if len(sizes) > 3 else 1
        peer = f"{growth(*zip(*with_peer, strict=True)):.2f}" if len(with_peer) > 2 else "–"
        floor = f"{growth(sizes, [point.floor for point in curve.points]):.2f}"
        exponents = [f"{growth(sizes, ours):.2f}", floor, peer, f"{growth(sizes[half:], ours[half:]):.2f}"]
        table.append([curve.what, curve.axis, f"{quantity(sizes[0])} – {quantity(sizes[-1])}", *exponents])
    text = (
        "The exponent e of time ∝ size^e, fitted over all sizes of a curve and, in the last column, over its larger "
        "half, where what a call costs at any size no longer counts."
    )
    return ["### Growth with size", text, _markdown(table)]


def _pictures(measured: Sequence[Result], folder: str) -> list[str]:
    """Links to the plots that plots.pictures draws of these results."""
    links = []
    name = measured[0]["environment"]["device"]
    if roofline_rows(measured):
        text = f"Headline rows and their fastest peers below the measured roofs of {name}"
        links.append(f"![{text}]({folder}roofline-{slug(measured)}.svg)")
    if any(curve.headline for curve in curves(measured)):
        text = f"Time over size on {name}: ours, the floor, the fastest peer"
        links.append(f"![{text}]({folder}scaling-{slug(measured)}.svg)")
    return links


def _peers(row: Row) -> list[str]:
    """All peers where they are three or fewer, else the fastest and the slowest."""
    if not row["peers"]:
        return [f"({name}: {reason})" for name, reason in list(row["left_out"].items())[:1]]
    ordered = sorted(row["peers"], key=lambda peer: peer["ratio"]["median"])
    named = ordered if len(ordered) <= 3 else [ordered[0], ordered[-1]]
    lines = [
        f"{_three(peer['ratio']['median'])} × {peer['name']}"
        + (f" ({byte_size(peer['holds_bytes'])})" if peer["holds_bytes"] else "")
        for peer in named
    ]
    return lines if len(named) == len(ordered) else [lines[0], f"… {len(ordered) - 2} between …", lines[1]]


def _grouped(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _three(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(values: dict[str, float]) -> str:
    return f"{_three(values['p20'])}–{_three(values['p80'])}"


def _spread(values: dict[str, float]) -> str:
    return f"{_three(values['median'])} ({_range(values)})"


def _ms(value: float) -> str:
    if value < 1:
        return f"{_three(1e3 * value)} µs"
    return f"{_three(value)} ms" if value < 1000 else f"{_three(value / 1e3)} s"


def _spread_ms(values: dict[str, float]) -> str:
    return f"{_ms(values['median'])} ({_ms(values['p20'])}–{_ms(values['p80'])})"
