"""What one suspect says about one mark or many: the findings behind a verdict and behind a scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

from wmengine.errors import OtherTask, SuspectError
from wmengine.facts import Fact, fact
from wmengine.judging.answering import offers
from wmengine.judging.asking import Terms, Trial, run_trials
from wmengine.judging.looks import looks_of_bits
from wmengine.judging.pools import PoolTrial
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Need, Pools
from wmengine.parts.statistics.base import Evidence, Test
from wmengine.suspects.base import Suspect, one_line


@dataclass(frozen=True)
class Finding:
    """matched of total symbols after `queries` questions; log10_p with all hypotheses paid, log10_e where it is an
    e-value's.

    evidence: what log10_p is computed from, None where nothing was read. Where `error` says why the mark could not be
    looked for, the numbers say nothing; other_task: as in a model that has nothing to do with it.
    """

    matched: int
    total: int
    queries: int
    log10_p: float
    log10_e: float | None = None
    facts: tuple[Fact, ...] = ()
    error: str | None = None
    evidence: Evidence | None = None
    other_task: bool = False


def failed(mark: Watermark, error: BaseException | str) -> Finding:
    """A mark that the suspect could not be judged by."""
    return Finding(0, mark.total, 0, 0.0, error=str(error), other_task=isinstance(error, OtherTask))


def judge_suspect(suspect: Suspect, marks: Sequence[Watermark], terms: Terms) -> list[Finding]:
    """One finding for each mark. A mark that the suspect cannot be judged by has an error, and the others go on.

    Whatever goes wrong while a suspect is read or asked is that suspect's error. It is asked before it is read: weights
    that are made to be too many end its worker.
    """
    geometries: dict[str, list[int]] = {}
    for index, mark in enumerate(marks):
        geometries.setdefault(mark.geometry, []).append(index)
    findings: dict[int, Finding] = {}
    asking: dict[tuple[int, ...], list[Watermark]] = {}
    pools: dict[str, dict[tuple[int, ...], list[Watermark]]] = {}
    reading: dict[tuple[int, ...], list[Watermark]] = {}
    for indices in geometries.values():
        group = [marks[index] for index in indices]
        source = group[0].preset.source
        if offers(type(source), Pools):
            pools.setdefault(cast(Pools, source).pool(group[0]), {})[tuple(indices)] = group
        else:
            (asking if source.needs == Need.ANSWERS else reading)[tuple(indices)] = group
    findings.update(zip(chain(*asking), _asked(suspect, [*asking.values()], terms), strict=True))
    for pool in pools.values():
        findings.update(zip(chain(*pool), _pooled(suspect, [*pool.values()], terms), strict=True))
    for places, group in reading.items():
        findings.update(zip(places, _read(suspect, group), strict=True))
    return [findings[index] for index in range(len(marks))]


def _asked(suspect: Suspect, groups: Sequence[Sequence[Watermark]], terms: Terms) -> list[Finding]:
    try:
        trials = [Trial(marks, suspect, terms) for marks in groups]
        run_trials(suspect, trials)
        return [found for trial in trials for found in _concluded(trial, terms)]
    except SuspectError as error:
        reason = error
    except Exception as error:  # what a suspect makes our own code do is its fault too
        reason = SuspectError(f"{suspect.name} cannot be judged ({one_line(error)})")
    return [failed(mark, reason) for marks in groups for mark in marks]


def _concluded(trial: Trial, terms: Terms) -> list[Finding]:
    """The findings of a trial that is over. A proven suspect is asked some questions once more, in other batches."""
    proven = [trial.proven(number) for number in range(len(trial.marks))]
    doubted = (any(proven) and not terms.provisional) or (terms.ask_again and trial.error is None)
    again = trial.ask_again() if doubted else []
    return [
        # What was proven before the suspect failed, while it was asked for another mark, stays proven.
        failed(mark, trial.error)
        if trial.error is not None and not proven[number]
        else Finding(
            trial.matched(number),
            trial.total(number),
            trial.queries,
            trial.log10_p(number),
            trial.log10_e(number),
            tuple(dict.fromkeys([*trial.facts(number), *again])),
            evidence=trial.evidence(number),
        )
        for number, mark in enumerate(trial.marks)
    ]


def _pooled(suspect: Suspect, groups: Sequence[Sequence[Watermark]], terms: Terms) -> list[Finding]:
    """Marks of one pool, which is asked once for all of them."""
    trial, reason = PoolTrial(groups, suspect, terms), None
    try:
        trial.run()
    except SuspectError as error:
        reason = error
    except Exception as error:  # what a suspect makes our own code do is its fault too
        reason = SuspectError(f"{suspect.name} cannot be judged ({one_line(error)})")
    return [
        # What was proven before the suspect failed, while it was asked for another mark, stays proven.
        failed(mark, reason)
        if reason is not None and not (trial.best and trial.proven(number))
        else Finding(
            trial.best[number][0].matched,
            mark.total,
            trial.queries,
            trial.log10_p(number),
            facts=tuple(trial.facts),
            evidence=trial.best[number][0].evidence(trial.best[number][1]),
        )
        for number, mark in enumerate(trial.marks)
    ]


def _read(suspect: Suspect, marks: Sequence[Watermark]) -> list[Finding]:
    """Bits that are all there at once, in every way to find them; the best one counts, after paying for all."""
    first = marks[0]
    try:
        observed = first.preset.reads.observe(first, suspect, first.total)
        shared = [fact("shared", marks=len(marks))] if len(marks) > 1 else []
        facts = tuple(dict.fromkeys([*observed.facts, *shared]))
        if not observed.found:
            return [Finding(0, 0, 0, 0.0, facts=facts) for _ in marks]
        tried: list[tuple[float, list[Test]]] = []
        for observation in observed.found:
            looks = looks_of_bits(observation.y, [mark.symbols for mark in marks])
            tests = [mark.preset.test(mark, mark.total, sequential=False) for mark in marks]
            for test, look in zip(tests, looks, strict=True):
                test.add(look)
            tried.append((math.log10(observation.share), tests))
        return [_best(tried, number, facts) for number in range(len(marks))]
    except SuspectError as error:
        reason = error
    except Exception as error:  # what a suspect makes our own code do is its fault too
        reason = SuspectError(f"{suspect.name} cannot be judged ({one_line(error)})")
    return [failed(mark, reason) for mark in marks]


def _best(tried: Sequence[tuple[float, list[Test]]], number: int, facts: tuple[Fact, ...]) -> Finding:
    log10_share, tests = min(tried, key=lambda each: each[1][number].log10_p - each[0])
    best = tests[number]
    log10_p = min(0.0, best.log10_p - log10_share)
    return Finding(best.matched, best.total, 0, log10_p, facts=facts, evidence=best.evidence(log10_share))
