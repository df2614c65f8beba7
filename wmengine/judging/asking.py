"""One suspect against marks that ask: what to put to it next, and what its answers are worth.

A trial knows the expected symbols and never shows them: questions go out, answers come back and are looked at here.
Marks of one geometry (the same questions, other messages) are one trial. Questions are asked in the order in which the
key drew them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, SuspectGone
from wmengine.facts import Fact, fact
from wmengine.judging.answering import (
    answers_of,
    classes_of,
    interpreted,
    members_of,
    named_by,
    reader_of,
    rows_between,
    width_of,
)
from wmengine.judging.hypotheses import Hypothesis, reading_facts, readings_of
from wmengine.judging.looks import looks_of_labels, looks_of_scores
from wmengine.judging.orders import CleanData, best_order, names_given, order_of_names, reorder
from wmengine.judging.questions import put
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import inputs_of
from wmengine.parts.statistics.base import Evidence, Look
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers, Inputs, Suspect

TESTS = ("fixed", "sequential")
FIRST_LOOK, NEXT_LOOK = 16, 8
ASKED_AGAIN = 8
GIVEN_UP = ("futile", "exhausted")
NO_ROOM = "there is no room left to ask it anything: its budget or its time is used up, or it was given up before"

Labels = NDArray[np.int64]


class Ask(NamedTuple):
    """Questions `start` … `stop` of a geometry, to be put in this way."""

    way: Adapter
    start: int
    stop: int


@dataclass
class _Round:
    """What one way of putting questions has brought so far. There are no hypotheses before the first answers."""

    way: Adapter
    total: int  # questions that its tests are of
    asked: int = 0
    hypotheses: list[Hypothesis] = field(default_factory=list)
    outputs: int = 0
    first: Labels | None = None  # the answers [n, R] to the first questions, to be asked again
    abstained: int = 0
    outside: int = 0  # answers that name a class beyond the mark's
    unasked: list[str] = field(default_factory=list)  # why, one for each question that was not asked
    refused: list[str] = field(default_factory=list)
    clean: Labels | None = None  # the answers [M, R] to clean inputs
    failure: SuspectError | None = None  # why there are no answers


@dataclass(frozen=True)
class Terms:
    """What the tests of a suspect have in common, fixed before the first question.

    sequential: stop when the answer is clear, else ask everything. log10_bar: −log10 of what p must reach, all tests of
    the same scan paid. every_way: put questions in unlikely ways too. any_order: the suspect's classes may stand in
    another order, which is estimated on clean data, or without them, in the fixed test, every order is tried and paid
    for: half of the evidence is for them, half for the order recorded. ask_again: look whether answers depend on the
    batch even where nothing is proven. provisional: not even then, as who is proven is judged once more.
    """

    sequential: bool
    log10_bar: float
    every_way: bool = True
    any_order: bool = False
    clean: CleanData | None = None
    ask_again: bool = False
    provisional: bool = False


class Trial:
    """One suspect, the marks of one geometry.

    The source says in which ways to put the questions, each with its share of the evidence; the next is tried where the
    one before has not proven every mark.
    """

    def __init__(self, marks: Sequence[Watermark], suspect: Suspect, terms: Terms) -> None:
        self.marks = list(marks)
        self.num_classes, self.width = classes_of(marks[0]), width_of(marks[0])
        # Answers that only the mark's source can read are asked for alone.
        self.reader = marks[0].geometry if reader_of(marks[0]) else ""
        self.error: SuspectError | None = None  # why the suspect cannot be judged
        self._suspect, self._terms = suspect, terms
        self._ways: list[Adapter] = []  # those still to be tried
        self._rounds: list[_Round] = []
        self._said: dict[Fact, None] = {}  # by the suspect, of how it was asked
        self._names_paid = names_given(suspect.settings.get("labels"), marks[0])
        self._named: Labels | None = None  # of each class of the suspect the mark's of that name
        self._known: dict[int, float] = {}  # p-values since the last answers
        try:
            if self.reader and self._names_paid:  # whose order moves what the source reads, unpaid
                raise SuspectError(
                    f"the answers to {marks[0].name} are read as they stand: leave labels= out, or give those that it "
                    "was made with (class_names=)"
                )
            self._ways += marks[0].preset.asks.ways(marks[0], suspect, terms.every_way)
        except SuspectError as error:
            self.error = error
        self._possible = len(self._ways)

    def next(self) -> Ask | None:
        """What to ask now; None when the trial is over. The same until its answers are added."""
        if self.error is not None:
            return None
        if not self._rounds or self._is_over(self._rounds[-1]):
            done = not self._ways or all(map(self.proven, range(len(self.marks))))
            if done or not self._open(self._ways.pop(0)):
                return None
        current = self._rounds[-1]
        look = current.total if not self._terms.sequential else FIRST_LOOK if current.asked == 0 else NEXT_LOOK
        return Ask(current.way, current.asked, min(current.total, current.asked + look))

    def note(self, facts: Iterable[Fact]) -> None:
        """What the suspect said of how it was asked."""
        self._said |= dict.fromkeys(facts)

    def expected(self, ask: Ask) -> list[Labels]:
        """The labels of each mark for what is asked."""
        return [mark.symbols[ask.start : ask.stop].astype(np.int64, copy=False) for mark in self.marks]

    def order(self, names: Sequence[str]) -> Labels | None:
        """For each class of the mark the suspect's that stands for it, where clean data or their names say so."""
        current = self._rounds[-1]
        if current.hypotheses:
            order = current.hypotheses[0].order
        elif self._terms.clean is not None and current.clean is not None and current.clean.shape[1] == 1:
            order = best_order(current.clean[:, 0], self._terms.clean.labels, self.num_classes)[0]
        else:
            order = order_of_names(names, self.marks[0])
        return None if order is None else np.argsort(order)

    def add(self, answers: Answers, looks: list[Look] | None = None) -> None:
        """The answers to what `next` asked; looks: where they are scores, what these say of each mark.

        Raises SuspectError where the number of outputs has changed.
        """
        current = self._rounds[-1]
        self._known.clear()
        ask = Ask(current.way, current.asked, current.asked + len(answers))
        expected = self.expected(ask)
        predicted = named_by(answers)
        if ask.start == 0:
            self._named = order_of_names(answers.names, self.marks[0])
            self._begin(current, predicted, single=answers.kind == "labels")
        predicted = _columns(current, predicted)
        if ask.start == 0:
            current.first = predicted[:ASKED_AGAIN]
        current.asked += len(predicted)
        missing = len(answers.unasked) + len(answers.refused)
        current.abstained += int((predicted.max(axis=1) == ABSTAINED).sum()) - missing
        current.outside += int((predicted > self.num_classes).all(axis=1).sum())
        current.unasked += answers.unasked.values()
        current.refused += answers.refused.values()
        for hypothesis in current.hypotheses:
            classes = hypothesis.classes(predicted)
            if hypothesis.order is not None:
                classes = reorder(classes, hypothesis.order)
            hypothesis.add(looks if looks is not None else looks_of_labels(classes, expected, self.num_classes))
            if self._names_paid:
                hypothesis.pay_names(classes, missing, self.num_classes, scored=looks is not None)
            if self._terms.any_order and self._terms.clean is None:
                hypothesis.try_orders(classes, expected, self.num_classes)

    def fail(self, error: SuspectError) -> None:
        """There are no answers to what `next` asked. If nothing was asked in this layout before, another may be what
        the suspect takes; the share of this one is spent. What is proven stays so.
        """
        current = self._rounds[-1]
        current.failure = error
        if current.asked or isinstance(error, SuspectGone):
            self.error = SuspectError(str(error))  # of its task, or gone
            return
        self._ways = [each for each in self._ways if each.layout != current.way.layout]
        if not self._ways and not self._answered:
            self.error = self._rounds[0].failure

    def clean_inputs(self) -> dict[str, NDArray[Any]] | None:
        """What to ask before the questions that `next` names, for `add_clean`; None where nothing is.

        Raises SuspectError where there is room for none of the questions beside them.
        """
        current, clean = self._rounds[-1], self._terms.clean
        if clean is None or current.clean is not None:
            return None
        scale = self.marks[0].parameters["value_range"]
        (name,) = inputs_of(self.marks[0].parameters)
        way = current.way.inputs if clean.inputs.dtype == np.uint8 else current.way.recorded_inputs
        rows = way(clean.inputs, scale)
        room = self._suspect.limit({name: rows}, len(rows) + 1)
        if room <= len(rows):
            raise SuspectError(
                f"there is room for {room} inputs, and {len(rows)} are clean ones: give fewer of those, or a larger "
                "budget"
            )
        return {name: rows.copy()}

    def add_clean(self, answers: Answers) -> None:
        """The answers to the clean inputs: they say in which order the suspect's classes stand.

        Raises SuspectError where there is no room for a question any more.
        """
        current = self._rounds[-1]
        current.clean = named_by(answers)
        current.total = self._room(current.way)  # less than before the clean inputs
        if not current.total:
            why = next(iter(answers.unasked.values()), "give fewer of them")
            raise SuspectError(f"{len(answers)} clean inputs have left no room for a trigger: {why}")

    @property
    def queries(self) -> int:
        """Questions really asked, in all ways together."""
        return members_of(self.marks[0]) * sum(current.asked - len(current.unasked) for current in self._rounds)

    def total(self, mark: int) -> int:
        """Symbols that the test is of, with the hypothesis that did best: all, or what there was room for."""
        return self._best(mark)[1].tests[mark].total if self._answered else self.marks[mark].total

    def matched(self, mark: int) -> int:
        """Matches of the hypothesis that did best."""
        return self._best(mark)[1].matched(mark) if self._answered else 0

    def log10_p(self, mark: int) -> float:
        """log10 of the p-value with every hypothesis paid."""
        if mark not in self._known:
            self._known[mark] = min([0.0, *(self._paid_log10_p(hypothesis, mark) for _, hypothesis in self._tried)])
        return self._known[mark]

    def log10_e(self, mark: int) -> float | None:
        """log10 of the e-value at the end of a sequential trial, hypotheses paid; None for a fixed test."""
        if not self._terms.sequential or not self._answered:
            return None
        found = [(each.tests[mark].log10_e, math.log10(each.share) - each.log10_names) for _, each in self._tried]
        return max((log10_e + share for log10_e, share in found if log10_e is not None), default=None)

    def evidence(self, mark: int) -> Evidence | None:
        """What log10_p is computed from, the hypothesis that counts; None before any answer."""
        if not self._answered:
            return None
        _, best = self._best(mark)
        return best.evidence(mark, math.log10(best.share))

    def proven(self, mark: int) -> bool:
        """Whether the p-value has reached the bar."""
        return -self.log10_p(mark) >= self._terms.log10_bar

    def facts(self, mark: int) -> list[Fact]:
        """What was assumed and what happened, for the verdict."""
        if not self._answered:
            return []
        current, best = self._best(mark)
        found = [*self._said]
        if len(self.marks) > 1:
            found.append(fact("shared", marks=len(self.marks)))
        if str(current.way) != str(AS_RECORDED):
            found.append(fact("put_otherwise", adapter=str(current.way)))
        if self._possible > 1:
            found.append(fact("ways_paid", tried=len(self._rounds), possible=self._possible))
        failed = [each for each in self._rounds if each.failure is not None]
        found += [fact("way_failed", adapter=str(each.way), reason=str(each.failure)) for each in failed]
        found += reading_facts(current.hypotheses, best)
        if current.total < self.marks[mark].total:
            found.append(fact("room", asked=current.total, total=self.marks[mark].total))
        if current.refused:
            found.append(fact("refused", count=len(current.refused), reason=current.refused[0]))
        if current.unasked:
            found.append(fact("unasked", count=len(current.unasked), reason=current.unasked[0]))
        if current.abstained:
            found.append(fact("abstained", count=current.abstained, asked=current.asked))
        if current.outside:
            found.append(fact("outside", count=current.outside, asked=current.asked, classes=self.num_classes))
        found += self._order_facts(mark, best)
        if self._terms.sequential and not current.unasked:
            futile = best.tests[mark].decision == "futile"
            if futile and not self.proven(mark):
                found.append(fact("given_up", queries=self.queries))
            if self.proven(mark) and current.asked < current.total:
                found.append(fact("stopped", queries=self.queries))
        return found

    def ask_again(self) -> list[Fact]:
        """A fact where the first questions, put in another order and twice over, are answered otherwise than before.

        Such a suspect computes an answer from the whole batch, or at random. What was counted stays as it is: the
        p-value holds whatever the answers depend on.
        """
        if not self._answered:
            return []
        current, _ = self._best(0)
        first = current.first
        if first is None or len(first) < 2:
            return []
        again, members = np.repeat(np.arange(len(first))[::-1], 2), members_of(self.marks[0])
        rows_again = (again[:, None] * members + np.arange(members)).ravel()
        inputs = {name: rows[rows_again] for name, rows in put(self.marks[0], current.way, 0, len(first)).items()}
        try:
            answers = answers_of(self._suspect, inputs, self.width)
            predicted = _columns(current, named_by(interpreted(self.marks[0], again, answers)))
        except SuspectError as error:
            return [fact("not_again", count=len(again), reason=str(error))]
        # What is not answered this time, as a budget was used up, shows nothing.
        differs = ((predicted != first[again]) & (predicted != ABSTAINED)).any(axis=1)
        changed = len(set(again[differs].tolist()))
        return [fact("inconstant", changed=changed, asked=len(first))] if changed else []

    def _begin(self, current: _Round, predicted: Labels, single: bool) -> None:
        """Fix the hypotheses of a round."""
        current.outputs = predicted.shape[1]
        clean = None if current.clean is None else _columns(current, current.clean)
        seen = predicted[:, 0] if clean is None else np.concatenate([predicted[:, 0], clean[:, 0]])
        chance = self.marks[0].preset.chance(self.marks[0].parameters)
        # The moments at which the ways before were given up are all that a suspect can know of the symbols: each is
        # paid, so that nothing is gained by answering otherwise after some than after others.
        before = self._rounds[:-1] if self._terms.sequential else []
        moments = math.prod(1 + len(range(FIRST_LOOK, each.total, NEXT_LOOK)) for each in before if each.asked)
        for output, first, share in readings_of(predicted, seen, self.num_classes, single):
            share *= current.way.share / moments
            tests = [mark.preset.test(mark, current.total, self._terms.sequential) for mark in self.marks]
            hypothesis = Hypothesis(share, output, first, chance, tests, self._named)
            if self._terms.clean is not None and clean is not None:
                found = best_order(hypothesis.classes(clean), self._terms.clean.labels, self.num_classes)
                hypothesis.order, hypothesis.agreed = found
            current.hypotheses.append(hypothesis)

    @property
    def _tried(self) -> list[tuple[_Round, Hypothesis]]:
        return [(current, hypothesis) for current in self._rounds for hypothesis in current.hypotheses]

    @property
    def _answered(self) -> bool:
        return any(current.hypotheses for current in self._rounds)

    def _open(self, way: Adapter) -> bool:
        """Begin a round, or say that there is no room for it, nor for another."""
        try:
            room = self._room(way)
            if room:
                self._rounds.append(_Round(way, room))
                return True
            why = SuspectError(NO_ROOM)
        except SuspectError as error:
            why = error
        self._ways = []
        if not self._answered:
            self.error = self._rounds[0].failure if self._rounds else why
        return False

    def _room(self, way: Adapter) -> int:
        first, total, members = self.marks[0], self.marks[0].total, members_of(self.marks[0])
        room = self._suspect.limit(put(first, way, 0, min(FIRST_LOOK, total)), total * members)
        return min(total, room // members)

    def _is_over(self, current: _Round) -> bool:
        if current.failure is not None or current.unasked:  # nor will the others be answered
            return True
        if current.asked == current.total:
            return True
        return bool(current.hypotheses) and all(
            self.proven(mark) or all(each.tests[mark].decision in GIVEN_UP for each in current.hypotheses)
            for mark in range(len(self.marks))
        )

    def _best(self, mark: int) -> tuple[_Round, Hypothesis]:
        tried = self._tried
        return tried[0] if len(tried) == 1 else min(tried, key=lambda each: self._paid_log10_p(each[1], mark))

    def _paid_log10_p(self, hypothesis: Hypothesis, mark: int) -> float:
        return hypothesis.log10_p(mark) - math.log10(hypothesis.share)

    def _order_facts(self, mark: int, best: Hypothesis) -> list[Fact]:
        found = []
        moved = 0 if best.order is None else int((best.order != np.arange(self.num_classes)).sum())
        if self._terms.clean is None and moved:
            found.append(fact("order_of_names", moved=moved, classes=self.num_classes))
        if self._terms.clean is not None and best.order is not None:
            count, agreed = len(self._terms.clean.labels), best.agreed
            found.append(fact("order_of_clean", moved=moved, classes=self.num_classes, count=count, agreed=agreed))
        if self._names_paid:
            found.append(fact("names_paid", log10_orders=best.log10_names))
        if best.any_order:
            orders, total = best.any_order[mark].log10_orders, best.tests[mark].total
            found.append(fact("reordered" if best.reordered(mark) else "orders_paid", log10_orders=orders))
            least = math.log10(2.0) + orders + total * math.log10(best.chance) - math.log10(best.share)
            if -least < self._terms.log10_bar:
                found.append(fact("orders_too_many", total=total, classes=self.num_classes))
        return found


def _columns(current: _Round, predicted: Labels) -> Labels:
    """Predictions as [n, R] of as many outputs as answered first; no answers at all are none of each."""
    if (predicted == ABSTAINED).all():
        return np.full((len(predicted), current.outputs), ABSTAINED, np.int64)
    if predicted.shape[1] != current.outputs:
        raise SuspectError(
            f"the suspect answers with {current.outputs} outputs at first and then with {predicted.shape[1]}"
        )
    return predicted


def run_trials(suspect: Suspect, trials: Sequence[Trial]) -> None:
    """Ask until every trial is over, all trials together where they put questions the same way.

    Where the suspect cannot answer, the trials that asked go on with another layout or have an error.
    """
    while True:
        groups: dict[tuple[Any, ...], list[tuple[Trial, Ask, Inputs]]] = {}
        for trial in trials:
            ask = _next(suspect, trial)
            if ask is not None:
                inputs = put(trial.marks[0], *ask)
                like = tuple((name, rows.shape[1:], rows.dtype) for name, rows in inputs.items())
                groups.setdefault((ask.way, trial.width, trial.reader, like), []).append((trial, ask, inputs))
        if not groups:
            return
        for asked in groups.values():
            asks = [(trial, ask) for trial, ask, _ in asked]
            try:
                _ask(suspect, asks, [inputs for _, _, inputs in asked])
            except SuspectError as error:
                for trial, _ in asks:
                    trial.fail(error)


def _next(suspect: Suspect, trial: Trial) -> Ask | None:
    """What the trial asks next, once the clean inputs that come before it have been put to the suspect."""
    while (ask := trial.next()) is not None:
        try:
            clean = trial.clean_inputs()
            if clean is None:
                return ask
            trial.add_clean(answers_of(suspect, clean, trial.width))
            trial.note(suspect.facts)
        except SuspectError as error:
            trial.fail(error)
    return None


def _ask(suspect: Suspect, asks: Sequence[tuple[Trial, Ask]], parts: Sequence[Inputs]) -> None:
    """Put what trials of one way and number of classes ask, and hand them their answers."""
    # A copy, also of a single part: a model may write into what it is given.
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    (trial, ask), *_ = asks
    answers = answers_of(suspect, inputs, trial.width)
    if trial.reader:  # the only one
        answers = interpreted(trial.marks[0], np.arange(ask.start, ask.stop), answers)
    looks: list[list[Look] | None] = [None] * len(asks)
    if answers.kind == "scores":
        looks = [*_scored(answers, asks)]
    at = 0
    for (trial, ask), seen in zip(asks, looks, strict=True):
        end = at + ask.stop - ask.start
        trial.note(suspect.facts)
        try:
            trial.add(rows_between(answers, at, end), seen)
        except SuspectError as error:
            trial.fail(error)
        at = end


def _scored(answers: Answers, asks: Sequence[tuple[Trial, Ask]]) -> list[list[Look]]:
    """What scores say of each trial's marks, in one pass; where clean data or names gave an order, in that order."""
    scores, orders = answers.values, [trial.order(answers.names) for trial, _ in asks]
    if any(order is not None for order in orders):
        scores, at = scores.copy(), 0
        for (_, ask), order in zip(asks, orders, strict=True):
            end = at + ask.stop - ask.start
            if order is not None:
                scores[at:end] = scores[at:end][:, order]
            at = end
    return [found.looks for found in looks_of_scores(scores, [trial.expected(ask) for trial, ask in asks])]
