"""One suspect against black-box marks: which triggers to ask next, and what the answers are worth.

A trial knows the labels and never shows them: triggers go out, predictions come back and are counted here. Triggers are
asked in the order in which the key drew them. Each adapter has a fixed share of the evidence; the p-value is the least
of p_a / share_a over those that were tried, and never above 1, which no order of trying can inflate (Bonferroni).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.reordering import CleanData, best_order, log10_orders, reorder, used_classes
from wmengine.schemes import symbol_chance
from wmengine.sequential import SequentialTest
from wmengine.stats import binomial_log10_tail
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Rationed, Suspect
from wmengine.watermark import Watermark

MODES = ("all", "sequential")
FIRST_LOOK, NEXT_LOOK = 16, 8
ASKED_AGAIN = 8

Labels = NDArray[np.int64]


class Ask(NamedTuple):
    """Triggers `start` … `stop` of a mark, to be put by this adapter."""

    adapter: Adapter
    start: int
    stop: int


@dataclass
class _Attempt:
    """What one adapter has brought so far."""

    adapter: Adapter
    test: SequentialTest
    first: Labels  # the predictions for the first triggers, to be asked again
    abstained: int = 0
    unasked: list[str] = field(default_factory=list)  # why, one for each trigger that was not asked
    refused: list[str] = field(default_factory=list)
    order: Labels | None = None  # what each class of the suspect stands for, estimated on clean data
    agreed: int = 0  # clean inputs that the suspect answers rightly in that order
    any_matched: int = 0  # in the order with most matches, where every order is tried
    any_log10_orders: float = 0.0


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
        self._adapters = list(adapters)
        self._limit = limit
        self._attempts: list[_Attempt] = []

    def next(self) -> Ask | None:
        """What to ask now; None when the trial is over. The same until its answers are added."""
        if self._attempts and not self._is_over(self._attempts[-1]):
            attempt = self._attempts[-1]
        elif self.proven or len(self._attempts) == len(self._adapters):
            return None
        else:
            attempt = self._start(self._adapters[len(self._attempts)])
        asked, total = attempt.test.asked, attempt.test.total
        look = total if self.mode == "all" else FIRST_LOOK if asked == 0 else NEXT_LOOK
        return Ask(attempt.adapter, asked, min(total, asked + look))

    def add(self, predicted: Labels, unasked: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        """The predictions for what `next` asked: class numbers, ABSTAINED where there was no answer.

        unasked and refused: why, for each of those that were never asked or not answered in a readable way.
        """
        attempt = self._attempts[-1]
        start = attempt.test.asked
        if start == 0:
            attempt.first = predicted[:ASKED_AGAIN]
        attempt.abstained += int((predicted == ABSTAINED).sum()) - len(unasked) - len(refused)
        attempt.unasked += unasked
        attempt.refused += refused
        if attempt.order is not None:
            predicted = reorder(predicted, attempt.order)
        expected = self._labels[start : start + len(predicted)]
        attempt.test.add(int((predicted == expected).sum()), len(predicted))
        if self._try_orders:
            _, attempt.any_matched = best_order(predicted, expected, self.num_classes)
            attempt.any_log10_orders = log10_orders(self.num_classes, used_classes(predicted, self.num_classes))

    def clean_inputs(self) -> NDArray[Any] | None:
        """What to ask before the triggers that `next` names, for `add_clean`; None where nothing is.

        Raises SuspectError where there is room for none of the triggers beside them.
        """
        attempt = self._attempts[-1]
        if self._clean is None or attempt.order is not None:
            return None
        inputs, scale = self._clean.inputs, self.mark.parameters["value_range"]
        put = (attempt.adapter.inputs if inputs.dtype == np.uint8 else attempt.adapter.recorded_inputs)(inputs, scale)
        if self._limit is not None and len(self._attempts) == 1:
            room = self._limit(np.concatenate([put, put[:1]]))
            if room <= len(put):
                raise SuspectError(
                    f"there is room for {room} inputs, and {len(put)} are clean ones: give fewer of those, or a larger "
                    "budget"
                )
        return put

    def add_clean(self, predicted: Labels) -> None:
        """The predictions for the clean inputs: they say in which order the suspect's classes stand."""
        assert self._clean is not None
        attempt = self._attempts[-1]
        attempt.order, attempt.agreed = best_order(predicted, self._clean.labels, self.num_classes)
        attempt.test.total = self._room(attempt.adapter)  # less than before the clean inputs

    @property
    def queries(self) -> int:
        """Triggers really asked, all adapters together."""
        return sum(attempt.test.asked - len(attempt.unasked) for attempt in self._attempts)

    @property
    def total(self) -> int:
        """Triggers that the test is of, with the adapter that did best: all, or what there was room for beforehand."""
        return self._best().test.total if self._attempts else len(self._labels)

    @property
    def matched(self) -> int:
        """Matches of the adapter that did best."""
        if not self._attempts:
            return 0
        best = self._best()
        return best.any_matched if self._is_reordered(best) else best.test.matched

    @property
    def log10_p(self) -> float:
        """log10 of the p-value with every adapter paid."""
        return min(0.0, *map(self._paid_log10_p, self._attempts), 0.0)

    @property
    def log10_e(self) -> float | None:
        """log10 of the e-value at the end of a sequential trial, adapters paid; None for a fixed test."""
        if self.mode == "all" or not self._attempts:
            return None
        return max(attempt.test.log10_e + math.log10(attempt.adapter.share) for attempt in self._attempts)

    @property
    def proven(self) -> bool:
        """Whether the p-value has reached the bar."""
        return -self.log10_p >= self._log10_bar

    def notes(self) -> list[str]:
        """What was assumed and what happened, for the verdict."""
        found = []
        if self._attempts:
            best = self._best()
            if str(best.adapter) != str(AS_RECORDED):
                found.append(f"triggers were put {best.adapter}")
            if len(self._attempts) > 1:
                found.append(f"{len(self._attempts)} ways of putting the triggers were tried and paid for")
            elif best.adapter.share < 1.0:
                found.append(f"one of {len(self._adapters)} ways of putting the triggers was tried, and its share paid")
            if best.test.total < len(self._labels):
                found.append(
                    f"there was room for {best.test.total} of {len(self._labels)} triggers, and the test is of those: "
                    "that was fixed before the first of them was asked"
                )
            if best.refused:
                count = len(best.refused)
                found.append(f"{count} triggers were refused or not answered in a readable way: {best.refused[0]}")
            if best.unasked:
                found.append(f"{len(best.unasked)} triggers were not asked: {best.unasked[0]}")
            if best.abstained:
                asked = best.test.asked
                found.append(
                    f"{best.abstained} of {asked} answers hold NaN or Inf or name no class, and count as misses"
                )
            found.extend(self._order_notes(best))
            futile = best.test.decision == "futile" and not best.unasked
            if self.mode == "sequential" and futile and not self.proven:
                found.append(f"given up after {self.queries} queries: the suspect answers as a stranger does")
        return found

    def ask_again(self, suspect: Suspect) -> str | None:
        """A note where the first triggers, put in another order and twice over, are answered otherwise than before.

        Such a suspect computes an answer from the whole batch, or at random. What was counted stays as it is: the
        p-value holds whatever the answers depend on.
        """
        attempt = self._best()
        if len(attempt.first) < 2:
            return None
        again = np.repeat(np.arange(len(attempt.first))[::-1], 2)
        inputs = _inputs(self.mark, attempt.adapter)[again]
        predicted = predictions(suspect, suspect.query(inputs, self.num_classes), len(inputs), self.num_classes)
        # What is not answered this time, as a budget was used up, shows nothing.
        differs = (predicted != attempt.first[again]) & (predicted != ABSTAINED)
        changed = len(set(again[differs].tolist()))
        if not changed:
            return None
        return f"{changed} of {len(attempt.first)} answers change when the batch does, or from one time to the next"

    def _start(self, adapter: Adapter) -> _Attempt:
        bar = self._log10_bar - math.log10(adapter.share)
        chance = symbol_chance(self.mark.scheme, self.mark.parameters)
        attempt = _Attempt(adapter, SequentialTest(chance, self._room(adapter), bar), np.empty(0, np.int64))
        self._attempts.append(attempt)
        return attempt

    def _room(self, adapter: Adapter) -> int:
        return len(self._labels) if self._limit is None else self._limit(_inputs(self.mark, adapter))

    def _is_over(self, attempt: _Attempt) -> bool:
        if attempt.unasked:  # nor will the others be
            return True
        if self.mode == "all":
            return attempt.test.asked == attempt.test.total
        return attempt.test.decision is not None

    def _best(self) -> _Attempt:
        return min(self._attempts, key=self._paid_log10_p)

    def _paid_log10_p(self, attempt: _Attempt) -> float:
        test = attempt.test
        fixed = self.mode == "all"  # of all triggers: those not asked are misses
        unpaid = binomial_log10_tail(test.matched, test.total, test.p0) if fixed else test.log10_p
        if self._try_orders:
            unpaid = math.log10(2.0) + min(unpaid, self._any_log10_p(attempt))
        return unpaid - math.log10(attempt.adapter.share)

    def _any_log10_p(self, attempt: _Attempt) -> float:
        """log10 of the p-value of the order with most matches, all orders paid."""
        test = attempt.test
        return attempt.any_log10_orders + binomial_log10_tail(attempt.any_matched, test.total, test.p0)

    def _is_reordered(self, attempt: _Attempt) -> bool:
        """Whether another order of the classes says more than the recorded one, although it is paid for."""
        test = attempt.test
        return self._try_orders and self._any_log10_p(attempt) < binomial_log10_tail(test.matched, test.total, test.p0)

    def _order_notes(self, best: _Attempt) -> list[str]:
        found = []
        if self._clean is not None and best.order is not None:
            count = len(self._clean.labels)
            moved = int((best.order != np.arange(self.num_classes)).sum())
            order = f"{moved} of {self.num_classes} classes stand elsewhere" if moved else "classes stand as recorded"
            found.append(
                f"{order}, by {count} clean inputs of which the suspect names {best.agreed} rightly; this is free, as "
                "they know nothing of the triggers' labels"
            )
        if self._try_orders:
            paid = f"all 10^{best.any_log10_orders:.1f} orders of the classes were paid for"
            found.append(f"classes stand in another order; {paid}" if self._is_reordered(best) else paid)
            test = best.test
            least = math.log10(2.0) + best.any_log10_orders + binomial_log10_tail(test.total, test.total, test.p0)
            if -(least - math.log10(best.adapter.share)) < self._log10_bar:
                found.append(
                    f"{test.total} triggers can prove no other order of {self.num_classes} classes, as there are too "
                    "many: give clean labelled data to estimate it"
                )
        return found


def run_trials(suspect: Suspect, trials: Sequence[Trial]) -> list[str]:
    """Ask until every trial is over, all trials together where they put triggers the same way; the suspect's notes.

    Raises SuspectError where the suspect cannot answer; the trials then hold what was answered before.
    """
    notes: dict[str, None] = {}
    while True:
        groups: dict[tuple[Adapter, int, tuple[int, ...]], list[tuple[Trial, Ask]]] = {}
        for trial in trials:
            ask = trial.next()
            while ask is not None and (clean := trial.clean_inputs()) is not None:
                answers = suspect.query(clean, trial.num_classes)
                trial.add_clean(predictions(suspect, answers, len(clean), trial.num_classes))
                notes |= dict.fromkeys(suspect.notes)
                ask = trial.next()
            if ask is not None:
                shape = trial.mark.arrays["triggers"].shape[1:]
                groups.setdefault((ask.adapter, trial.num_classes, shape), []).append((trial, ask))
        if not groups:
            return list(notes)
        for (adapter, num_classes, _), asks in groups.items():
            inputs = np.concatenate([_inputs(trial.mark, adapter)[ask.start : ask.stop] for trial, ask in asks])
            predicted = predictions(suspect, suspect.query(inputs, num_classes), len(inputs), num_classes)
            notes |= dict.fromkeys(suspect.notes)
            missing = (suspect.unasked, suspect.refused) if isinstance(suspect, Rationed) else ({}, {})
            at = 0
            for trial, ask in asks:
                end = at + ask.stop - ask.start
                unasked, refused = ([why for row, why in rows.items() if at <= row < end] for rows in missing)
                trial.add(predicted[at:end], unasked, refused)
                at = end


def predictions(suspect: Suspect, answers: NDArray[Any], rows: int, num_classes: int) -> Labels:
    """The class that each answer [rows, C] or [rows] names, ABSTAINED where a score is NaN or Inf.

    Ties go to the lowest class. Raises SuspectError for answers of another shape.
    """
    if answers.ndim not in (1, 2) or len(answers) != rows:
        raise SuspectError(f"{suspect.name} answers {rows} inputs with an array of shape {list(answers.shape)}")
    if answers.ndim == 1:
        return np.where(answers >= 0, answers, ABSTAINED).astype(np.int64)
    if answers.shape[1] != num_classes:
        raise SuspectError(
            f"{suspect.name} answers with {answers.shape[1]} classes and the watermark has {num_classes}; "
            "verify a suspect of the same task"
        )
    return np.where(np.isfinite(answers).all(axis=1), answers.argmax(axis=1), ABSTAINED).astype(np.int64)


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
