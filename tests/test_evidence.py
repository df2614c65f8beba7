"""A verdict's JSON is enough to compute its p-value again, by hand and with nothing of the engine's."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from judged import KEY, Stub, black_box, by_heart, images, white_box

from wmengine.identity.key import Key
from wmengine.judging.asking import TESTS
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import registered, scheme
from wmengine.parts.statistics.either import Either
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.soft import Soft
from wmengine.suspects.adapters import Adapter
from wmengine.suspects.base import Tensor

SHAPE, COUNT = (1, 6, 6), 60
RATES = (0.01, 0.03, 0.1, 0.3)
STATISTICS = {"matches": Matches(), "soft": Soft(), "either": Either()}
ORDER = np.array([3, 7, 0, 9, 1, 8, 2, 4, 6, 5])


def recomputed(document):
    """log10 p of a verdict's JSON text, as docs/design.md says, with whole numbers and 60 digits."""
    evidence = json.loads(document)["evidence"]
    with mpmath.workdps(60):
        compute = {
            ("matches", "fixed"): _tail_of_matches,
            ("matches", "sequential"): _inverse_gain_of_matches,
            ("soft", "fixed"): _tail_of_levels,
            ("soft", "sequential"): _inverse_gain_of_levels,
        }[evidence["statistic"], evidence["test"]]
        return float(min(0, mpmath.log10(compute(**evidence)) - evidence["log10_share"]))


def _tail_of_matches(matched, asked, chance, **_):
    p = mpmath.mpf(chance)
    return mpmath.fsum(mpmath.binomial(asked, k) * p**k * (1 - p) ** (asked - k) for k in range(matched, asked + 1))


def _inverse_gain_of_matches(matched, asked, chance, **_):
    p = mpmath.mpf(chance)
    gains = mpmath.betainc(matched + 1, asked - matched + 1, p, 1)
    return (1 - p) * p**matched * (1 - p) ** (asked - matched) / gains


def _tail_of_levels(rows, **_):
    """The share of all strings of symbols whose levels sum to as much, each row's law being a polynomial; but 1 where
    Chernoff's bound at no rate is below 1/100."""
    if max(_gains(rows)) < 100:
        return mpmath.mpf(1)
    law = {0: 1}
    for _level, *pairs in rows:
        wider = {}
        for place, count in law.items():
            for level, times in zip(pairs[::2], pairs[1::2], strict=True):
                wider[place + level] = wider.get(place + level, 0) + count * times
        law = wider
    total = sum(row[0] for row in rows)
    return mpmath.mpf(sum(count for place, count in law.items() if place >= total)) / sum(law.values())


def _inverse_gain_of_levels(rows, **_):
    return len(RATES) / mpmath.fsum(_gains(rows))


def _gains(rows):
    gains = []
    for rate in map(mpmath.mpf, RATES):
        gain = mpmath.mpf(1)
        for at, *pairs in rows:
            each = [(mpmath.e ** (rate * level), times) for level, times in zip(pairs[::2], pairs[1::2], strict=True)]
            gain *= mpmath.e ** (rate * at) * sum(times for _, times in each) / mpmath.fsum(g * t for g, t in each)
        gains.append(gain)
    return gains


def check(verdict):
    assert verdict.error is None
    assert recomputed(verdict.to_json()) == pytest.approx(verdict.log10_p, rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def presets():
    """The black-box and the white-box scheme with each statistic."""
    with ExitStack() as stack:
        found = {}
        for scheme_name, options in {"adi": {"count": COUNT}, "sketch": {"bits": 64}}.items():
            for name, statistic in STATISTICS.items():
                preset = replace(
                    scheme(scheme_name, **options), name=f"{scheme_name} by {name}", version=7, statistic=statistic
                )
                stack.enter_context(registered(preset))
                found[scheme_name, name] = preset
        yield found


def copy_of(mark, kept=1.0, ways=1, order=None, heads=1, scored=False):
    """Answers a share of the triggers rightly, by the last of several ways in which it can be asked."""
    generator, classes = np.random.default_rng(4), mark.parameters["num_classes"]
    labels = mark.arrays["labels"]
    said = np.where(generator.random(len(labels)) < kept, labels, generator.integers(0, classes, len(labels)))
    said = said if order is None else order[said]
    answers = np.concatenate([generator.integers(0, classes, (len(labels), heads - 1)), said[:, None]], axis=1)
    if scored:
        answers = generator.normal(size=(len(labels), classes))
        answers[np.arange(len(labels)), said] += 1.5
    layouts = ["as recorded", "flat", "channels last"][:ways]
    known, right = by_heart(mark, answers), [SHAPE, (36,), (6, 6, 1)][ways - 1]

    def answer(rows):
        if rows.shape[1:] != right:
            return answers[:1].repeat(len(rows), axis=0)
        return known(rows.reshape(len(rows), *SHAPE))  # of one channel: no number moves

    return Stub(answer, ways=[Adapter(layout, share=1 / ways) for layout in layouts])


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("options", [{"scored": True}, {"ways": 3}, {"heads": 4}, {"ways": 2, "heads": 2}], ids=str)
def test_black_box(presets, statistic, test, kept, options):
    mark = black_box(SHAPE, preset=presets["adi", statistic])
    verdict = verify(copy_of(mark, kept, **options), mark, test=test)
    check(verdict)
    assert verdict.evidence.test == test
    assert verdict.evidence.statistic == statistic or statistic == "either"


def test_the_better_of_two_statistics_is_the_evidence(presets):
    mark = black_box(SHAPE, preset=presets["adi", "either"])
    assert verify(copy_of(mark, scored=True), mark).evidence.statistic == "soft"
    labels = by_heart(mark, mark.arrays["labels"])
    assert len(verify(labels, mark).to_json()) < 5000


def test_a_test_that_stopped_early_says_that_the_rest_was_not_asked():
    mark = black_box(SHAPE, count=COUNT)
    verdict = verify(copy_of(mark), mark, test="sequential")
    assert (verdict.matched, verdict.total) == (16, 60)
    assert "stopped after 16 queries, as the answer was clear: what was not asked is no miss" in verdict.notes
    check(verdict)


@pytest.mark.parametrize("order", [None, ORDER])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("scored", [False, True])
def test_every_order_of_the_classes(order, kept, scored):
    mark = black_box(SHAPE, count=COUNT)
    check(verify(copy_of(mark, kept, order=order, scored=scored), mark, classes="any"))


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("settings", [{}, {"labels": [f"kind {number}" for number in range(10)]}])
def test_names_that_were_given_at_verification(test, settings):
    mark = black_box(SHAPE, count=COUNT)
    suspect = copy_of(mark)
    suspect.settings = settings
    verdict = verify(suspect, mark, test=test)
    check(verdict)
    assert any("names" in note for note in verdict.notes) == bool(settings)


@pytest.mark.parametrize(("classes", "count"), [(2, 1), (2, 600), (1 << 31, 1), (1 << 31, 300), (1000, 1)])
@pytest.mark.parametrize("test", TESTS)
def test_from_one_trigger_to_p_values_of_ten_to_the_minus_two_thousand(classes, count, test):
    mark = black_box(SHAPE, classes, count)
    for alpha in (5e-324, 1e-9, 0.999):
        verdict = verify(copy_of(mark), mark, test=test, alpha=alpha)
        check(verdict)
        assert verdict.owned == (verdict.log10_p <= math.log10(alpha))
        assert verdict.matched == verdict.queries


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("tensors", [1, 5])
def test_white_box_with_several_pairings(presets, statistic, tensors):
    shape, generator = (8, 4, 3, 3), np.random.default_rng(0)
    mark = white_box([shape], preset=presets["sketch", statistic])
    weights = [Tensor(generator.normal(size=shape).astype(np.float32), str(index)) for index in range(tensors)]
    for key in (KEY, Key("ACME Vision", b"\1" * 32)):
        verdict = verify(Stub(weights=weights), white_box([shape], preset=mark.preset, key=key))
        check(verdict)
        share = 0.5 if statistic == "either" else 1.0
        assert verdict.evidence.log10_share == pytest.approx(math.log10(share / tensors))
    nothing = verify(Stub(), mark)
    assert (nothing.evidence, nothing.log10_p) == (None, 0.0)


def test_the_triggers_that_evidence_is_about_are_those_of_the_mark():
    """What is asked is what the mark's file holds, in its order."""
    mark, asked = black_box(SHAPE, count=COUNT), []

    def listening(rows):
        asked.extend(rows.copy())
        return np.zeros((len(rows), 10), np.float32)

    verify(listening, mark)
    assert np.array_equal(np.stack(asked[: mark.total]), images(mark))
