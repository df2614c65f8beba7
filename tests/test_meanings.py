"""Answers that may mean several things: every meaning is tried and paid for, and no stranger is accused more often.

Which output is the answer, and whether classes are counted from 0 or from 1, is told from answers alone where they tell
it, and else tried. The labels are drawn anew again and again while the answers stay, as in the theorem.
"""

import math
from functools import cache

import numpy as np
import pytest
from judged import KEY, Stub, black_box, by_heart, check_null, images, messages, one_hot

from wmengine.errors import SuspectError, SuspectGone
from wmengine.judging.asking import TESTS, Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.orders import CleanData
from wmengine.judging.verification import verify
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects.adapters import AS_RECORDED, Adapter, to_input
from wmengine.suspects.base import Answers

SHAPE, COUNT, RANGE = (1, 6, 6), 48, [[-1.0, 1.0]]
HALVES = [Adapter(share=0.5), Adapter(layout="flat", share=0.5)]


@cache
def mark(classes=10):
    return black_box(SHAPE, classes, COUNT)


MARK = mark()
LABELS = MARK.arrays["labels"]
# One of two statistics, each of which has half of the evidence.
TAIL = binomial_log10_tail(COUNT, COUNT, 0.1) + math.log10(2)


# --- power, and what is paid ------------------------------------------------------------------------------------------


def test_labels_are_counted_from_where_the_answers_show_and_that_is_free():
    for first in (0, 1):
        verdict = verify(by_heart(MARK, LABELS + first), MARK)
        assert verdict.log10_p == pytest.approx(TAIL)
        assert any("counted from 1" in note for note in verdict.notes) == bool(first)


def test_where_the_answers_leave_it_open_both_are_tried_and_paid_for():
    many = mark(1000)
    labels = many.arrays["labels"].clip(1, 998)
    for first in (0, 1):
        verdict = verify(by_heart(many, labels + first), many)
        matched = int((labels == many.arrays["labels"]).sum())
        assert verdict.matched == matched >= COUNT - 1
        assert verdict.log10_p == pytest.approx(binomial_log10_tail(matched, COUNT, 0.001) + math.log10(4), rel=1e-3)
        assert any("paid for" in note for note in verdict.notes)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("before", [False, True])
def test_a_class_more_may_stand_before_the_others_or_behind_them(test, before):
    copy = one_hot(LABELS + before, 11)
    verdict = verify(by_heart(MARK, copy), MARK, test=test)
    assert verdict.owned
    assert any("one class more than the watermark" in note for note in verdict.notes)
    twelve = verify(lambda rows: np.zeros((len(rows), 12), np.float32), MARK)
    assert "answers with 12 classes and the watermark has 10" in twelve.error


def test_a_stranger_of_a_class_more_is_no_copy_for_it():
    stranger = np.random.default_rng(0).normal(size=(COUNT, 11)).astype(np.float32)
    assert verify(by_heart(MARK, stranger), MARK).decision == "not_proven"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_outputs_that_answer_differently_are_tries(place):
    wrong = np.random.default_rng(1).normal(size=(2, COUNT, 10)).astype(np.float32)
    heads = [*wrong]
    heads.insert(place, one_hot(LABELS))
    answer = [by_heart(MARK, head) for head in heads]
    verdict = verify(lambda rows: {str(index): each(rows) for index, each in enumerate(answer)}, MARK)
    assert verdict.log10_p == pytest.approx(TAIL + math.log10(3))
    assert f"3 outputs that answer differently were tried and paid for; number {place + 1} counts" in verdict.notes


def test_outputs_that_answer_alike_are_one():
    once, twice = by_heart(MARK, one_hot(LABELS)), by_heart(MARK, 5 * one_hot(LABELS) - 2)
    verdict = verify(lambda rows: (once(rows), twice(rows)), MARK)
    assert verdict.log10_p == pytest.approx(TAIL)


def test_an_order_found_on_clean_data_is_found_for_every_meaning():
    """An auxiliary head before, and another order of the classes: each output has an order of its own."""
    clean = np.random.default_rng(2).integers(0, 256, (200, *SHAPE), dtype=np.uint8)
    clean_labels, order = np.arange(200) % 10, np.roll(np.arange(10), 3)
    inputs = np.concatenate([to_input(clean, RANGE), to_input(MARK.arrays["triggers"], RANGE)])
    right = np.concatenate([clean_labels, LABELS])
    wrong = np.concatenate([clean_labels, (LABELS * 3 + 1) % 10])
    known = {row.tobytes(): index for index, row in enumerate(inputs)}

    def answer(rows):
        places = [known[row.tobytes()] for row in rows]
        return one_hot(wrong[places]), one_hot(order[right[places]])

    verdict = verify(answer, MARK, classes="any", clean=(clean, clean_labels))
    assert verdict.log10_p == pytest.approx(TAIL + math.log10(2))
    assert any(note.startswith("10 of 10 classes stand elsewhere") for note in verdict.notes)


def test_clean_data_of_the_claimant_are_no_evidence_against_others():
    """Triggers with one bit turned over, and their labels: the order that they give fits any stranger to the mark."""
    many = mark(1000)
    stranger = np.random.default_rng(3).permutation(1000)[:COUNT]
    nearly = many.arrays["triggers"] ^ (np.arange(36).reshape(1, *SHAPE) == 0).astype(np.uint8)
    forged = (nearly, many.arrays["labels"])
    known = by_heart(many, stranger)

    def answer(rows):
        triggers = to_input(many.arrays["triggers"], RANGE)
        return known(np.stack([triggers[np.abs(triggers - row).sum(axis=(1, 2, 3)).argmin()] for row in rows]))

    assert verify(answer, many, classes="any", clean=forged).log10_p < -100
    with pytest.raises(ValueError, match="adversarial=True takes no clean="):
        verify(answer, many, key=KEY, adversarial=True, classes="any", clean=forged)
    assert not verify(Stub(answer), many, key=KEY, adversarial=True, classes="any").owned


# --- the null hypothesis ----------------------------------------------------------------------------------------------


def strangers(classes):
    """Answers [2, COUNT] or [2, COUNT, R], in two ways; scores are floats."""
    generator = np.random.default_rng(6)
    shape = (2, COUNT)
    yield "labels", generator.integers(0, classes, shape)
    yield "labels from 1", generator.integers(1, classes + 1, shape)
    yield "between", generator.integers(1, classes, shape)
    yield "one label", np.ones(shape, np.int64)
    yield "no answers", np.full(shape, -1)
    yield "three outputs", generator.integers(0, classes, (*shape, 3))
    yield (
        "outputs one after the other",
        (np.arange(COUNT)[None, :, None] + np.arange(classes)) % classes + [[[0]], [[0]]],
    )
    yield "the first alike", np.where(np.arange(COUNT)[:, None] < 16, 1, generator.integers(0, classes, (*shape, 2)))
    yield "scores", generator.standard_cauchy((*shape, classes))


@cache
def fresh(classes, count=500):
    return messages(mark(classes), count)


def in_two_ways(answers, marked):
    """A suspect of HALVES that gives each trigger what `answers` hold, by the way in which it is put."""
    known = {row.tobytes(): place for place, row in enumerate(images(marked))}

    def answer(rows):
        found = answers[int(rows.ndim == 2)][[known[row.tobytes()] for row in rows]]
        if found.dtype.kind == "f":
            return Answers("scores", found)
        return Answers("labels" if found.ndim == 1 else "classes", found)

    return Stub(answer, ways=HALVES)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("kind", [name for name, _ in strangers(2)])
def test_over_fresh_labels_a_stranger_is_accused_as_rarely_as_p_says(test, classes, kind):
    suspect = in_two_ways(dict(strangers(classes))[kind], mark(classes))
    found = judge_suspect(suspect, fresh(classes), Terms(sequential=test == "sequential", log10_bar=9.0))
    assert not any(each.error for each in found)
    check_null([each.log10_p for each in found])
    if test == "sequential":
        e = 10.0 ** np.array([each.log10_e for each in found])
        assert e.mean() <= 1 + 4 * e.std() / math.sqrt(len(e))


def test_without_paying_a_stranger_of_many_outputs_would_be_accused():
    """One output for each class that a trigger may have: one of them is always right about as often as is likeliest."""
    generator = np.random.default_rng(7)
    outputs = generator.integers(0, 10, (COUNT, 16))
    unpaid = []
    for _ in range(300):
        labels = generator.integers(0, 10, COUNT)
        unpaid.append(binomial_log10_tail(int((outputs == labels[:, None]).sum(axis=0).max()), COUNT, 0.1))
    assert np.mean(np.array(unpaid) <= math.log10(0.1)) > 0.3


# --- suspects that fail -----------------------------------------------------------------------------------------------

LAYOUTS = ("as recorded", "flat")


class Failing(Stub):
    """Answers all layouts but those that fail, which raise what they are given."""

    def __init__(self, failures, answers=None, after=0):
        ways = [Adapter(layout, scaling, share=0.25) for scaling in ("as recorded", "0 to 1") for layout in LAYOUTS]
        super().__init__(by_heart(MARK, (LABELS if answers is None else answers)[:, None]), ways=ways)
        self.failures, self.after, self.asked = failures, after, []

    def answer(self, inputs, num_classes=None):
        (rows,) = inputs.values()
        layout = "flat" if rows.ndim == 2 else "as recorded"
        self.asked.append((layout, len(rows)))
        if layout in self.failures and len(self.asked) > self.after:
            raise self.failures[layout]
        return super().answer({"x": rows.reshape(len(rows), *SHAPE)}, num_classes)


def found_in(suspect, test="fixed", ask_again=False, marks=(MARK,), **terms):
    terms = Terms(sequential=test == "sequential", log10_bar=9.0, ask_again=ask_again, **terms)
    return judge_suspect(suspect, marks, terms)[0]


def said(found):
    return [str(fact) for fact in found.facts]


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("error", [SuspectError("it needs a vector"), ValueError("it needs a vector")])
def test_a_layout_that_does_not_run_is_left_for_another_and_its_share_is_spent(test, error):
    found = found_in(Failing({"as recorded": error}), test)
    assert found.error is None
    assert found.matched == found.queries
    assert found.evidence.log10_share == pytest.approx(math.log10(0.25 / 2))
    assert any(
        "cannot be asked with triggers as recorded" in note and "it needs a vector" in note for note in said(found)
    )


def test_what_fails_in_every_layout_is_an_error_with_the_first_reason_and_asked_once_for_each():
    suspect = Failing({"as recorded": SuspectError("first"), "flat": SuspectError("second")})
    assert found_in(suspect).error == "first"
    assert [layout for layout, _ in suspect.asked] == ["as recorded", "flat"]


def test_a_process_that_ended_is_asked_nothing_more():
    suspect = Failing({"as recorded": SuspectGone("killed by signal 11")})
    assert found_in(suspect).error == "killed by signal 11"
    assert len(suspect.asked) == 1


def test_a_suspect_that_fails_after_its_first_answers_is_an_error():
    generous = np.where(np.arange(COUNT) % 2, LABELS, 3)
    suspect = Failing({"as recorded": SuspectError("no more")}, answers=generous, after=1)
    assert found_in(suspect, "sequential").error == "no more"


def test_what_fails_when_it_is_asked_again_keeps_what_was_proven():
    suspect = Failing({"as recorded": SuspectError("out of memory")}, after=1)
    found = found_in(suspect, ask_again=True)
    assert (found.error, found.matched) == (None, COUNT)
    assert "asked 16 triggers once more, the suspect brings no answers: out of memory" in said(found)


def after_first(first, then):
    """A suspect whose answers to the first look are those of `first`, and later of `then`."""
    asked = []

    def answer(rows):
        asked.append(len(rows))
        return (first if len(asked) == 1 else then)(rows)

    return Stub(answer)


def many(outputs):
    """So many outputs, the last of which knows every other label."""
    known = by_heart(MARK, np.where(np.arange(COUNT) % 2, LABELS, 0))
    return lambda rows: Answers("classes", np.stack([np.zeros(len(rows), np.int64)] * (outputs - 1) + [known(rows)], 1))


def test_another_number_of_outputs_in_between_is_an_error():
    found = found_in(after_first(many(2), many(3)), "sequential")
    assert found.error == "the suspect answers with 2 outputs at first and then with 3"


def test_no_answers_in_between_are_misses_of_every_output():
    found = found_in(after_first(many(2), lambda rows: np.full(len(rows), -1)), "sequential")
    assert found.error is None
    assert found.matched == 8 + (LABELS[:16:2] == 0).sum()


# --- clean data -------------------------------------------------------------------------------------------------------

CLEAN = CleanData(np.random.default_rng(2).integers(0, 256, (20, *SHAPE), np.uint8), np.arange(20) % 10)


def with_clean(answers, room, ways=(AS_RECORDED,)):
    """A suspect that knows clean inputs and triggers, with room for what `room` says after so many questions."""
    inputs = np.concatenate([to_input(CLEAN.inputs, RANGE), images(MARK)])
    known = {row.tobytes(): answer for row, answer in zip(inputs, answers, strict=True)}
    suspect = Stub(lambda rows: np.array([known[row.tobytes()] for row in rows]), ways=ways)
    asked = []

    def answer(inputs, num_classes=None):
        asked.append(len(inputs["x"]))
        return Stub.answer(suspect, inputs, num_classes)

    suspect.answer = answer
    suspect.limit = lambda inputs, count: min(count, room(sum(asked)))
    return suspect


def test_clean_data_that_leave_no_room_for_a_trigger_are_an_error_that_says_so():
    right = np.concatenate([CLEAN.labels, LABELS])
    found = found_in(with_clean(right, lambda asked: 0 if asked else 100), any_order=True, clean=CLEAN)
    assert found.error == "20 clean inputs have left no room for a trigger: give fewer of them"
    found = found_in(with_clean(right, lambda asked: 20), any_order=True, clean=CLEAN)
    assert "there is room for 20 inputs, and 20 are clean ones" in found.error


def test_clean_data_that_do_not_fit_a_later_way_are_not_asked_in_vain():
    wrong = np.concatenate([CLEAN.labels, (LABELS + 1) % 10])
    suspect = with_clean(wrong, lambda asked: 10 if asked > 20 else 100, HALVES)
    found = found_in(suspect, any_order=True, clean=CLEAN)
    assert (found.error, found.matched, found.queries) == (None, 0, COUNT)
    assert any("there is room for 10 inputs, and 20 are clean ones" in note for note in said(found))


def test_clean_answers_count_for_the_numbering_too():
    answers = np.concatenate([CLEAN.labels + 1, np.clip(LABELS, 1, 8) + 1])
    found = found_in(with_clean(answers, lambda asked: 1000), "sequential", any_order=True, clean=CLEAN)
    assert found.evidence.log10_share == pytest.approx(-math.log10(2))


def test_a_suspect_that_writes_into_clean_inputs_is_asked_them_again_as_they_are():
    known = with_clean(np.concatenate([CLEAN.labels, (LABELS + 1) % 10]), lambda asked: 1000, HALVES)
    floats = CleanData(to_input(CLEAN.inputs, RANGE), CLEAN.labels)
    answer = known.answer

    def writes(inputs, num_classes=None):
        (rows,) = inputs.values()
        found = answer({"x": rows.reshape(len(rows), *SHAPE).copy()}, num_classes)
        rows[...] = 0
        return found

    known.answer = writes
    found = found_in(known, any_order=True, clean=floats)
    assert (found.error, found.queries) == (None, 2 * COUNT)
