"""The suspects of a scan over the cores of one machine: a thread and a sandboxed worker each, a queue between them.

Threads read files and score answers; the work of a model happens in its worker, and waiting for it holds no lock of
Python's. A worker that fails costs one suspect. What a suspect that is owned has answered is asked again in a fresh
worker: one that an earlier model had corrupted could have made it up.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from wmengine._processors import available, keep_to
from wmengine.errors import ScanError, SuspectError
from wmengine.facts import fact
from wmengine.judging.asking import Terms
from wmengine.judging.judge import Finding, failed, judge_suspect
from wmengine.judging.verdict import PROVING, decide, log10_calibrated
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Need
from wmengine.sandbox import Limits
from wmengine.scanning.journal import Plan
from wmengine.scanning.listing import Listed, open_source
from wmengine.scanning.results import THIS, rows_of
from wmengine.suspects.base import one_line
from wmengine.suspects.checkpoint import CheckpointSuspect, is_checkpoint
from wmengine.suspects.model_file import MAXIMUM_BYTES, LocalSource, ModelFile, read_model
from wmengine.suspects.onnx_file import Engine, NoWorker, OnnxSuspect, open_engine

PATIENCE = 5.0  # seconds
TOGETHER = 0.05  # seconds for which what is done is gathered, as writing it down and saying so costs a fixed price
TRIES = 3  # of a suspect under whom somebody kills the sandbox's template
SUSPECTS_A_WORKER = 256  # then a fresh one: what models leave behind in a process does not add up


@dataclass(frozen=True)
class Judged:
    """A suspect that is done: its rows, or the place of the suspect with the same bytes that has them.

    sha256: of these bytes, with a word before it where they were read as a checkpoint: as a model they may be another.
    """

    place: int
    sha256: str | None
    rows: list[dict[str, Any]]
    same_as: int | None = None


class Judge:
    """Judges one suspect after the other, with an engine of its own. One thread's; close it."""

    def __init__(self, plan: Plan, marks: Sequence[Watermark], limits: Limits, hashes: Hashes) -> None:
        self._plan, self._marks, self._limits, self._hashes = plan, marks, limits, hashes
        self._terms = Terms(
            sequential=plan.test == "sequential",
            log10_bar=math.log10(plan.tests) - math.log10(plan.alpha),
            every_way=plan.adapters == "all",
            any_order=plan.classes == "any",
        )
        # What a persistent worker says of an owned suspect is asked again, where a proof is all that it says.
        twice = plan.isolation == "persistent" and all(mark.preset.null in PROVING for mark in marks)
        self._first_terms = replace(self._terms, provisional=twice)
        self._engine: Engine | None = None
        self._served = 0

    def judge(self, place: int) -> Judged:
        """The rows of the suspect at this place of the plan; never raises for what is the suspect's fault.

        Raises ScanError where there is no sandboxed worker to be had.
        """
        suspect, started = self._plan.suspects[place], time.monotonic()
        if not suspect.store and is_checkpoint(suspect.path):
            return self._judge_checkpoint(place, started)
        file: ModelFile | None = None
        for left in reversed(range(TRIES)):
            try:
                if file is None:
                    file = self._read(suspect)
                else:
                    self._ready_engine()
                first = self._hashes.claim(file.sha256, place)
                if first != place:
                    return Judged(place, file.sha256, [], first)
                findings = self._confirmed(file, self._judged(file, self._marks, self._first_terms))
            except NoWorker as error:
                raise ScanError(f"{error}; what is finished is kept, and the same command resumes") from None
            except Exception as error:  # whatever a stranger's file brings about: it is that file's own row
                findings = [failed(mark, _said(error)) for mark in self._marks]
            if not left or self._engine is None or not self._engine.abandoned:
                break
        return self._done(place, None if file is None else file.sha256, findings, started)

    def _judge_checkpoint(self, place: int, started: float) -> Judged:
        """Nothing of it is run, so no worker has a part in it: this process reads its weights, bounded by their sizes,
        as `verify` does."""
        suspect, sha256, same = self._plan.suspects[place], None, None
        try:
            with closing(CheckpointSuspect(LocalSource(suspect.path, THIS, suspect.inode))) as opened:
                sha256, same = opened.sha256, f"checkpoint {opened.sha256}"
                first = self._hashes.claim(same, place)
                if first != place:
                    return Judged(place, same, [], first)
                findings = judge_suspect(opened, self._marks, self._terms)
        except Exception as error:  # as above
            findings = [failed(mark, _said(error)) for mark in self._marks]
        return replace(self._done(place, sha256, findings, started), sha256=same)

    def _done(self, place: int, sha256: str | None, findings: Sequence[Finding], started: float) -> Judged:
        name, seconds = self._plan.suspects[place].name, time.monotonic() - started
        return Judged(place, sha256, rows_of(name, sha256, self._marks, findings, seconds, self._plan))

    def interrupt(self) -> None:
        """From another thread: what the suspect of the moment is asked has no answer any more."""
        engine = self._engine
        if engine is not None:
            engine.interrupt()

    def close(self) -> None:
        self._discard()

    def _read(self, suspect: Listed) -> ModelFile:
        # A model that its worker has no room for need not come into this process either.
        most = min(MAXIMUM_BYTES, self._limits.memory_bytes)

        def locations(name: str, data: bytes) -> list[str]:
            return self._ready_engine().locations(name, data)  # the time of a slow store is not the suspect's

        return read_model(open_source(suspect, THIS), locations, most)

    def _judged(self, file: ModelFile, marks: Sequence[Watermark], terms: Terms) -> list[Finding]:
        return judge_suspect(OnnxSuspect(file, engine=self._engine), marks, terms)

    def _confirmed(self, file: ModelFile, findings: list[Finding]) -> list[Finding]:
        """The findings, of pairs that are owned those of asking again: every trigger, and in a fresh worker.

        p of all triggers where the sequential one is below the bar, and else that one, is a p-value: whatever its level
        below the bar, it is at most that of all triggers, and above no more often than the sequential one. No such
        thing is true of e-values: the first one stays, unless what the fresh worker says is worth less.
        """
        owned = [number for number, mark in enumerate(self._marks) if self._is_owned(findings[number], mark)]
        fresh = self._plan.isolation == "persistent"
        if not owned or not (fresh or self._terms.sequential):
            return findings
        marks = [self._marks[number] for number in owned]
        for terms in (replace(self._terms, sequential=False), self._terms):
            if fresh:
                self._discard()
                self._ready_engine()
            again = self._judged(file, marks, terms)
            if not self._terms.sequential or all(each.error is None for each in again):
                break  # else what it proves before it fails
        for number, second in zip(owned, again, strict=True):
            first = findings[number]
            shared = [each for each in first.facts if each.code == "shared"]  # by those that are not asked again
            second = replace(second, facts=tuple(dict.fromkeys([*second.facts, *shared])))
            if second.queries > first.queries and second.error is None:
                said = fact("asked_whole", queries=first.queries, log10_p=first.log10_p)
                second = replace(second, facts=(*second.facts, said))
            if first.log10_e is not None:
                second = replace(second, log10_e=min(first.log10_e, log10_calibrated(second.log10_p)))
            findings[number] = second
        return findings

    def _is_owned(self, finding: Finding, mark: Watermark) -> bool:
        return decide(finding, mark, self._plan.alpha, self._plan.tests) == "owned"

    def _ready_engine(self) -> Engine:
        """An engine for the next suspect, its time starting now."""
        fresh = self._plan.isolation == "per-model" or self._served == SUSPECTS_A_WORKER
        if self._engine is None or fresh or not self._engine.begin():
            self._discard()
            asks = any(mark.preset.source.needs != Need.TENSORS for mark in self._marks)
            self._engine = open_engine(self._plan.isolation, self._limits, self._plan.device, eager=asks)
        self._served += 1
        return self._engine

    def _discard(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._served = None, 0


class Hashes:
    """Which place has judged, or is judging, a file with this hash; shared by all threads."""

    def __init__(self, known: dict[str, int]) -> None:
        self._lock = threading.Lock()
        self._places = dict(known)

    def claim(self, sha256: str, place: int) -> int:
        """The first place that asked for this hash: this one's own, or that of an earlier copy."""
        with self._lock:
            return self._places.setdefault(sha256, place)


def judge_locally(
    plan: Plan, marks: Sequence[Watermark], places: Sequence[int], hashes: Hashes, jobs: int, limits: Limits
) -> Generator[list[Judged], None, None]:
    """Every suspect of `places`, in the order in which they are done, some at a time.

    Closing the iterator kills the workers and waits for its threads, but for no more than PATIENCE: one that a store
    or, without isolation, a model holds up ends with the process, or when it is let go.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in places:
        waiting.put(place)
    done: queue.Queue[Judged | BaseException] = queue.Queue(maxsize=64 * jobs)
    stop, ends = threading.Event(), threading.Event()
    judges = [Judge(plan, marks, limits, hashes) for _ in range(jobs)]

    # A judge and its worker take turns, so a processor for both of them costs nothing and keeps their caches warm.
    processors = available()
    bound = jobs == len(processors) and plan.isolation != "none" and plan.device == "cpu"

    def work(judge: Judge, number: int) -> None:
        try:
            if bound:
                keep_to({processors[number]})
            while not stop.is_set():
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                done.put(judge.judge(place))
        except BaseException as error:  # our own mistake, or no sandbox: the scan ends with it
            done.put(error)
        finally:
            ends.set()
            judge.close()

    threads = [
        threading.Thread(target=work, args=[judge, number], name=f"scan-{number}", daemon=True)
        for number, judge in enumerate(judges)
    ]
    for thread in threads:
        thread.start()
    try:
        left = len(places)
        while left:
            found = [done.get()]
            ends.wait(TOGETHER)
            found += [done.get_nowait() for _ in range(done.qsize())]
            judged = [each for each in found if isinstance(each, Judged)]
            if judged:
                yield judged
            for error in found:
                if isinstance(error, BaseException):
                    raise error
            left -= len(judged)
    finally:
        stop.set()
        until = time.monotonic() + PATIENCE
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
            for judge in judges:
                judge.interrupt()
            while not done.empty():  # whoever waits for room in the queue must see that it is over
                done.get_nowait()
            for thread in threads:
                thread.join(0.05)


def _said(error: Exception) -> str:
    if isinstance(error, SuspectError | OSError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{THIS} needs more memory than there is"
    return f"{THIS} cannot be judged ({type(error).__name__}: {one_line(error)})"
