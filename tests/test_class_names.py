"""Names of classes: those that a mark holds are free, those that a claimant gives at verification are paid for.

Whoever orders the names of a stranger's answers after he has seen them chooses which of them match. What he can choose
among is paid: all orders of the classes that were named, with those that his list leaves out, and of scores all.
"""

import math

import numpy as np
import pytest
from judged import KEY, Stub, black_box, check_null, images, messages

from wmengine.errors import SuspectError
from wmengine.judging.asking import TESTS, Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.orders import best_order
from wmengine.judging.verification import verify
from wmengine.suspects.base import Answers
from wmengine.suspects.endpoint.model import Refused
from wmengine.suspects.endpoint.template import Template

NAMES = [f"kind {number}" for number in range(10)]
SHAPE, COUNT = (1, 6, 6), 60
MARK, NAMED = black_box(SHAPE, 10, COUNT), black_box(SHAPE, 10, COUNT, class_names=NAMES)


def named(mark, classes, names=NAMES):
    """An endpoint whose answers, classes int [N] or scores [N, C], were read with these names in this order."""
    known = {row.tobytes(): answer for row, answer in zip(images(mark), classes, strict=True)}

    def answer(rows):
        found = np.stack([known[row.tobytes()] for row in rows])
        return Answers("scores", found) if found.ndim == 2 else Answers("classes", found[:, None])

    return Stub(answer, settings={"labels": names})


def orders_paid(verdict):
    (fact,) = (each for each in verdict.facts if each.code == "names_paid")
    return fact.values["log10_orders"]


def log10_falling(count, chosen):
    return math.log10(math.perm(count, chosen))


@pytest.mark.parametrize("test", TESTS)
def test_the_names_of_the_mark_are_free(test):
    free = verify(named(NAMED, NAMED.symbols), NAMED, test=test)
    unnamed = verify(Stub(named(NAMED, NAMED.symbols).answers), NAMED, test=test)
    assert free.owned
    assert free.log10_p == unnamed.log10_p
    assert not any(each.code == "names_paid" for each in free.facts)
    assert verify(named(NAMED, NAMED.symbols), NAMED, key=KEY, adversarial=True).owned


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_others_pay_for_the_orders_of_the_classes_that_were_named(names):
    mark = MARK if names is NAMES else NAMED  # without names, or with another order
    free = verify(Stub(named(mark, mark.symbols).answers), mark)
    paid = verify(named(mark, mark.symbols, names), mark)
    assert orders_paid(paid) == pytest.approx(log10_falling(10, 10))
    assert paid.log10_p == pytest.approx(free.log10_p + log10_falling(10, 10))
    assert any("said at verification: all 10^6.6 meanings were paid for" in note for note in paid.notes)


def test_few_named_classes_have_few_orders():
    three = verify(named(MARK, MARK.symbols % 3), MARK)
    assert orders_paid(three) == pytest.approx(math.log10(10 * 9 * 8))


def test_names_that_the_list_leaves_out_count_as_classes_that_might_have_been_named():
    answers = np.where(np.arange(COUNT) % 10 == 0, -1, MARK.symbols % 3)  # six answers that name none of the ten
    assert orders_paid(verify(named(MARK, answers), MARK)) == pytest.approx(log10_falling(16, 9))


def test_of_scores_every_class_counts_whichever_is_highest():
    scores = np.random.default_rng(0).normal(size=(COUNT, 10))
    scores[:, 4] += 100.0
    assert orders_paid(verify(named(MARK, scores), MARK)) == pytest.approx(log10_falling(10, 10))


@pytest.mark.parametrize("test", TESTS)
def test_a_test_goes_on_until_the_order_is_paid_for_too(test):
    verdict = verify(named(MARK, MARK.symbols), MARK, test=test, alpha=1e-15)
    assert verdict.owned
    assert verdict.queries > 16 or test == "fixed"


def test_every_order_and_names_together_are_paid_once():
    order = np.roll(np.arange(10), 3)
    both = verify(named(MARK, order[MARK.symbols]), MARK, classes="any")
    alone = verify(Stub(named(MARK, order[MARK.symbols]).answers), MARK, classes="any")
    assert both.log10_p == pytest.approx(alone.log10_p)


def test_against_others_names_must_be_the_marks():
    with pytest.raises(ValueError, match="adversarial=True takes no labels= but those"):
        verify(named(MARK, MARK.symbols), MARK, key=KEY, adversarial=True)
    with pytest.raises(ValueError, match="whoever orders the names chooses the matches"):
        verify(named(NAMED, NAMED.symbols, NAMES[::-1]), NAMED, key=KEY, adversarial=True)


# --- the claimant chooses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("names", [20, 100, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_names_chosen_to_fit_a_stranger_that_answers_by_a_hash_prove_nothing(classes, names, seed):
    """Of each name the class that it fits best, as SciPy assigns them; of more names than classes the best ones."""
    mark = black_box(SHAPE, classes, 100)
    hashed = np.random.default_rng(seed).integers(0, names, 100)
    kinds, place = np.unique(hashed, return_inverse=True)
    width = max(len(kinds), classes)
    order, matched = best_order(place, mark.symbols, width)
    fitted = np.where(order[place] < classes, order[place], -1)
    verdict = verify(named(mark, fitted, [f"kind {number}" for number in range(classes)]), mark)
    assert verdict.matched == matched >= 10
    assert verdict.log10_p > -2
    if names == 10_000:  # names that are left out say nothing, and of the others all match
        assert verify(Stub(named(mark, fitted).answers), mark).owned


@pytest.mark.parametrize("test", TESTS)
def test_the_best_of_all_orders_is_as_rare_as_its_p_value_says(test):
    """Three names, all six orders, over fresh labels: the order that makes p least is the claimant's."""
    marks = messages(black_box(SHAPE, 3, 40), 400)
    scores = np.random.default_rng(2).normal(size=(40, 3))
    terms = Terms(sequential=test == "sequential", log10_bar=9.0)
    for answers in (scores, scores.argmax(axis=1)):
        least = np.zeros(len(marks))
        for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
            chosen = answers[:, order] if answers.ndim == 2 else np.argsort(order)[answers]
            found = judge_suspect(named(marks[0], chosen, ["a", "b", "c"]), marks, terms)
            least = np.minimum(least, [each.log10_p for each in found])
        check_null(least)


def test_a_service_that_scores_more_classes_by_name_than_were_listed_is_not_read():
    """Ten of a thousand could be chosen in more ways than there are orders of ten."""
    template = Template.of({"body": "${inputs}", "answers": "", "scores": ""})
    entry = {f"kind {number}": 0.1 for number in range(12)}
    with pytest.raises(Refused, match="labels leave out, such as 'kind 10': give all names"):
        template.read([entry], 1, NAMES)
    assert issubclass(Refused, SuspectError)
