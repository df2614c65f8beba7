"""What a verdict is: a row without truth value, one place that says owned, and facts that have a sentence each."""

import ast
import json
import math
import string
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged import KEY, Stub, black_box, by_heart, one_hot, white_box

import wmengine
from wmengine.facts import SENTENCES, Fact, fact
from wmengine.judging.judge import Finding
from wmengine.judging.verdict import PROVING, Verdict, corrected, decide, from_dict, log10_calibrated
from wmengine.judging.verification import verify, verify_all
from wmengine.marks.catalogue import registered, scheme
from wmengine.marks.preset import NULLS
from wmengine.suspects.base import Tensor

MARK = black_box()
COPY = by_heart(MARK, one_hot(MARK.symbols))


@pytest.fixture(params=["rank", "exchangeable"])
def ranking(request):
    """adi as a scheme whose p-values only rank."""
    preset = replace(scheme("adi", count=60), name=f"adi by {request.param}", version=9, null=request.param)
    with registered(preset):
        yield preset


def test_a_null_that_only_ranks_never_says_owned(ranking):
    mark = black_box(preset=ranking)
    verdict = verify(by_heart(mark, mark.symbols), mark, key=KEY)
    assert verdict.log10_p < -50
    assert (verdict.decision, verdict.owned, verdict.null) == ("not_proven", False, ranking.null)
    assert Fact("rank_only", {"null": ranking.null}) in verdict.facts
    assert f"the null of this scheme is {ranking.null}: a p-value that only ranks is never proof" in verdict.notes
    both = verify_all(by_heart(mark, mark.symbols), [mark, MARK])
    assert not any(each.owned for each in both)


@given(
    null=st.sampled_from(NULLS),
    log10_p=st.floats(-1e5, 0.0),
    alpha=st.floats(1e-300, 1.0, exclude_max=True),
    tests=st.integers(1, 10**12),
    error=st.sampled_from([None, "it broke"]),
)
def test_owned_is_said_where_and_only_where_a_corrected_p_value_of_a_null_that_proves_reaches_alpha(
    null, log10_p, alpha, tests, error
):
    preset = replace(scheme("adi", count=60), name=f"adi {null}", version=9, null=null)
    with registered(preset):
        mark = replace(MARK, scheme=preset.name, version=preset.version)
        decision = decide(Finding(60, 60, 60, log10_p, error=error), mark, alpha, tests)
    reached = min(0.0, log10_p + math.log10(tests)) <= math.log10(alpha)
    expected = "owned" if reached and null in ("exact", "bound") else "not_proven"
    assert decision == ("error" if error else expected)
    assert PROVING == ("exact", "bound")
    assert corrected(log10_p, tests) >= log10_p


def test_a_verdict_is_neither_true_nor_false():
    verdict = verify(COPY, MARK)
    with pytest.raises(TypeError, match=r"ask for its \.owned"):
        bool(verdict)
    with pytest.raises(TypeError, match=r"\.owned"):
        assert not verdict


@pytest.mark.parametrize("test", ["fixed", "sequential"])
def test_a_verdict_comes_back_from_its_json(test):
    weights = [Tensor(np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32), "w")] * 3
    named = Stub(COPY, settings={"labels": [str(each) for each in range(10)], "url": "https://example.org"})
    cases = [
        (COPY, MARK),
        (named, MARK),
        (by_heart(MARK, np.random.default_rng(0).normal(size=(60, 10))), MARK),
        (lambda rows: 1 / 0, MARK),
        (Stub(weights=weights), white_box([(8, 4, 3, 3)], message="for Zoë")),
        (Stub(), white_box([(8, 4, 3, 3)])),
    ]
    for suspect, mark in cases:
        verdict = verify(suspect, mark, test=test)
        row = json.loads(verdict.to_json())
        assert from_dict(row) == verdict
        assert from_dict(row).to_json() == verdict.to_json()
        assert row.keys() == {each.name for each in fields(Verdict)} | {"notes"}
        assert row["notes"] == [SENTENCES[each["code"]].format(**each["values"]) for each in row["facts"]]


def test_settings_say_what_was_fixed_before_anything_was_asked():
    named = Stub(COPY, settings={"url": "https://example.org", "labels": None})
    verdict = verify(named, MARK, test="sequential", isolation="per-model")
    assert verdict.settings == {
        "test": "sequential",
        "classes": "same",
        "isolation": "per-model",
        "device": "cpu",
        "url": "https://example.org",
        "labels": None,
    }


@pytest.mark.parametrize("log10_p", [-1e-9, -1e-5, -0.1, -1.0, -9.0, -300.0, -20000.0])
def test_a_calibrated_e_value_is_the_mean_over_all_powers(log10_p):
    import mpmath

    with mpmath.workdps(40):
        p = mpmath.mpf(10) ** mpmath.mpf(log10_p)
        expected = mpmath.log10((1 - p + p * mpmath.log(p)) / (p * mpmath.log(p) ** 2))
        assert log10_calibrated(log10_p) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


# --- facts ------------------------------------------------------------------------------------------------------------


def calls_of_fact():
    """(file, code, names of values) of every fact that the package makes."""
    for path in sorted(Path(wmengine.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "fact" and node.args:
                codes = [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                for code in codes:
                    yield path.name, code, {each.arg for each in node.keywords}


def test_every_sentence_is_said_somewhere_and_with_the_values_that_it_names():
    made = [*calls_of_fact()]
    assert {code for _, code, _ in made} == set(SENTENCES)
    for file, code, values in made:
        named = {name for _, name, *_ in string.Formatter().parse(SENTENCES[code]) if name}
        assert values == named, f"{file} makes the fact {code!r} with {values}"


def test_a_fact_that_no_sentence_fits_raises_where_it_is_made():
    with pytest.raises(KeyError):
        fact("unheard of")
    with pytest.raises(KeyError):
        fact("room", asked=3)


def test_another_null_is_no_option_of_a_mark():
    """It enters no file: a verdict takes it from the scheme that the mark names."""
    assert "null" not in MARK.parameters
    assert verify(COPY, MARK).null == scheme("adi").null
