"""Result files to tables and pictures of README and docs/performance.md; `python -m benchmarks.publish` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, results
from benchmarks.environment import ROOT
from benchmarks.harness import byte_size, three
from benchmarks.results import Result, Row

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
QUIET = 0.1  # cores used by other processes that a measurement is not disturbed by
NOTHING = "Nothing has been measured yet: run `wmengine bench`."


def publish() -> list[Path]:
    """Generate the tables and pictures from benchmarks/results; what was written."""
    measured = results.load()
    pictures = plots.pictures(measured)
    for path, picture in pictures.items():
        path.write_bytes(picture)
    texts = documents(measured)
    for path, text in texts.items():
        path.write_text(text)
    return [*pictures, *texts]


def documents(measured: Sequence[Result]) -> dict[Path, str]:
    """The two generated documents as they should read: path → text."""
    tables = {ROOT / "README.md": readme(measured), ROOT / "docs" / "performance.md": performance(measured)}
    return {path: replace_between_markers(path.read_text(), table) for path, table in tables.items()}


def replace_between_markers(text: str, generated: str) -> str:
    """`text` with everything between the two marker lines replaced. ValueError where they are missing or doubled."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and, after it, one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{generated.strip()}\n{END}{rest.split(END)[1]}"


def readme(measured: Sequence[Result]) -> str:
    """Each operator's first headline row, and the pictures. No machine that was held below its best."""
    parts = []
    for machine, ones in _machines(measured).items():
        if plots.drawn(ones):
            rows = [row for one in ones for row in [row for row in one["rows"] if row["headline"]][:1]]
            head = ["operator", "size", "time", "× floor", "against peers"]
            parts += [machine, markdown(head, [_headline(row) for row in rows]), *_disturbed(rows)]
            parts += _links(ones, "docs/")
    return "\n\n".join(parts or [NOTHING])


def performance(measured: Sequence[Result]) -> str:
    """Every row, a table an operator: rates, memory, every peer; then aims, and what was left out and why."""
    parts = []
    for machine, ones in _machines(measured).items():
        parts += [machine, *_links(ones, "")]
        for one in ones:
            parts += [f"### `{one['operator']}`", _circumstances(one), _table(one), *_notes(one["rows"])]
    return "\n\n".join(parts or [NOTHING])


def summary(result: Result) -> str:
    """For the terminal: one line a row."""
    lines = [f"{result['operator']} on {result['environment']['device']}"]
    for row in result["rows"]:
        what, size, time, floor, peers = _headline(row)
        lines.append(f"  {what}, {size}: {time}, {floor}; {peers.replace('<br>', '; ')}")
    return "\n".join(lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _machines(measured: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each machine and number of threads, under a line that names them with the versions."""
    machines: dict[str, list[Result]] = {}
    for result in measured:
        described = result["environment"]
        sets = "/".join(name.upper() for name in described["instruction_sets"])
        held = "held to " if described["slug"].startswith("cpu-") else ""
        threads = f"{described['threads']} thread{'s' * (described['threads'] > 1)}"
        place = f"CPU: {described['device']} ({held}{sets}), {threads} on {described['cores']} cores"
        if "cuda" in described:
            place = f"GPU: {described['device']}, CUDA {described['cuda']}"
        versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
        machines.setdefault(f"**{place}**; {versions}.", []).append(result)
    return machines


def _circumstances(result: Result) -> str:
    roofs, described = result["roofs"], result["environment"]
    reached = [f"{roofs['copy_gb_s']:.3g} GB/s copied from memory, {roofs['cache_gb_s']:.3g} from cache"]
    for name, value in roofs.items():
        if name.endswith("_gflop_s"):
            reached.append(f"{value:.3g} GFLOP/s in a {name.removesuffix('_gflop_s')} matrix product")
    return f"Commit {described['commit']}, {described['date']}; in the same run {', '.join(reached)}."


def _links(measured: Sequence[Result], folder: str) -> list[str]:
    return [f"![{text}]({folder}{name})" for name, text in plots.drawn(measured).items()]


def _headline(row: Row) -> list[str]:
    """Peers: all where they are three or fewer, else the fastest and the slowest; without any, why one is missing."""
    peers = [
        f"{three(peer['ratio']['median'])} × {peer['name']}{_memory(peer, ' ({})')}"
        for peer in sorted(row["peers"], key=lambda peer: peer["ratio"]["median"])
    ]
    if len(peers) > 3:
        peers = [peers[0], f"… {len(peers) - 2} between …", peers[-1]]
    peers = peers or [f"({name}: {reason})" for name, reason in row["left_out"].items()][:1]
    floor = f"{three(row['floor']['ratio']['median'])} × {row['floor']['name']}"
    return [row["what"], _size(row), _ms(row["ours"]["ms"]["median"]), floor, "<br>".join(peers)]


def _table(result: Result) -> str:
    rows, roofs = result["rows"], result["roofs"]
    names = list(dict.fromkeys(peer["name"] for row in rows for peer in row["peers"]))
    floors = {row["floor"]["name"] for row in rows}
    rates = [
        entry
        for entry in (("bytes", "GB/s (of copy)", "copy_gb_s"), ("operations", "Gop/s (of peak)", "float32_gflop_s"))
        if any(row[entry[0]] for row in rows)
    ]
    head = ["what", "size", "time", f"× {floors.pop()}" if len(floors) == 1 else "× floor"]
    lines, last = [], None
    for row in rows:
        floor = _ratio(row["floor"]["ratio"]) + (f" {row['floor']['name']}" if head[3] == "× floor" else "")
        line = [row["what"] if row["what"] != last else "", _size(row), _ms(row["ours"]["ms"]["median"]), floor]
        for amount, _, roof in rates:
            rate = row[amount] / row["ours"]["ms"]["median"] / 1e6
            line.append(f"{three(rate)} ({three(100 * rate / roofs[roof])} %)" if rate else "–")
        found = {peer["name"]: f"**{_ratio(peer['ratio'])}**{_memory(peer, '; {}')}" for peer in row["peers"]}
        lines.append([*line, _memory(row["ours"], "{}") or "–", *(found.get(name, "–") for name in names)])
        last = row["what"]
    return markdown([*head, *(title for _, title, _ in rates), "memory", *names], lines)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Aims; what was left out with the reason, once for all rows that share it; and what † means."""
    aims = []
    for row in rows:
        reached = [f"{aim['aim']} ({_reached(aim)})" for aim in row["aims"]]
        aims += [f"{_places([row], rows)}: {', '.join(reached)}"] * bool(reached)
    if aims:
        yield f"Aims: {'; '.join(aims)}."
    missing: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for left_out in row["left_out"].items():
            missing.setdefault(left_out, []).append(row)
    told: dict[str, list[str]] = {}
    for (name, reason), lacking in missing.items():
        places = f" at {_places(lacking, rows)}" if len(lacking) < len(rows) else ""
        told.setdefault(f"{places} ({reason})", []).append(name)
    if told:
        yield f"Left out: {'; '.join(' and '.join(names) + place for place, names in told.items())}."
    yield from _disturbed(rows)


def _reached(aim: Mapping[str, Any]) -> str:
    if aim["reached"] is None:
        return "not measured"
    return f"{three(aim['reached'])}, {'met' if aim['met'] else '**missed**'}"


def _places(some: Sequence[Row], rows: Sequence[Row]) -> str:
    """Names for `some` of the rows: what they do, where no other row does that, or their sizes."""
    names = [
        row["size"] if any(other["what"] == row["what"] and other not in some for other in rows) else row["what"]
        for row in some
    ]
    return ", ".join(dict.fromkeys(names))


def _disturbed(rows: Sequence[Row]) -> Iterator[str]:
    most = max((row.get("others_cores", 0.0) for row in rows), default=0.0)
    if most > QUIET:
        yield f"† Other processes used up to {most:g} cores meanwhile: measure again on an idle machine."


def _size(row: Row) -> str:
    return f"{row['size']} †" if row.get("others_cores", 0.0) > QUIET else row["size"]


def _memory(timed: Mapping[str, Any], form: str) -> str:
    """What a contender holds beside its inputs at its peak, written into `form`; nothing where that is noise."""
    return form.format(byte_size(timed["memory"])) if timed.get("memory", 0) >= 1e6 else ""


def _ratio(values: Mapping[str, float]) -> str:
    return f"{three(values['median'])} ({three(values['p20'])}–{three(values['p80'])})"


def _ms(value: float) -> str:
    if value < 1:
        return f"{three(1e3 * value)} µs"
    return f"{three(value)} ms" if value < 1000 else f"{three(value / 1e3)} s"


if __name__ == "__main__":
    for written in publish():
        print(f"wrote {written.name}")
