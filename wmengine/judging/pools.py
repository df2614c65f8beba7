"""One suspect and a pool of inputs from whose answers all bits are read at once.

How the inputs are put, which output answers, from where its classes are counted and in which order they stand is chosen
by how many answers are those of the mark's base, the first control: no bit is in that, so it is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, SuspectGone
from wmengine.facts import Fact, fact
from wmengine.judging.answering import answers_of, named_by
from wmengine.judging.asking import ASKED_AGAIN, NO_ROOM, Terms
from wmengine.judging.exploring import Explored
from wmengine.judging.looks import looks_of_bits
from wmengine.judging.orders import best_order, names_given, reorder
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools
from wmengine.parts.responses.reading import log_probabilities, told, told_by_labels
from wmengine.parts.statistics.base import Test
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers, Suspect

Labels = NDArray[np.int64]

# A sequential test looks after these shares of the pool, first when ways are compared, each look with an equal share of
# the evidence (Bonferroni).
LOOKS = (1 / 32, 1 / 8, 1 / 2, 1)
FUTILE = -0.5  # log10 of the best p-value at a look, above which nothing more is asked: that convicts nobody
HEARD = 512  # answers before which that is not said: fewer say little of copies either
TRIED = 128  # probes by which ways are compared
_CHUNK = 512


class PoolTrial:
    """One suspect, and the marks of one pool: groups of those that share their geometry too. best: of each mark, in
    their order, the test at the look that said most, and log10 of this look's share."""

    def __init__(self, groups: Sequence[Sequence[Watermark]], suspect: Suspect, terms: Terms) -> None:
        self.marks, self.facts, self.queries = list(chain(*groups)), dict[Fact, None](), 0
        self._groups, self._suspect, self._terms, self._mark = groups, suspect, terms, groups[0][0]
        self._source = cast(Pools, self._mark.preset.source)
        self._classes = int(self._mark.parameters["num_classes"])
        self._first, self._column = 0, 0  # the suspect's name of class 0, and which of its outputs counts
        self._order: Labels | None = None
        self.best: list[tuple[Test, float]] = []

    def run(self) -> None:
        """Ask, as long as a mark is not proven and the next look may change that. Raises SuspectError."""
        if names_given(self._suspect.settings.get("labels"), self._mark):
            raise SuspectError(
                f"the answers to {self._mark.name} are read in an order that they show themselves: leave labels= out"
            )
        size = self._source.size(self._mark)
        room = min(size, self._suspect.limit(self._source.inputs(self._mark, AS_RECORDED, 0, 1), size))
        if not room:
            raise SuspectError(NO_ROOM)
        if room < size:
            self._note(fact("room", asked=room, total=size))
        count = int(self._mark.parameters["controls"])
        if isinstance(self._mark, Explored):
            self._note(fact("explored", probes=int(self._mark.parameters["pool"]), controls=count))
        else:
            self._note(fact("base_alone") if count == 1 else fact("controls", count=count))
        least = min(TRIED, room)
        stops = [max(least, round(room * share)) for share in LOOKS] if self._terms.sequential else [room]
        way, answers = self._choose(least)
        parts = [answers]
        for stop in stops:
            asked = sum(map(len, parts))
            parts += [self._ask(way, start, min(stop, start + _CHUNK)) for start in range(asked, stop, _CHUNK)]
            tests = self._tests(parts)
            # Budgets and deadlines are set by who asks: each place where they could have ended the pool is paid for.
            cut = room < size or any(part.unasked for part in parts)
            log10_share = -math.log10(len(stops) * (size if cut else 1))
            if not self.best:
                self.best = [(test, log10_share) for test in tests]
            self.best = [
                min(old, (test, log10_share), key=lambda each: each[0].log10_p - each[1])
                for old, test in zip(self.best, tests, strict=True)
            ]
            if all(self.proven(number) for number in range(len(tests))):
                break
            if self._terms.sequential and stop >= HEARD and all(test.log10_p > FUTILE for test in tests):
                break
        if self._terms.sequential and stop < room:
            done = self.proven(0)
            self._note(fact("stopped", queries=self.queries) if done else fact("given_up", queries=self.queries))
        if self._terms.ask_again or (not self._terms.provisional and any(map(self.proven, range(len(self.marks))))):
            self._ask_again(way, answers)

    def proven(self, number: int) -> bool:
        """Whether a mark's p-value has reached the bar."""
        return -self.log10_p(number) >= self._terms.log10_bar

    def log10_p(self, number: int) -> float:
        """log10 of a mark's p-value with all looks paid."""
        test, log10_share = self.best[number]
        return min(0.0, test.log10_p - log10_share)

    def _note(self, *facts: Fact) -> None:
        self.facts |= dict.fromkeys(facts)

    def _ask(self, way: Adapter, start: int, stop: int) -> Answers:
        inputs = {name: rows.copy() for name, rows in self._source.inputs(self._mark, way, start, stop).items()}
        answers = answers_of(self._suspect, inputs, self._classes)
        self._note(*self._suspect.facts)
        self.queries += len(answers) - len(answers.unasked)
        return answers

    def _choose(self, count: int) -> tuple[Adapter, Answers]:
        """The first way, of all that the declared inputs leave open, in which more of the first answers are the base's
        than of chance, or else the first that is answered at all; and these answers."""
        chosen: tuple[Adapter, Answers] | None = None
        failure = SuspectError(f"{self._suspect.name} can be asked in no way")
        for way in self._source.ways(self._mark, self._suspect, self._terms.every_way):
            try:
                answers = self._ask(way, 0, count)
            except SuspectGone:
                raise
            except SuspectError as error:
                failure = error
                continue
            found, column, first = self._agreed(answers, count)
            by_chance = self._by_chance(named_by(answers)[:, column] - first, count)
            agreed = found > by_chance + 3.0 * math.sqrt(max(by_chance, 1.0))
            if agreed or chosen is None:
                chosen = way, answers
            if agreed:
                break
        if chosen is None:
            raise failure
        way, answers = chosen
        _, self._column, self._first = self._agreed(answers, count)
        if str(way) != str(AS_RECORDED):
            self._note(fact("put_otherwise", adapter=str(way)))
        if self._first:
            self._note(fact("from_one"))
        return way, answers

    def _agreed(self, answers: Answers, count: int) -> tuple[int, int, int]:
        """In how many of the first answers the base's class is named, by which output, and counted from what."""
        named, likely = named_by(answers), self._source.likely(self._mark)[:count]
        readings = [
            (int((named[:, column] - first == likely).sum()), column, first)
            for column in range(named.shape[1])
            for first in ((0, 1) if answers.kind == "labels" else (0,))
        ]
        return max(readings, key=lambda each: each[0])

    def _by_chance(self, labels: Labels, count: int) -> float:
        """How many of so many answers would be the base's if neither looked at the inputs: both may favour a class."""
        own, base = (
            np.bincount(each[(each >= 0) & (each < self._classes)], minlength=self._classes)
            for each in (labels, self._source.likely(self._mark)[:count])
        )
        return float(own @ base) / count

    def _tests(self, parts: Sequence[Answers]) -> list[Test]:
        """What all answers so far say of each mark. Rows that name no class are left out: no bit says which."""
        if len({(part.kind, part.values.shape[1:]) for part in parts}) > 1:
            raise SuspectError(f"{self._suspect.name} changes the shape of its answers from one batch to the next")
        values = np.concatenate([part.values for part in parts])
        labels = np.concatenate([named_by(part)[:, self._column] for part in parts]) - self._first
        if self._terms.any_order and self._order is None:
            self._order = self._order_of(values, labels, parts[0].kind == "scores")
            self._note(
                fact("order_of_base", moved=int((self._order != np.arange(self._classes)).sum()), classes=self._classes)
            )
        if parts[0].kind == "scores":
            said = told(values if self._order is None else values[:, np.argsort(self._order)])
        else:
            said = told_by_labels(labels if self._order is None else reorder(labels, self._order), self._classes)
        there = np.flatnonzero(~np.isnan(said).any(axis=1))
        self._note(*self._missing(parts, len(said) - len(there)))
        tests = []
        for group in self._groups:
            y = self._source.observed(group[0], there, said[there])
            for mark, look in zip(group, looks_of_bits(y, [each.symbols for each in group]), strict=True):
                tests.append(mark.preset.test(mark, mark.total, sequential=False))
                tests[-1].add(look)
        return tests

    def _order_of(self, values: NDArray[Any], labels: Labels, scored: bool) -> Labels:
        """What each class of the suspect stands for: of scores those that go with the base's most, of labels those that
        are the base's most often."""
        if not scored:
            return best_order(labels, self._source.likely(self._mark)[: len(labels)], self._classes)[0]
        from scipy.optimize import linear_sum_assignment  # a third of a second, and most verdicts do without it

        own, base = (log_probabilities(each) for each in (values, self._source.known(self._mark)[: len(values)]))
        there = np.isfinite(own).all(axis=1)
        if not there.any():
            return np.arange(self._classes)
        own, base = (
            (each[there] - each[there].mean(axis=0)) / (each[there].std(axis=0) + 1e-9) for each in (own, base)
        )
        return np.asarray(linear_sum_assignment(own.T @ base, maximize=True)[1], np.int64)

    def _missing(self, parts: Sequence[Answers], count: int) -> list[Fact]:
        found, asked = [], sum(map(len, parts))
        for code in ("refused", "unasked"):
            reasons = [why for part in parts for why in getattr(part, code).values()]
            count -= len(reasons)
            if reasons:
                found.append(fact(code, count=len(reasons), reason=reasons[0]))
        return [*found, fact("left_out", count=count, asked=asked)] if count else found

    def _ask_again(self, way: Adapter, before: Answers) -> None:
        """A fact where the first probes, the other way round, are answered otherwise."""
        count = min(ASKED_AGAIN, len(before))
        inputs = self._source.inputs(self._mark, way, 0, count)
        try:
            answers = answers_of(
                self._suspect, {name: rows[::-1].copy() for name, rows in inputs.items()}, self._classes
            )
        except SuspectError as error:
            self._note(fact("not_again", count=count, reason=str(error)))
            return
        # What is not answered this time, as a budget was used up, shows nothing.
        again, first = named_by(answers)[::-1], named_by(before)[:count]
        differs = (again != ABSTAINED) & (again != first) if again.shape == first.shape else np.ones((count, 1), bool)
        changed = int(differs.any(axis=1).sum())
        if changed:
            self._note(fact("inconstant", changed=changed, asked=count))
