"""Interleaved timing: in every round floor, operator and peers run once, and ratios are taken inside a round.

A shared machine drifts by tens of per cent within a minute, so a quotient of two medians taken minutes apart says
little. Here a round measures all contenders within a fraction of a second, the quotient is formed within the round, and
the median of the quotients is reported with its 20th and 80th percentile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import environment

QUICK_REASON = "not part of a quick run"
STREAMED = 64_000_000  # bytes from which a GPU's launches and caches no longer count
COPYING = 1.25  # what an operator that only streams may take on a GPU: 80 % of what a copy reaches
SETTLED_S = 0.1  # a call this long pays for caches and threads that others left behind without showing it

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """A named thing to time.

    `holds` is what it keeps in memory beside its inputs and results, in bytes. `may_fail`: an exception in its first
    call leaves it out, and so does a quick run, which waits for no compiler; the result says why.
    """

    name: str
    run: Run
    holds: int = 0
    may_fail: bool = False


@dataclass(frozen=True)
class Aim:
    """A promise about one ratio: ours / floor is at most `bound`, or peer / ours is at least `bound`."""

    against: str
    bound: float


@dataclass(frozen=True)
class Case:
    """One row of a result: our operator at one size, its floor and its peers.

    `bytes_moved` is the least that any implementation must read and write, 0 where bytes are not the point, and
    `operations` the arithmetic operations of the least work, 0 where there are none to speak of. `axis` names the size
    that a scaling curve runs over and gives its value, such as ("rows", 4096): rows with the same `what` and the same
    name form one curve. `left_out` maps the name of a peer that cannot run here to the reason. `processes`: every call
    is of a whole process, for seconds, so its memory is not this one's, and no case repeats it more than it must.
    `seconds` to be measured for, at least, on a GPU a third of them. `gpu_bound`: the most that ours may take of the
    floor on a GPU, where the call moves enough bytes to be bound by memory, or is a whole step.
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
    seconds: float = 0.0
    gpu_bound: float | None = None


def device_clock(device: str) -> Clock:
    """Seconds, read when the device has finished all work handed to it."""
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


def captured(run: Run) -> Run:
    """Replays of a CUDA graph of `run`, captured at the first call: what a GPU takes without launches from Python."""
    import torch

    graphs: list[Any] = []

    def replay() -> None:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles, and uploads what is uploaded once
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def differentiate(leaves: Sequence[Any], loss: Any) -> Any:
    """The loss, after a backward pass that leaves its gradients in `leaves`, and nothing from before."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return loss


def three(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def byte_size(count: int) -> str:
    """'4.29 GB', '268 MB', '12.0 kB': decimal units, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{three(count / size)} {unit}"
    return f"{count} B"


def quantity(count: int) -> str:
    """'16.8 M', '159 k', '608': three digits."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


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


class Turn:
    """How one contender takes its turn: a sample of so many calls, after an untimed one where a call is short.

    The untimed call is for caches and threads that the contender before has left behind.
    """

    def __init__(self, run: Run, clock: Clock, sample_s: float, once: bool) -> None:
        self.run, self.clock, self.calls, self.short, self.round_s = run, clock, 1, False, 0.0
        self.seconds: list[float] = []
        if once:
            return
        call_s = sample(run, 1, clock)
        self.short = call_s < SETTLED_S
        if self.short:
            call_s = max(1e-9, min(call_s, sample(run, 1, clock)))
            self.calls = max(1, min(1000, math.ceil(sample_s / call_s)))
            # On a busy machine many calls take longer than the best of two lets expect.
            call_s = max(call_s, sample(run, self.calls, clock))
        self.round_s = call_s * (self.calls + self.short)

    def settle(self) -> None:
        if self.short:
            self.run()

    def take(self) -> None:
        self.settle()
        self.seconds.append(sample(self.run, self.calls, self.clock))


def aims_on_a_gpu(case: Case) -> list[Aim]:
    """What is promised there: the bound, and to be no slower than what torch.compile or Liger-Kernel makes of it."""
    large = case.bytes_moved >= STREAMED
    bound = [Aim(case.floor.name, case.gpu_bound)] if case.gpu_bound and (large or not case.bytes_moved) else []
    rivals = [peer.name for peer in case.peers if "torch.compile" in peer.name or "Liger" in peer.name]
    return bound + [Aim(name, 1.0) for name in rivals if large]


def measure_roofs(device: str, clock: Clock, quick: bool = False) -> dict[str, float]:
    """What this device reaches at its best in this very run, through torch and with the threads it was given.

    `copy_gb_s` and `cache_gb_s`: bytes read plus bytes written a second by a copy too large for the caches, and by one
    that fits in the second level; `float32_gflop_s` (and `bfloat16_gflop_s` on a GPU): 2n³ a matrix product of n×n over
    its time. The best of the repeats counts: what holds a roof down is never the roof.
    """
    import torch

    large, small, side = (1 << 26, 1 << 17, 1536) if device == "cpu" else (1 << 28, 1 << 21, 8192)
    large, side = (large // 8, side // 4) if quick else (large, side)
    work: dict[str, tuple[float, Run]] = {}  # billions of bytes or operations, and what does them
    for name, count in (("copy_gb_s", large), ("cache_gb_s", small)):
        target = torch.ones(count, device=device)
        work[name] = 8e-9 * count, functools.partial(target.copy_, torch.rand(count, device=device))
    for name in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
        matrix = torch.rand(side, side, device=device).to(getattr(torch, name))  # constants run cooler, and faster
        work[f"{name}_gflop_s"] = 2e-9 * side**3, functools.partial(torch.mm, matrix, matrix)
    for _, run in work.values():
        run()  # starts the threads that separated_threads then sends to their processors
    roofs = {}
    with environment.separated_threads():
        for name, (size, run) in work.items():
            turn, until = Turn(run, clock, 1e-3, once=False), time.perf_counter() + (0.02 if quick else 0.3)
            while time.perf_counter() < until or len(turn.seconds) < 5:
                turn.take()
            roofs[name] = float(f"{size / min(turn.seconds):.4g}")
    return roofs


def warm_up(case: Case, quick: bool) -> tuple[list[Contender], dict[str, str]]:
    """Call everything once (compilation, page faults); returns the peers that work and why others do not."""
    case.floor.run()
    case.ours()
    working, left_out = [], dict(case.left_out)
    for peer in case.peers:
        if quick and peer.may_fail:
            left_out[peer.name] = QUICK_REASON
            continue
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


def compare(case: Case, benchmark: Any, clock: Clock, quick: bool, device: str = "cpu") -> dict[str, Any] | None:
    """Measure one case and return its row, JSON-ready; None, after one call of each, where pytest-benchmark is off.

    `benchmark` is pytest-benchmark's fixture. It times our operator (its rounds are our rounds, its iterations our
    calls a sample); between two of its rounds the floor and the peers are timed the same way. A headline has 4 s,
    another case 1.5 s, so that all cases on two cores stay below ten minutes; a third of that on a GPU, which is
    steady and dear.
    """
    peers, left_out = warm_up(case, quick)
    if benchmark.disabled:
        return None
    contenders = [Contender("ours", case.ours), case.floor, *peers]
    memory: list[int | None] = [None] * len(contenders)
    if not case.processes:
        leaves = environment.leaves()
        memory = [environment.peak_memory(one.run, device, leaves) for one in contenders]
        del leaves  # it would keep alive what the case lets go
    turns = [Turn(one.run, clock, 2e-4 if quick else 0.01, case.processes) for one in contenders]
    ours, *others = turns
    limit_s = max(case.seconds, 4.0 if case.headline else 1.5) * (1.0 if device == "cpu" else 1.0 / 3.0)
    rounds = 3
    if not quick and not case.processes:
        rounds = max(5, min(40, int(limit_s / sum(turn.round_s for turn in turns))))

    def measure_others() -> None:
        done = len(others[0].seconds)
        if done == rounds:
            return  # pytest-benchmark calls once more, untimed, for the result of a looped target
        for position in range(len(others)):
            others[(done + position) % len(others)].take()  # nobody always follows the same neighbour
        ours.settle()

    ours.settle()
    others_before, started = environment.other_seconds(), time.perf_counter()
    with contextlib.nullcontext() if case.processes else environment.separated_threads():  # children inherit a pin
        benchmark.pedantic(ours.run, teardown=measure_others, rounds=rounds, iterations=ours.calls)
    others_after, wall = environment.other_seconds(), time.perf_counter() - started
    ours.seconds = list(benchmark.stats.stats.data)
    measured = row(case, [turn.seconds for turn in turns], contenders, memory, left_out)
    if others_before is not None and others_after is not None:
        measured["others_cores"] = round(max(0.0, others_after - others_before) / wall, 2)
    return measured


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median with 20th and 80th percentile, four significant digits."""
    found = np.quantile(list(values), (0.5, 0.2, 0.8))
    return {name: float(f"{value:.4g}") for name, value in zip(("median", "p20", "p80"), found, strict=True)}


def row(
    case: Case,
    seconds: Sequence[Sequence[float]],
    contenders: Sequence[Contender],
    memory: Sequence[int | None],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The row of a result file: `seconds` a round and `memory` at the peak of ours, the floor, and each peer."""

    def entry(place: int) -> dict[str, Any]:
        timed: dict[str, Any] = {"ms": spread(1e3 * value for value in seconds[place])}
        if memory[place] is not None or contenders[place].holds:
            timed["memory"] = contenders[place].holds + (memory[place] or 0)
        return timed

    def ratio(above: int, below: int) -> dict[str, float]:
        return spread(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    floor = {"name": case.floor.name, **entry(1), "ratio": ratio(0, 1)}
    peers = [
        {"name": contenders[place].name, **entry(place), "ratio": ratio(place, 0)}
        for place in range(2, len(contenders))
    ]
    reached = {one["name"]: one["ratio"]["median"] for one in (floor, *peers)}
    aims = []
    for aim in case.aims:
        value, sign = reached.get(aim.against), "≤" if aim.against == case.floor.name else "≥"
        met = value is not None and (value <= aim.bound if sign == "≤" else value >= aim.bound)
        aims.append({"aim": f"{sign} {aim.bound:g} × {aim.against}", "reached": value, "met": met})
    return {
        "what": case.what,
        "size": case.size,
        "axis": case.axis,
        "headline": case.headline,
        "bytes": case.bytes_moved,
        "operations": case.operations,
        "rounds": len(seconds[0]),
        "ours": entry(0),
        "floor": floor,
        "peers": peers,
        "left_out": dict(left_out),
        "aims": aims,
    }
