"""One suspect against black-box marks: which triggers to ask next, and what the answers are worth.

A trial knows the labels and never shows them: triggers go out, predictions come back and are counted here. Triggers are
asked in the order in which the key drew them. Each adapter has a fixed share of the evidence; the p-value is the least
of p_a / share_a over those that were tried, and never above 1, which no order of trying can inflate (Bonferroni).

An adapter's share is divided among the meanings that the answers may have: which of several outputs is the answer, and
whether labels are counted from 0 or from 1. Which of them come into question is told from the first answers, before any
is compared with its label, and does not change after that.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError, SuspectGone
from wmengine.reordering import CleanData, best_order, log10_orders, reorder, used_classes
from wmengine.schemes import symbol_chance
from wmengine.sequential import SequentialTest
from wmengine.stats import Evidence, binomial_log10_tail
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.answers import ABSTAINED, highest
from wmengine.suspects.base import Suspect
from wmengine.watermark import Watermark

MODES = ("all", "sequential")
FIRST_LOOK, NEXT_LOOK = 16, 8
ASKED_AGAIN = 8
NO_ROOM = "there is no room left to ask it anything: its budget or its time is used up, or it was given up before"

Labels = NDArray[np.int64]


class Ask(NamedTuple):
    """Triggers `start` … `stop` of a mark, to be put by this adapter."""

    adapter: Adapter
    start: int
    stop: int


@dataclass
class _Meaning:
    """One way to understand the answers to one adapter's triggers, with its share of that adapter's evidence."""

    output: int  # which of the outputs that may be the answer
    first: int  # what the suspect calls class 0
    share: float
    test: SequentialTest
    order: Labels | None = None  # what each class of the suspect stands for, estimated on clean data
    agreed: int = 0  # clean inputs that the suspect answers rightly in that order
    any_matched: int = 0  # in the order with most matches, where every order is tried
    any_log10_orders: float = 0.0

    def classes(self, predicted: Labels) -> Labels:
        """Answers [n, R] as classes, in the suspect's order; below 0 what is none."""
        column = predicted[:, self.output]
        return np.where(column >= self.first, column - self.first, ABSTAINED) if self.first else column


@dataclass
class _Attempt:
    """What one adapter has brought so far. There are no meanings before the first answers."""

    adapter: Adapter
    total: int  # triggers that its tests are of
    asked: int = 0
    meanings: list[_Meaning] = field(default_factory=list)
    outputs: int = 0
    first: Labels | None = None  # the answers [n, R] to the first triggers, to be asked again
    abstained: int = 0
    unasked: list[str] = field(default_factory=list)  # why, one for each trigger that was not asked
    refused: list[str] = field(default_factory=list)
    clean: Labels | None = None  # the answers [M, R] to clean inputs
    failure: str | None = None  # why there are no answers


class Trial:
    """One suspect, one black-box mark.

    mode: "all" asks every trigger and reports the binomial tail; "sequential" stops when the answer is clear.
    log10_bar: −log10 of what p must reach, all tests of the same scan paid. adapters: the ways to put triggers, in this
    order, each with its share of the evidence; the next is tried when the one before has not proven the suspect.
    any_order: the suspect's classes may stand in another order. It is estimated on clean data, or without them, and
    with mode "all", every order is tried and paid for: half of the evidence is for them, half for the order recorded.
    limit: how many of an adapter's inputs there is room for; it is asked before the first of them, and the test is then
    of so many triggers, the first ones.
    """

    def __init__(
        self,
        mark: Watermark,
        adapters: Sequence[Adapter],
        mode: str,
        log10_bar: float,
        any_order: bool = False,
        clean: CleanData | None = None,
        limit: Callable[[NDArray[Any]], int] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, and it is {mode!r}")
        if any_order and clean is None and mode != "all":
            raise ValueError(
                'classes in any order, without clean data, need the mode "all": the order fits all answers'
            )
        self.mark = mark
        self.num_classes = int(mark.parameters["num_classes"])
        self.mode = mode
        self._labels: Labels = mark.arrays["labels"]
        self._log10_bar = log10_bar
        self._try_orders = any_order and clean is None
        self._clean = clean if any_order else None
        self._adapters = list(adapters)  # those still to be tried
        self._limit = limit
        self.error: str | None = None  # why the suspect cannot be judged
        self._attempts: list[_Attempt] = []

    def next(self) -> Ask | None:
        """What to ask now; None when the trial is over. The same until its answers are added."""
        if self.error is not None:
            return None
        if self._attempts and not self._is_over(self._attempts[-1]):
            attempt = self._attempts[-1]
        elif self.proven or not self._adapters:
            return None
        else:
            adapter = self._adapters.pop(0)
            try:
                attempt = _Attempt(adapter, self._room(adapter))
            except SuspectError as error:
                self.error = str(error)
                return None
            if not attempt.total:  # nor is there room for another way
                self._adapters = []
                if not self._answered:
                    self.error = self._attempts[0].failure if self._attempts else NO_ROOM
                return None
            self._attempts.append(attempt)
        look = attempt.total if self.mode == "all" else FIRST_LOOK if attempt.asked == 0 else NEXT_LOOK
        return Ask(attempt.adapter, attempt.asked, min(attempt.total, attempt.asked + look))

    def add(self, predicted: Labels, unasked: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        """The predictions for what `next` asked: labels [n] as the suspect numbers them, or classes [n, R] that R
        outputs of scores name; ABSTAINED where there was no answer. Raises SuspectError where R has changed.

        unasked and refused: why, for each of those that were never asked or not answered in a readable way.
        """
        attempt = self._attempts[-1]
        start = attempt.asked
        expected = self._labels[start : start + len(predicted)]
        if start == 0:
            attempt.meanings = self._meanings(attempt, predicted)
        predicted = self._columns(attempt, predicted)
        if start == 0:
            attempt.first = predicted[:ASKED_AGAIN]
        attempt.asked += len(predicted)
        attempt.abstained += int((predicted.max(axis=1) == ABSTAINED).sum()) - len(unasked) - len(refused)
        attempt.unasked += unasked
        attempt.refused += refused
        for meaning in attempt.meanings:
            classes = meaning.classes(predicted)
            if meaning.order is not None:
                classes = reorder(classes, meaning.order)
            meaning.test.add(int((classes == expected).sum()), len(predicted))
            if self._try_orders:
                _, meaning.any_matched = best_order(classes, expected, self.num_classes)
                meaning.any_log10_orders = log10_orders(self.num_classes, used_classes(classes, self.num_classes))

    def fail(self, error: SuspectError) -> None:
        """There are no answers to what `next` asked. If nothing was asked in this layout before, another may be what
        the suspect takes; the share of this one is spent.
        """
        attempt = self._attempts[-1]
        attempt.failure = str(error)
        if attempt.asked or isinstance(error, SuspectGone):
            self.error = attempt.failure
            return
        self._adapters = [each for each in self._adapters if each.layout != attempt.adapter.layout]
        if not self._adapters and not self._answered:
            self.error = self._attempts[0].failure

    def clean_inputs(self) -> NDArray[Any] | None:
        """What to ask before the triggers that `next` names, for `add_clean`; None where nothing is.

        Raises SuspectError where there is room for none of the triggers beside them.
        """
        attempt = self._attempts[-1]
        if self._clean is None or attempt.clean is not None:
            return None
        inputs, scale = self._clean.inputs, self.mark.parameters["value_range"]
        put = (attempt.adapter.inputs if inputs.dtype == np.uint8 else attempt.adapter.recorded_inputs)(inputs, scale)
        if self._limit is not None:
            room = self._limit(np.concatenate([put, put[:1]]))
            if room <= len(put):
                raise SuspectError(
                    f"there is room for {room} inputs, and {len(put)} are clean ones: give fewer of those, or a larger "
                    "budget"
                )
        return put

    def add_clean(self, predicted: Labels, unasked: Iterable[str] = ()) -> None:
        """The predictions for the clean inputs: they say in which order the suspect's classes stand.

        unasked: see `add`. Raises SuspectError where there is no room for a trigger any more.
        """
        attempt = self._attempts[-1]
        attempt.clean = predicted.reshape(len(predicted), -1)
        attempt.total = self._room(attempt.adapter)  # less than before the clean inputs
        if not attempt.total:
            why = next(iter(unasked), "give fewer of them")
            raise SuspectError(f"{len(predicted)} clean inputs have left no room for a trigger: {why}")

    @property
    def queries(self) -> int:
        """Triggers really asked, all adapters together."""
        return sum(attempt.asked - len(attempt.unasked) for attempt in self._attempts)

    @property
    def total(self) -> int:
        """Triggers that the test is of, with the try that did best: all, or what there was room for beforehand."""
        return self._best()[1].test.total if self._answered else len(self._labels)

    @property
    def matched(self) -> int:
        """Matches of the try that did best."""
        if not self._answered:
            return 0
        _, best = self._best()
        return best.any_matched if self._is_reordered(best) else best.test.matched

    @property
    def log10_p(self) -> float:
        """log10 of the p-value with every try paid."""
        return min([0.0, *(self._paid_log10_p(attempt, meaning) for attempt, meaning in self._tries)])

    @property
    def log10_e(self) -> float | None:
        """log10 of the e-value at the end of a sequential trial, tries paid; None for a fixed test."""
        if self.mode == "all" or not self._answered:
            return None
        return max(meaning.test.log10_e + _log10_share(attempt, meaning) for attempt, meaning in self._tries)

    @property
    def evidence(self) -> Evidence | None:
        """What log10_p is computed from, the try that counts; None before any answer."""
        if not self._answered:
            return None
        attempt, best = self._best()
        share, test = _log10_share(attempt, best), best.test
        if self.mode == "sequential":
            return Evidence("sequential", *test.peak, test.p0, share)
        if self._try_orders:
            share -= math.log10(2.0) + (best.any_log10_orders if self._is_reordered(best) else 0.0)
        return Evidence("fixed", self.matched, test.total, test.p0, share)

    @property
    def proven(self) -> bool:
        """Whether the p-value has reached the bar."""
        return -self.log10_p >= self._log10_bar

    def notes(self) -> list[str]:
        """What was assumed and what happened, for the verdict."""
        if not self._answered:
            return []
        found = []
        attempt, best = self._best()
        if str(attempt.adapter) != str(AS_RECORDED):
            found.append(f"triggers were put {attempt.adapter}")
        if len(self._attempts) > 1:
            found.append(f"{len(self._attempts)} ways of putting the triggers were tried and paid for")
        elif attempt.adapter.share < 1.0:
            ways = 1 + len(self._adapters)
            found.append(f"one of {ways} ways of putting the triggers was tried, and its share paid")
        found.extend(
            f"the suspect cannot be asked with triggers {each.adapter}: {each.failure}"
            for each in self._attempts
            if each.failure is not None
        )
        found.extend(_meaning_notes(attempt, best))
        if attempt.total < len(self._labels):
            found.append(
                f"there was room for {attempt.total} of {len(self._labels)} triggers, and the test is of those: that "
                "was fixed before the first of them was asked"
            )
        if attempt.refused:
            count = len(attempt.refused)
            found.append(f"{count} triggers were refused or not answered in a readable way: {attempt.refused[0]}")
        if attempt.unasked:
            found.append(f"{len(attempt.unasked)} triggers were not asked: {attempt.unasked[0]}")
        if attempt.abstained:
            found.append(
                f"{attempt.abstained} of {attempt.asked} answers hold NaN or Inf or name no class, and count as misses"
            )
        found.extend(self._order_notes(attempt, best))
        futile = best.test.decision == "futile" and not attempt.unasked
        if self.mode == "sequential" and futile and not self.proven:
            found.append(f"given up after {self.queries} queries: the suspect answers as a stranger does")
        if self.mode == "sequential" and self.proven and attempt.asked < attempt.total and not attempt.unasked:
            found.append(
                f"stopped after {self.queries} queries, as the answer was clear: what was not asked is no miss"
            )
        return found

    def ask_again(self, suspect: Suspect) -> str | None:
        """A note where the first triggers, put in another order and twice over, are answered otherwise than before.

        Such a suspect computes an answer from the whole batch, or at random. What was counted stays as it is: the
        p-value holds whatever the answers depend on.
        """
        if not self._answered:
            return None
        attempt, _ = self._best()
        first = attempt.first
        if first is None or len(first) < 2:
            return None
        again = np.repeat(np.arange(len(first))[::-1], 2)
        inputs = _inputs(self.mark, attempt.adapter)[again]
        try:
            answers = predictions(suspect, suspect.query(inputs, self.num_classes), len(inputs), self.num_classes)
            predicted = self._columns(attempt, answers)
        except SuspectError as error:
            return f"asked {len(inputs)} triggers once more, the suspect brings no answers: {error}"
        # What is not answered this time, as a budget was used up, shows nothing.
        differs = ((predicted != first[again]) & (predicted != ABSTAINED)).any(axis=1)
        changed = len(set(again[differs].tolist()))
        if not changed:
            return None
        return f"{changed} of {len(first)} answers change when the batch does, or from one time to the next"

    def _meanings(self, attempt: _Attempt, predicted: Labels) -> list[_Meaning]:
        """What the first answers can mean; nothing here has seen a label.

        Outputs that name the same classes are one. Labels are counted from 0 where some are 0 and none is C, from 1
        where it is the other way round, and else from either. A class more than the mark has is a class before the
        others or behind them, and comes to the same.
        """
        attempt.outputs = 1 if predicted.ndim == 1 else predicted.shape[1]
        columns = predicted.reshape(len(predicted), -1)
        clean = None if attempt.clean is None else self._columns(attempt, attempt.clean)
        outputs = [0]
        if attempt.outputs > 1:
            outputs = sorted(np.unique(columns, axis=1, return_index=True)[1].tolist())
        firsts = [0]
        if predicted.ndim == 1:
            seen = set(columns[:, 0].tolist() if clean is None else [*columns[:, 0].tolist(), *clean[:, 0].tolist()])
            firsts = [0, 1] if (0 in seen) == (self.num_classes in seen) else [int(0 not in seen)]
        chance = symbol_chance(self.mark.scheme, self.mark.parameters)
        share = 1.0 / (len(outputs) * len(firsts))
        bar = self._log10_bar - math.log10(attempt.adapter.share) - math.log10(share)
        found = [
            _Meaning(output, first, share, SequentialTest(chance, attempt.total, bar))
            for output in outputs
            for first in firsts
        ]
        if self._clean is not None and clean is not None:
            for each in found:
                each.order, each.agreed = best_order(each.classes(clean), self._clean.labels, self.num_classes)
        return found

    def _columns(self, attempt: _Attempt, predicted: Labels) -> Labels:
        """Predictions as [n, R] of as many outputs as answered first; no answers at all are none of each."""
        columns = predicted.reshape(len(predicted), -1)
        if (columns == ABSTAINED).all():
            return np.full((len(columns), attempt.outputs), ABSTAINED, np.int64)
        if columns.shape[1] != attempt.outputs:
            raise SuspectError(
                f"the suspect answers with {attempt.outputs} outputs at first and then with {columns.shape[1]}"
            )
        return columns

    @property
    def _tries(self) -> list[tuple[_Attempt, _Meaning]]:
        return [(attempt, meaning) for attempt in self._attempts for meaning in attempt.meanings]

    @property
    def _answered(self) -> bool:
        return any(attempt.meanings for attempt in self._attempts)

    def _room(self, adapter: Adapter) -> int:
        return len(self._labels) if self._limit is None else self._limit(_inputs(self.mark, adapter))

    def _is_over(self, attempt: _Attempt) -> bool:
        if attempt.failure is not None or attempt.unasked:  # nor will the others be answered
            return True
        if self.mode == "all":
            return attempt.asked == attempt.total
        decisions = [meaning.test.decision for meaning in attempt.meanings]
        return bool(decisions) and ("proven" in decisions or None not in decisions)

    def _best(self) -> tuple[_Attempt, _Meaning]:
        tries = self._tries
        return tries[0] if len(tries) == 1 else min(tries, key=lambda each: self._paid_log10_p(*each))

    def _paid_log10_p(self, attempt: _Attempt, meaning: _Meaning) -> float:
        test = meaning.test
        fixed = self.mode == "all"  # of all triggers: those not asked are misses
        unpaid = binomial_log10_tail(test.matched, test.total, test.p0) if fixed else test.log10_p
        if self._try_orders:
            unpaid = math.log10(2.0) + min(unpaid, self._any_log10_p(meaning))
        return unpaid - _log10_share(attempt, meaning)

    def _any_log10_p(self, meaning: _Meaning) -> float:
        """log10 of the p-value of the order with most matches, all orders paid."""
        test = meaning.test
        return meaning.any_log10_orders + binomial_log10_tail(meaning.any_matched, test.total, test.p0)

    def _is_reordered(self, meaning: _Meaning) -> bool:
        """Whether another order of the classes says more than the recorded one, although it is paid for."""
        test = meaning.test
        recorded = binomial_log10_tail(test.matched, test.total, test.p0)
        return self._try_orders and self._any_log10_p(meaning) < recorded

    def _order_notes(self, attempt: _Attempt, best: _Meaning) -> list[str]:
        found = []
        if self._clean is not None and best.order is not None:
            count = len(self._clean.labels)
            moved = int((best.order != np.arange(self.num_classes)).sum())
            order = f"{moved} of {self.num_classes} classes stand elsewhere" if moved else "classes stand as recorded"
            found.append(
                f"{order}, by {count} clean inputs of which the suspect names {best.agreed} rightly; this is free, as "
                "long as these and their labels were chosen without the triggers' labels"
            )
        if self._try_orders:
            paid = f"all 10^{best.any_log10_orders:.1f} orders of the classes were paid for"
            found.append(f"classes stand in another order; {paid}" if self._is_reordered(best) else paid)
            test = best.test
            least = math.log10(2.0) + best.any_log10_orders + binomial_log10_tail(test.total, test.total, test.p0)
            if -(least - _log10_share(attempt, best)) < self._log10_bar:
                found.append(
                    f"{test.total} triggers can prove no other order of {self.num_classes} classes, as there are too "
                    "many: give clean labelled data to estimate it"
                )
        return found


def _log10_share(attempt: _Attempt, meaning: _Meaning) -> float:
    return math.log10(attempt.adapter.share * meaning.share)


def _meaning_notes(attempt: _Attempt, best: _Meaning) -> Iterator[str]:
    if len({meaning.output for meaning in attempt.meanings}) > 1:
        outputs = len({meaning.output for meaning in attempt.meanings})
        yield f"{outputs} outputs that answer differently were tried and paid for; number {best.output + 1} counts"
    both = len({meaning.first for meaning in attempt.meanings}) > 1
    if best.first:
        paid = ", which was paid for" if both else ", as its answers show"
        yield f"the suspect's classes are counted from 1, or a class more stands before them{paid}"
    elif both:
        yield "that the suspect's classes are counted from 0 is one of two readings of its answers, and was paid for"


def run_trials(suspect: Suspect, trials: Sequence[Trial]) -> list[str]:
    """Ask until every trial is over, all trials together where they put triggers the same way; the suspect's notes.

    Where the suspect cannot answer, the trials that asked go on with another layout or have an error.
    """
    notes: dict[str, None] = {}
    while True:
        groups: dict[tuple[Adapter, int, tuple[int, ...]], list[tuple[Trial, Ask]]] = {}
        for trial in trials:
            ask = _next(suspect, trial, notes)
            if ask is not None:
                shape = trial.mark.arrays["triggers"].shape[1:]
                groups.setdefault((ask.adapter, trial.num_classes, shape), []).append((trial, ask))
        if not groups:
            return list(notes)
        for asks in groups.values():
            try:
                _ask(suspect, asks)
            except SuspectError as error:
                for trial, _ in asks:
                    trial.fail(error)
            else:
                notes |= dict.fromkeys(suspect.notes)


def _next(suspect: Suspect, trial: Trial, notes: dict[str, None]) -> Ask | None:
    """What the trial asks next, once the clean inputs that come before it have been put to the suspect."""
    while (ask := trial.next()) is not None:
        try:
            clean = trial.clean_inputs()
            if clean is None:
                return ask
            answers = suspect.query(clean, trial.num_classes)
            predicted = predictions(suspect, answers, len(clean), trial.num_classes)
            trial.add_clean(predicted, getattr(suspect, "unasked", {}).values())
        except SuspectError as error:
            trial.fail(error)
        else:
            notes |= dict.fromkeys(suspect.notes)
    return None


def _ask(suspect: Suspect, asks: Sequence[tuple[Trial, Ask]]) -> None:
    """Put what trials of one adapter and number of classes ask, and hand them their answers."""
    num_classes = asks[0][0].num_classes
    inputs = np.concatenate([_inputs(trial.mark, ask.adapter)[ask.start : ask.stop] for trial, ask in asks])
    predicted = predictions(suspect, suspect.query(inputs, num_classes), len(inputs), num_classes)
    # What only a Rationed suspect has; asking isinstance for it would take longer than all the rest here.
    missing: Iterable[Mapping[int, str]] = (getattr(suspect, "unasked", {}), getattr(suspect, "refused", {}))
    at = 0
    for trial, ask in asks:
        end = at + ask.stop - ask.start
        unasked, refused = ([why for row, why in rows.items() if at <= row < end] for rows in missing)
        try:
            trial.add(predicted[at:end], unasked, refused)
        except SuspectError as error:
            trial.fail(error)
        at = end


def predictions(suspect: Suspect, answers: NDArray[Any], rows: int, num_classes: int) -> Labels:
    """The classes that answers name, ABSTAINED where there is none: labels [n] as they are, of scores [n, 1].

    answers: as `Suspect.query` gives them. Ties go to the lowest class. Raises SuspectError for another shape.
    """
    if answers.ndim not in (1, 2) or len(answers) != rows:
        raise SuspectError(f"{suspect.name} answers {rows} inputs with an array of shape {list(answers.shape)}")
    if answers.ndim == 1 or answers.dtype.kind == "i":
        return np.where(answers >= 0, answers, ABSTAINED).astype(np.int64)
    if answers.shape[1] != num_classes:
        raise SuspectError(
            f"{suspect.name} answers with {answers.shape[1]} classes and the watermark has {num_classes}; "
            "verify a suspect of the same task"
        )
    return highest(answers)[:, None]


# Prepared triggers are kept for the next suspect, as long as they fit: marks times ways of putting them may be many.
_KEPT_BYTES = 256 << 20
_kept: OrderedDict[tuple[int, Adapter], tuple[Watermark, NDArray[Any]]] = OrderedDict()
_lock = threading.Lock()


def _inputs(mark: Watermark, adapter: Adapter) -> NDArray[Any]:
    """All triggers of a mark as an adapter puts them."""
    place = id(mark), adapter
    with _lock:
        if place in _kept and _kept[place][0] is mark:
            _kept.move_to_end(place)
            return _kept[place][1]
    inputs = adapter.inputs(mark.arrays["triggers"], mark.parameters["value_range"])
    with _lock:
        _kept[place] = mark, inputs
        while len(_kept) > 1 and sum(held.nbytes for _, held in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    return inputs
