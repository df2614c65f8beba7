"""Answers that may mean several things: every meaning is tried and paid for, and no stranger is accused more often.

Which output is the answer, and whether classes are counted from 0 or from 1, is told from answers alone where they tell
it, and else tried. The labels are drawn anew again and again while the answers stay, as in the theorem.
"""

import math

import numpy as np
import pytest
from wmengine.judge import score_suspect
from wmengine.key import Key
from wmengine.reordering import CleanData
from wmengine.schemes import black_box_parameters, scheme
from wmengine.stats import binomial_log10_tail
from wmengine.trial import MODES, Trial
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

from wmengine.errors import SuspectError, SuspectGone
from wmengine.suspects.adapters import Adapter

KEY = Key("ACME Vision", bytes(range(32)))
SHAPE, COUNT, RANGE = (1, 6, 6), 48, [[-1.0, 1.0]]
HALVES = [Adapter(share=0.5), Adapter(scaling="0 to 255", share=0.5)]


def mark(classes=10, name="detector"):
    return Watermark.create(KEY, "adi", black_box_parameters(scheme("adi", count=COUNT), SHAPE, classes, RANGE, name))


MARK = mark()
LABELS = MARK.arrays["labels"]
TAIL = binomial_log10_tail(COUNT, COUNT, 0.1)


def by_heart(answers, marked=MARK):
    """A function that gives each trigger its row of `answers`."""
    inputs = to_input(marked.arrays["triggers"], RANGE)
    known = {row.tobytes(): answer for row, answer in zip(inputs, answers, strict=True)}
    return lambda rows: np.array([known[row.tobytes()] for row in rows])


def scores(labels, classes=10):
    return np.eye(classes, dtype=np.float32)[labels]


# --- power, and what is paid ------------------------------------------------------------------------------------------


def test_labels_are_counted_from_where_the_answers_show_and_that_is_free():
    for first in (0, 1):
        verdict = verify(by_heart(LABELS + first), MARK)
        assert verdict.log10_p == pytest.approx(TAIL)
        assert any("counted from 1" in note for note in verdict.notes) == bool(first)


def test_where_the_answers_leave_it_open_both_are_tried_and_paid_for():
    many = mark(1000)
    labels = many.arrays["labels"].clip(1, 998)
    for first in (0, 1):
        verdict = verify(by_heart(labels + first, many), many)
        matched = int((labels == many.arrays["labels"]).sum())
        assert verdict.matched == matched >= COUNT - 1
        assert verdict.log10_p == pytest.approx(binomial_log10_tail(matched, COUNT, 0.001) + math.log10(2))
        assert any("paid for" in note for note in verdict.notes)


@pytest.mark.parametrize("queries", MODES)
@pytest.mark.parametrize("before", [False, True])
def test_a_class_more_may_stand_before_the_others_or_behind_them(queries, before):
    copy = scores(LABELS + before, 11)
    verdict = verify(by_heart(copy), MARK, queries=queries)
    assert verdict.owned
    assert any("one class more than the watermark" in note for note in verdict.notes)
    twelve = verify(lambda rows: np.zeros((len(rows), 12), np.float32), MARK)
    assert "answers with 12 classes and the watermark has 10" in twelve.error


def test_a_stranger_of_a_class_more_is_no_copy_for_it():
    stranger = np.random.default_rng(0).normal(size=(COUNT, 11)).astype(np.float32)
    assert verify(by_heart(stranger), MARK).decision == "not_proven"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_outputs_that_answer_differently_are_tries(place):
    wrong = np.random.default_rng(1).normal(size=(2, COUNT, 10)).astype(np.float32)
    heads = [*wrong]
    heads.insert(place, scores(LABELS))
    answer = [by_heart(head) for head in heads]
    verdict = verify(lambda rows: {str(index): each(rows) for index, each in enumerate(answer)}, MARK)
    assert verdict.log10_p == pytest.approx(TAIL + math.log10(3))
    assert f"3 outputs that answer differently were tried and paid for; number {place + 1} counts" in verdict.notes


def test_outputs_that_answer_alike_are_one():
    once, twice = by_heart(scores(LABELS)), by_heart(5 * scores(LABELS) - 2)
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
        return scores(wrong[places]), scores(order[right[places]])

    verdict = verify(answer, MARK, classes="any", clean=(clean, clean_labels))
    assert verdict.log10_p == pytest.approx(TAIL + math.log10(2))
    assert any(note.startswith("10 of 10 classes stand elsewhere") for note in verdict.notes)


def test_clean_data_of_the_claimant_are_no_evidence_against_others():
    """Triggers with one bit turned over, and their labels: the order that they give fits any stranger to the mark."""
    many = mark(1000)
    stranger = np.random.default_rng(3).permutation(1000)[:COUNT]
    nearly = many.arrays["triggers"] ^ (np.arange(36).reshape(1, *SHAPE) == 0).astype(np.uint8)
    forged = (nearly, many.arrays["labels"])
    known = by_heart(np.concatenate([stranger]), many)

    def answer(rows):
        triggers = to_input(many.arrays["triggers"], RANGE)
        return known(np.stack([triggers[np.abs(triggers - row).sum(axis=(1, 2, 3)).argmin()] for row in rows]))

    assert verify(answer, many, classes="any", clean=forged).log10_p < -100
    with pytest.raises(ValueError, match="adversarial=True takes no clean="):
        verify(answer, many, key=KEY, adversarial=True, classes="any", clean=forged)
    assert not verify(answer, many, key=KEY, adversarial=True, classes="any").owned


# --- the null hypothesis ----------------------------------------------------------------------------------------------


def strangers(classes):
    """Answers [2, COUNT] or [2, COUNT, R], by two adapters."""
    generator = np.random.default_rng(6)
    shape = (2, COUNT)
    yield "labels", generator.integers(0, classes, shape)
    yield "labels from 1", generator.integers(1, classes + 1, shape)
    yield "a class more", generator.integers(0, classes + 1, shape)
    yield "between", generator.integers(1, classes, shape)
    yield "one label", np.ones(shape, np.int64)
    yield "no answers", np.full(shape, -1)
    yield "three outputs", generator.integers(0, classes, (*shape, 3))
    yield (
        "outputs one after the other",
        (np.arange(COUNT)[None, :, None] + np.arange(classes)) % classes + [[[0]], [[0]]],
    )
    yield "the first alike", np.where(np.arange(COUNT)[:, None] < 16, 1, generator.integers(0, classes, (*shape, 2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("kind", [name for name, _ in strangers(2)])
def test_over_fresh_labels_a_stranger_is_accused_as_rarely_as_p_says(mode, classes, kind):
    answers, marked = dict(strangers(classes))[kind], mark(classes)
    generator = np.random.default_rng(5)
    p, e, trials = [], [], 600
    for _ in range(trials):
        trial = Trial(marked, HALVES, mode, 9.0)
        trial._labels = generator.integers(0, classes, COUNT)
        while (ask := trial.next()) is not None:
            trial.add(answers[HALVES.index(ask.adapter)][ask.start : ask.stop])
        p.append(trial.log10_p)
        e.append(trial.log10_e)
    for a in (0.5, 0.3, 0.1, 0.03, 0.01):
        assert np.mean(np.array(p) <= math.log10(a)) <= a + 3 * math.sqrt(a / trials)
    if mode == "sequential":
        assert np.mean(10.0 ** np.array(e)) <= 1 + 4 * np.std(10.0 ** np.array(e)) / math.sqrt(trials)


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


class Failing:
    """Answers all layouts but those that fail, which raise what they are given."""

    name, sha256, notes = "failing", None, []

    def __init__(self, failures, answers=None, after=0):
        self.failures, self.after, self.asked = failures, after, []
        self.answer = by_heart(LABELS if answers is None else answers)

    def adapters(self, trigger_shape, value_range, every=True):
        return [Adapter(layout, scaling, share=0.25) for scaling in ("as recorded", "bytes") for layout in LAYOUTS]

    def query(self, inputs, num_classes=None):
        layout = "flat" if inputs.ndim == 2 else "as recorded"
        self.asked.append((layout, len(inputs)))
        if layout in self.failures and len(self.asked) > self.after:
            raise self.failures[layout]
        return self.answer(inputs.reshape(len(inputs), *SHAPE))

    def tensors(self, input_shape=None):
        return []

    def close(self):
        pass


LAYOUTS = ("as recorded", "flat")


def score(suspect, mode="all", ask_again=False):
    (found,) = score_suspect(suspect, [MARK], mode, 9.0, ask_again=ask_again)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_that_does_not_run_is_left_for_another_and_its_share_is_spent(mode):
    found = score(Failing({"as recorded": SuspectError("it needs a vector")}), mode)
    assert found.error is None
    assert found.matched == found.queries
    assert found.evidence.log10_share == pytest.approx(math.log10(0.25))
    assert "the suspect cannot be asked with triggers as recorded: it needs a vector" in found.notes


def test_what_fails_in_every_layout_is_an_error_with_the_first_reason_and_asked_once_for_each():
    suspect = Failing({"as recorded": SuspectError("first"), "flat": SuspectError("second")})
    assert score(suspect).error == "first"
    assert [layout for layout, _ in suspect.asked] == ["as recorded", "flat"]


def test_a_process_that_ended_is_asked_nothing_more():
    suspect = Failing({"as recorded": SuspectGone("killed by signal 11")})
    assert score(suspect).error == "killed by signal 11"
    assert len(suspect.asked) == 1


def test_a_suspect_that_fails_after_its_first_answers_is_an_error():
    suspect = Failing({"as recorded": SuspectError("no more")}, answers=np.full(COUNT, 3), after=1)
    assert score(suspect, "sequential").error == "no more"


def test_what_fails_when_it_is_asked_again_keeps_what_was_proven():
    suspect = Failing({"as recorded": SuspectError("out of memory")}, after=1)
    found = score(suspect, ask_again=True)
    assert (found.error, found.matched) == (None, COUNT)
    assert "asked 16 triggers once more, the suspect brings no answers: out of memory" in found.notes


def test_another_number_of_outputs_in_between_is_an_error():
    trial = Trial(MARK, [Adapter()], "sequential", 9.0)
    trial.next()
    trial.add(np.zeros((16, 2), np.int64))
    trial.next()
    with pytest.raises(SuspectError, match="answers with 2 outputs at first and then with 3"):
        trial.add(np.zeros((8, 3), np.int64))


def test_clean_data_that_leave_no_room_for_a_trigger_are_an_error_that_says_so():
    clean, room = CleanData(np.zeros((20, *SHAPE), np.uint8), np.arange(20) % 10), [COUNT]
    trial = Trial(MARK, [Adapter()], "all", 9.0, any_order=True, clean=clean, limit=lambda inputs: room[0])
    trial.next()
    room[0] = 0
    with pytest.raises(SuspectError, match="20 clean inputs have left no room for a trigger: interrupted") as caught:
        trial.add_clean(np.arange(20) % 10, ["interrupted"])
    trial.fail(caught.value)
    assert trial.next() is None
    assert trial.error == str(caught.value)


def test_clean_data_that_do_not_fit_a_later_way_are_not_asked_in_vain():
    clean, room = CleanData(np.zeros((20, *SHAPE), np.uint8), np.arange(20) % 10), [COUNT]
    trial = Trial(MARK, HALVES, "all", 9.0, any_order=True, clean=clean, limit=lambda inputs: min(len(inputs), room[0]))
    trial.next()
    assert len(trial.clean_inputs()) == 20
    trial.add_clean(np.arange(20) % 10)
    trial.add((LABELS + 1) % 10)
    room[0] = 10
    assert trial.next().adapter == HALVES[1]
    with pytest.raises(SuspectError, match="there is room for 10 inputs, and 20 are clean ones") as caught:
        trial.clean_inputs()
    trial.fail(caught.value)
    assert trial.next() is None
    assert (trial.error, trial.matched, trial.queries) == (None, 0, COUNT)


def test_no_answers_in_between_are_misses_of_every_output():
    trial = Trial(MARK, [Adapter()], "sequential", 12.0)
    trial.next()
    trial.add(np.stack([LABELS[:16] * 0, LABELS[:16]], axis=1))
    trial.next()
    trial.add(np.full(8, -1))
    assert (trial.error, trial.matched, trial.queries) == (None, 16, 24)


def test_clean_answers_count_for_the_numbering_too():
    clean = CleanData(np.zeros((20, *SHAPE), np.uint8), np.arange(20) % 10)
    trial = Trial(MARK, [Adapter()], "sequential", 9.0, any_order=True, clean=clean)
    trial.next()
    trial.add_clean(np.arange(20) % 10 + 1)
    trial.add(np.clip(LABELS[:16], 1, 8) + 1)
    assert trial.evidence.log10_share == 0.0
