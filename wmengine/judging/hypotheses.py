"""Hypotheses: each one way to put questions and to read their answers, with a share of the evidence fixed before.

The p-value is the least of p_h / share_h over those that were tried, and never above 1, which no order of trying can
inflate (Bonferroni). Which readings come into question is told from the first answers, before any is compared with its
symbol, and does not change after that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wmengine.facts import Fact, fact
from wmengine.judging.orders import best_order, log10_orders, used_classes
from wmengine.parts.statistics.base import Evidence, Look, Test
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects.answers import ABSTAINED

Labels = NDArray[np.int64]


@dataclass
class AnyOrder:
    """What the order of classes with most matches says, all orders paid; half of the evidence is for them."""

    matched: int
    log10_orders: float


@dataclass
class Hypothesis:
    """share: of the evidence, the way's and the reading's multiplied. output: which of the outputs that may be the
    answer; first: what the suspect calls class 0. chance: a stranger's, for one symbol. tests: one for each mark.

    order: what each class of the suspect stands for, estimated on clean data, and how many of those it names rightly
    then. any_order: where every order is tried. log10_names: of the orders of names that are paid for, where these were
    given at verification; named: the classes that were answered, strange: answers that name none of the mark's.
    """

    share: float
    output: int
    first: int
    chance: float
    tests: list[Test]
    order: Labels | None = None
    agreed: int = 0
    any_order: list[AnyOrder] = field(default_factory=list)
    log10_names: float = 0.0
    named: Labels = field(default_factory=lambda: np.empty(0, np.int64))
    strange: int = 0

    def classes(self, predicted: Labels) -> Labels:
        """Answers [n, R] as classes, in the suspect's order; below 0 what is none."""
        column = predicted[:, self.output]
        return np.where(column >= self.first, column - self.first, ABSTAINED) if self.first else column

    def add(self, looks: Sequence[Look]) -> None:
        for test, look in zip(self.tests, looks, strict=True):
            test.add(look)

    def try_orders(self, classes: Labels, expected: Sequence[Labels], num_classes: int) -> None:
        """The best order for each mark, of all answers at once."""
        orders = log10_orders(num_classes + self.strange, used_classes(classes, num_classes) + self.strange)
        self.any_order = [AnyOrder(best_order(classes, labels, num_classes)[1], orders) for labels in expected]

    def pay_names(self, classes: Labels, missing: int, num_classes: int, scored: bool) -> None:
        """Pay for every order of the names of classes that were answered; missing: rows without an answer.

        A name that the order leaves out may have been left out for what it would have matched: it is paid like one more
        class. Scores say something of every class, so that the places of all count.
        """
        inside = (classes >= 0) & (classes < num_classes)
        self.named = np.union1d(self.named, classes[inside])
        self.strange += int((~inside).sum()) - missing
        known, used = (num_classes, num_classes) if scored else (num_classes, len(self.named))
        self.log10_names = max(self.log10_names, log10_orders(known + self.strange, used + self.strange))

    def reordered(self, mark: int) -> bool:
        """Whether another order of the classes says more than the recorded one, although it is paid for."""
        return bool(self.any_order) and self._any_log10_p(mark) < self._own_log10_p(mark)

    def log10_p(self, mark: int) -> float:
        """The test's, or the best order's, before this hypothesis's share is paid."""
        found = self._own_log10_p(mark)
        if self.any_order:
            found = math.log10(2.0) + min(found, self._any_log10_p(mark))
        return found

    def matched(self, mark: int) -> int:
        return self.any_order[mark].matched if self.reordered(mark) else self.tests[mark].matched

    def evidence(self, mark: int, log10_share: float) -> Evidence:
        test = self.tests[mark]
        if self.reordered(mark):
            found = self.any_order[mark]
            share = log10_share - math.log10(2.0) - found.log10_orders
            return Evidence("matches", "fixed", found.matched, test.total, self.chance, share)
        return test.evidence(log10_share - self.log10_names - (math.log10(2.0) if self.any_order else 0.0))

    def _own_log10_p(self, mark: int) -> float:
        return self.tests[mark].log10_p + self.log10_names

    def _any_log10_p(self, mark: int) -> float:
        order, test = self.any_order[mark], self.tests[mark]
        return order.log10_orders + binomial_log10_tail(order.matched, test.total, self.chance)


def readings_of(predicted: Labels, seen: Labels, num_classes: int, single: bool) -> list[tuple[int, int, float]]:
    """(output, first, share) of every reading of the first answers [n, R]; nothing here has seen a symbol.

    Outputs that name the same classes are one. Bare labels (single) are counted from 0 where some are 0 and none is C,
    from 1 where it is the other way round, and else from either; seen: these answers and those to clean inputs.
    """
    outputs = [0]
    if predicted.shape[1] > 1:
        outputs = sorted(np.unique(predicted, axis=1, return_index=True)[1].tolist())
    firsts = [0]
    if single:
        names = set(seen.tolist())
        firsts = [0, 1] if (0 in names) == (num_classes in names) else [int(0 not in names)]
    share = 1.0 / (len(outputs) * len(firsts))
    return [(output, first, share) for output in outputs for first in firsts]


def reading_facts(hypotheses: Sequence[Hypothesis], best: Hypothesis) -> Iterator[Fact]:
    outputs = len({each.output for each in hypotheses})
    if outputs > 1:
        yield fact("outputs_paid", count=outputs, number=best.output + 1)
    both = len({each.first for each in hypotheses}) > 1
    if best.first:
        yield fact("from_one_paid" if both else "from_one")
    elif both:
        yield fact("from_zero_paid")
