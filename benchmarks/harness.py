"""Interleaved timing: in every round floor, operator and peers run once, and ratios are taken inside a round.

A shared machine drifts by tens of per cent within a minute, so a quotient of two medians taken minutes apart says
little. Here a round measures all contenders within a fraction of a second, the quotient is formed within the round, and
the median of the quotients is reported with its 20th and 80th percentile.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks import environment

QUICK_REASON = "not part of a quick run"
SETTLED_S = 0.1  # a call this long pays for caches and threads that others left behind without showing it

Run = Callable[[], object]
Clock = Callable[[], float]


class Benchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    disabled: bool
    extra_info: dict[str, Any]
    stats: Any

    def pedantic(
        self, target: Run, *, teardown: Run | None = ..., rounds: int = ..., iterations: int = ...
    ) -> object: ...


@dataclass(frozen=True)
class Contender:
    """A named thing to time.

    `holds` is what it keeps in memory beside its inputs and results, in bytes. `may_fail`: an exception in its first
    call leaves it out, and the result says why.
    """

    name: str
    run: Run
    holds: int = 0
    may_fail: bool = False


@dataclass(frozen=True)
class Aim:
    """A promise about one ratio: ours / floor is at most `bound`, or peer / ours is at least `bound`.

    With `more_ms`, ours takes at most `bound` milliseconds more than the floor.
    """

    against: str
    bound: float
    more_ms: bool = False


@dataclass(frozen=True)
class Case:
    """One row of a result: our operator at one size, its floor and its peers.

    `bytes_moved` is the least that any implementation must read and write, 0 where bytes are not the point, and
    `operations` the arithmetic operations of the least work, 0 where there are none to speak of. `axis` names the size
    that a scaling curve runs over and gives its value, such as ("rows", 4096): rows with the same `what` and the same
    name form one curve. `left_out` maps the name of a peer that cannot run here to the reason. `processes`: every call
    is of a whole process, for seconds, so its memory is not this one's, and no case repeats it more than it must.
    """

    operator: str
    what: str
    size: str
    bytes_moved: int
    ours: Run
    floor: Contender
    peers: Sequence[Contender] = ()
    aims: Sequence[Aim] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    headline: bool = False
    operations: int = 0
    axis: tuple[str, int] | None = None
    processes: bool = False


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds a sample at least, seconds a case at most, and how far its rounds give way.

    All cases on two cores, with what torch.compile takes, should stay below ten minutes; so `other` rows than headlines
    get less.
    """

    sample_s: float = 0.01
    headline_s: float = 4.0
    headline_rounds: int = 5
    other_s: float = 1.5
    other_rounds: int = 3
    most_rounds: int = 40
    process_rounds: int = 3


FULL = Effort()
QUICK = Effort(sample_s=2e-4, headline_rounds=3, most_rounds=3)


def device_clock(device: str) -> Clock:
    """Seconds, read when the device has finished all work handed to it (design.md: a synchronising timer)."""
    if device == "cpu":
        return time.perf_counter
    import torch

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with fixed shapes and no graph breaks: as favourable to the peer as it gets without tuning runs."""
    import torch

    return torch.compile(function, fullgraph=True, dynamic=False)


def differentiate(leaves: Sequence[Any], loss: Any) -> Any:
    """The loss, after a backward pass that leaves its gradients in `leaves`, and nothing from before."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return loss


def byte_size(count: int) -> str:
    """'4.29 GB', '268 MB', '12.0 kB': decimal units, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{count} B"


def quantity(count: int) -> str:
    """'16.8 M', '159 k', '608': three digits."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; `share` in [0, 1]. ValueError on an empty sequence."""
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with 20th and 80th percentile, four significant digits."""
    shares = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: float(f"{percentile(values, share):.4g}") for name, share in shares.items()}


def sample(run: Run, calls: int, clock: Clock) -> float:
    """Seconds a call over `calls` calls back to back, garbage collection held."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls
    finally:
        if was_enabled:
            gc.enable()


def nothing() -> None:
    """What a contender that needs no settling does between two samples."""


def warm_up(case: Case) -> tuple[list[Contender], dict[str, str]]:
    """Call everything once (compilation, page faults); returns the peers that work and why others do not."""
    case.floor.run()
    case.ours()
    working, left_out = [], dict(case.left_out)
    for peer in case.peers:
        try:
            peer.run()
        except Exception as error:  # a compiler backend may raise anything at all
            if not peer.may_fail:
                raise
            reason = str(error).strip().splitlines() or [""]
            left_out[peer.name] = f"failed: {type(error).__name__}: {reason[0]}"[:200]
        else:
            working.append(peer)
    return working, left_out


def compare(
    case: Case, benchmark: Benchmark, clock: Clock, effort: Effort, device: str = "cpu"
) -> dict[str, Any] | None:
    """Measure one case and return its row, JSON-ready; None, after one call of each, where pytest-benchmark is off.

    pytest-benchmark times our operator (its rounds are our rounds, its iterations our calls a sample); between two of
    its rounds the floor and the peers are timed the same way. Every sample of a short call starts after one untimed
    call of the same contender, so that nobody pays for the caches and threads that the one before left behind.
    """
    peers, left_out = warm_up(case)
    if benchmark.disabled:
        return None
    ours = Contender("ours", case.ours)
    others = [case.floor, *peers]
    calls: dict[str, int] = {}
    settle: dict[str, Run] = {}
    round_s = 0.0
    peaks: dict[str, int | None] = {}
    if case.processes:
        calls = {contender.name: 1 for contender in (ours, *others)}
    else:
        leaves = environment.leaves()
        peaks = {one.name: environment.peak_memory(one.run, device, leaves) for one in (ours, *others)}
        del leaves  # it would keep alive what the case lets go
    for contender in () if case.processes else (ours, *others):
        once = sample(contender.run, 1, clock)
        if once < SETTLED_S:
            once = min(once, sample(contender.run, 1, clock))
            settle[contender.name] = contender.run
        calls[contender.name] = max(1, min(1000, math.ceil(effort.sample_s / max(once, 1e-9))))
        if contender.name in settle:
            # On a busy machine many calls take longer than the best of two lets expect.
            once = max(once, sample(contender.run, calls[contender.name], clock))
        round_s += once * (calls[contender.name] + (contender.name in settle))
    if len(calls) != len(others) + 1:
        raise ValueError(f"{case.operator}, {case.size}: two contenders share a name: {[c.name for c in others]}")
    limit_s, least = effort.other_s, effort.other_rounds
    if case.headline:
        limit_s, least = effort.headline_s, effort.headline_rounds
    rounds = effort.process_rounds if case.processes else max(least, min(effort.most_rounds, int(limit_s / round_s)))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in others}

    def measure_others() -> None:
        turn = len(seconds[case.floor.name])
        if turn == rounds:
            return  # pytest-benchmark calls once more, untimed, for the result of a looped target
        for position in range(len(others)):
            contender = others[(turn + position) % len(others)]  # nobody always follows the same neighbour
            settle.get(contender.name, nothing)()
            seconds[contender.name].append(sample(contender.run, calls[contender.name], clock))
        settle.get("ours", nothing)()

    settle.get("ours", nothing)()
    others_before, started = environment.other_seconds(), time.perf_counter()
    with contextlib.nullcontext() if case.processes else environment.separated_threads():  # children inherit a pin
        benchmark.pedantic(ours.run, teardown=measure_others, rounds=rounds, iterations=calls["ours"])
    seconds["ours"] = list(benchmark.stats.stats.data)
    others_after, wall = environment.other_seconds(), time.perf_counter() - started
    row = _row(case, seconds, peers, left_out, calls, peaks)
    if others_before is not None and others_after is not None:
        row["others_cores"] = round(max(0.0, others_after - others_before) / wall, 2)
    benchmark.extra_info.update(row)
    return row


def shares(row: Mapping[str, Any], roofs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What a row reaches of the roofs of environment.measure_roofs, 1 being all of it, for the rates that it has."""
    known = (
        ("of_copy", "gb_s", "copy_gb_s"),
        ("of_cache_copy", "gb_s", "cache_gb_s"),
        ("of_peak", "gflop_s", "float32_gflop_s"),
    )
    return {share: float(f"{row[rate] / roofs[roof]['median']:.4g}") for share, rate, roof in known if rate in row}


def axis_entry(case: Case) -> dict[str, Any] | None:
    """The case's place on its scaling curve, as its row has it."""
    return None if case.axis is None else {"name": case.axis[0], "value": case.axis[1]}


def _row(
    case: Case,
    seconds: Mapping[str, Sequence[float]],
    peers: Sequence[Contender],
    left_out: Mapping[str, str],
    calls: Mapping[str, int],
    peaks: Mapping[str, int | None],
) -> dict[str, Any]:
    def timing(name: str) -> dict[str, Any]:
        timed = {"ms": spread([1e3 * value for value in seconds[name]]), "calls_a_sample": calls[name]}
        return timed if peaks.get(name) is None else {**timed, "peak_bytes": peaks[name]}

    def ratio(above: str, below: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])

    our_s = percentile(seconds["ours"], 0.5)
    rates = {"gb_s": 1e-9 * case.bytes_moved / our_s, "gflop_s": 1e-9 * case.operations / our_s}
    floor_ratio = ratio("ours", case.floor.name)
    peer_rows = [
        {"name": peer.name, **timing(peer.name), "ratio": ratio(peer.name, "ours"), "holds_bytes": peer.holds}
        for peer in peers
    ]
    aims = []
    for aim in case.aims:
        against_floor = aim.against == case.floor.name
        if aim.more_ms:
            pairs = zip(seconds["ours"], seconds[aim.against], strict=True)
            more = percentile([1e3 * (mine - theirs) for mine, theirs in pairs], 0.5)
            aims.append({"against": aim.against, "more_ms": aim.bound, "reached": more, "met": more <= aim.bound})
            continue
        measured = {row["name"]: row["ratio"]["median"] for row in peer_rows}
        reached = floor_ratio["median"] if against_floor else measured.get(aim.against)
        if reached is None and aim.against not in left_out:
            raise ValueError(f"{case.operator}, {case.size}: an aim names {aim.against!r}, which is not a contender")
        met = reached is not None and (reached <= aim.bound if against_floor else reached >= aim.bound)
        side = "at_most" if against_floor else "at_least"
        aims.append({"against": aim.against, side: aim.bound, "reached": reached, "met": met})
    return {
        "operator": case.operator,
        "what": case.what,
        "size": case.size,
        "bytes": case.bytes_moved,
        "operations": case.operations,
        "axis": axis_entry(case),
        **{name: float(f"{rate:.4g}") for name, rate in rates.items() if rate},
        "rounds": len(seconds["ours"]),
        "ours": timing("ours"),
        "floor": {"name": case.floor.name, **timing(case.floor.name), "ratio": floor_ratio},
        "peers": peer_rows,
        "left_out": dict(left_out),
        "aims": aims,
        "headline": case.headline,
    }
