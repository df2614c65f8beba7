"""`response` against claimants who choose how it is asked, and against suspects that fail, say nothing or change."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from responding import KEY, PROBES, bent_network, network, served, service, size_of

from wmengine import Watermark, export_onnx, scheme, verify, verify_all
from wmengine.facts import fact
from wmengine.judging.asking import Terms
from wmengine.judging.judge import judge_suspect
from wmengine.marks.preset import array_digest
from wmengine.parts.responses.reading import unexplained
from wmengine.suspects import open_suspect
from wmengine.suspects.base import Answers
from wmengine.testing import small_network

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def mark() -> Watermark:
    return served().watermark()


def test_a_mark_made_later_does_not_choose_the_order_of_the_classes_for_another():
    """Its own controls' answers are its maker's word, and could be made to suit bits that are known by then."""
    held = mark()
    material = {name: held.arrays[name] for name in held.parameters["material"]}
    material["answers"] = np.roll(material["answers"], 1, axis=2)
    digests = {**held.parameters["material"], "answers": array_digest(material["answers"])}
    later = Watermark.create(KEY, held.preset, {**held.parameters, "material": digests}, material=material)
    found = verify_all(served(), [later, held], key=KEY, classes="any")
    assert found[1].log10_p == pytest.approx(verify(served(), held, key=KEY).log10_p)


def test_the_same_numbers_as_answers_of_more_controls_in_fewer_views_are_another_pool():
    """Its maker's word too: one verdict of both marks would go by the one's size and base."""
    held = service(scheme=scheme("response", probes=256, bits=256, views=2)).watermark()
    material = {name: held.arrays[name] for name in held.parameters["material"]}
    material["features"] = material["features"][:256]
    material["answers"] = material["answers"].reshape(2, 256, 10)
    digests = {name: array_digest(array) for name, array in material.items()}
    parameters = {**held.parameters, "material": digests, "views": 1, "controls": 2}
    later = Watermark.create(KEY, held.preset, parameters, material=material)
    found = verify_all(bent_network(held), [later, held], key=KEY)
    alone = verify(bent_network(held), held, key=KEY)
    assert (found[1].log10_p, found[1].queries) == (pytest.approx(alone.log10_p), alone.queries)


def test_a_small_pool_is_first_looked_at_where_ways_are_compared_and_nobody_is_given_up_before_512_answers():
    found = verify(served(), mark(), key=KEY, test="sequential", alpha=0.1)
    assert (size_of(mark()), found.owned, found.queries) == (1024, True, 128)
    found = verify(lambda rows: np.zeros(len(rows), np.int64), mark(), key=KEY, test="sequential")
    assert (found.owned, found.queries) == (False, 512)


@pytest.mark.parametrize("sequential", [False, True])
def test_whoever_sets_how_many_probes_are_asked_pays_for_all_that_he_could_have_set(sequential):
    suspect, size = open_suspect(served()), size_of(mark())
    suspect.limit = lambda inputs, count: count // 2
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=sequential, log10_bar=50.0))
    looks = 4 if sequential else 1
    assert found.evidence.log10_share == pytest.approx(math.log10(0.5 / (looks * size)))
    assert found.queries <= size // 2


def test_a_deadline_that_ends_the_pool_is_paid_for_like_a_budget():
    suspect = open_suspect(served())
    whole = suspect.answer

    def answer(inputs, classes):
        given = whole(inputs, classes)
        return Answers(given.kind, given.values, unasked={len(given) - 1: "the time is up"})

    suspect.answer = answer
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=False, log10_bar=50.0))
    assert found.evidence.log10_share == pytest.approx(math.log10(0.5 / size_of(mark())))


@pytest.mark.parametrize("controls", [0, 2])
def test_a_verdict_says_how_many_controls_it_is_read_against(controls):
    made = service(controls=[network(seed) for seed in range(7, 7 + controls)])
    found = verify(made, made.watermark(), key=KEY)
    (said,) = (each for each in found.facts if each.code in ("controls", "base_alone"))
    assert said == (fact("controls", count=3) if controls else fact("base_alone"))


def test_what_was_proven_before_a_suspect_failed_stays_proven():
    asked = 0

    def failing(rows):
        nonlocal asked
        asked += len(rows)
        return served()(rows) if asked <= 600 else 1 / 0

    copy = mark().with_message(KEY, "a")
    terms = Terms(sequential=True, log10_bar=6.0)
    proven, other = judge_suspect(open_suspect(failing), [mark(), copy], terms)
    assert proven.error is None
    assert proven.log10_p < -6
    assert other.error is not None


@pytest.mark.parametrize("then", ["fails", "is used up", "answers in another shape", "answers otherwise"])
def test_a_suspect_that_is_asked_again_stays_owned_whatever_it_does_then(then):
    suspect, asked = open_suspect(served()), 0
    whole = suspect.answer

    def answer(inputs, classes):
        nonlocal asked
        given, before = whole(inputs, classes), asked
        asked += len(given)
        if before < size_of(mark()):
            return given
        return {
            "fails": lambda: 1 / 0,
            "is used up": lambda: Answers(
                "scores", given.values * np.nan, unasked=dict.fromkeys(range(len(given)), "")
            ),
            "answers in another shape": lambda: Answers("classes", np.zeros((len(given), 2), np.int64)),
            "answers otherwise": lambda: Answers("scores", -given.values),
        }[then]()

    suspect.answer = answer
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=False, log10_bar=9.0))
    assert found.error is None
    assert found.log10_p < -20
    said = {"fails": {"not_again"}, "is used up": set()}.get(then, {"inconstant"})
    assert {each.code for each in found.facts} & {"not_again", "inconstant"} == said
    assert all(str(each) for each in found.facts)


@pytest.mark.parametrize("options", [{}, {"classes": "any"}, {"test": "sequential"}])
@pytest.mark.parametrize("said", ["NaN", "no class", "the largest floats"])
def test_answers_that_say_nothing_prove_nothing(said, options):
    suspect = {
        "NaN": lambda rows: np.full((len(rows), 10), np.nan),
        "no class": lambda rows: np.full(len(rows), 1000),
        "the largest floats": lambda rows: np.tile([1.7e308, -1.7e308], (len(rows), 5)),
    }[said]
    found = verify(suspect, mark(), key=KEY, **options)
    assert (found.decision, found.log10_p) == ("not_proven", 0.0)
    assert said == "the largest floats" or any(each.code == "left_out" for each in found.facts)


def test_a_regression_on_more_answers_than_inputs_is_the_same():
    logs, said = np.random.default_rng(0).normal(size=(2, 50, 10)), np.random.default_rng(1).random((50, 10))
    twice = unexplained(np.tile(said, (2, 1)), np.tile(logs, (1, 2, 1)))
    assert np.allclose(unexplained(said, logs), twice[:50])


def test_where_the_base_favours_a_class_no_other_way_of_asking_is_taken_for_it(tmp_path):
    """An untrained base names one class for nearly all probes, so that agreement says nothing."""
    plain = small_network(0).eval()
    found = service(plain)
    export_onnx(plain, torch.from_numpy(PROBES[:1]), tmp_path / "plain.onnx")
    verdict = verify(tmp_path / "plain.onnx", found.watermark(), key=KEY)
    assert not any(each.code == "put_otherwise" for each in verdict.facts)
