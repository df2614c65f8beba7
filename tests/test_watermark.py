"""A mark: what it binds, what its key says of it, and that nothing in it can be changed unnoticed."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from example_marks import ADI, ADI_PARAMETERS, BASELINE, IMAGES, KEY, SKETCH, SKETCH_PARAMETERS, TASK, content, marks

from wmengine.errors import WatermarkError
from wmengine.identity import subkeys
from wmengine.identity.canonical import canonical_json
from wmengine.marks.catalogue import scheme
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task


def test_a_mark_says_what_it_is() -> None:
    sketch, adi = marks()
    assert (sketch.name, sketch.scheme, sketch.kind, sketch.total) == ("detector-v3", "sketch", "white-box", 64)
    assert (adi.name, adi.scheme, adi.kind, adi.total) == ("detector-v3", "adi", "black-box", 20)
    assert (adi.owner, adi.message, adi.baseline) == ("ACME Vision", None, None)
    assert (sketch.message, sketch.baseline) == ("to Zoë", BASELINE)
    assert sketch.symbols is sketch.arrays["bits"]
    assert repr(adi) == "Watermark(name='detector-v3', scheme='adi', owner='ACME Vision', total=20)"


def test_the_commitment_binds_all_that_scoring_reads_and_the_salt_but_neither_date_nor_baseline() -> None:
    sketch = Watermark.create(KEY, SKETCH, SKETCH_PARAMETERS, baseline=BASELINE)
    others = [
        Watermark.create(replace(KEY, owner="Acme"), SKETCH, SKETCH_PARAMETERS),
        Watermark.create(replace(KEY, secret=bytes(32)), SKETCH, SKETCH_PARAMETERS),
        Watermark.create(KEY, SKETCH, {**SKETCH_PARAMETERS, "name": "detector-v4"}),
        Watermark.create(KEY, scheme("uchida"), SKETCH_PARAMETERS),
        Watermark.create(KEY, SKETCH, SKETCH_PARAMETERS, message="a"),
        replace(sketch, message="a"),
        replace(sketch, salt="00" * 32),
        replace(sketch, owner="Mallory"),
        replace(sketch, names=["module"] * len(SKETCH_PARAMETERS["carriers"])),
        replace(sketch, arrays={**sketch.arrays, "bits": 1 - sketch.symbols}),
        replace(sketch, arrays={**sketch.arrays, "carrier_keys": sketch.arrays["carrier_keys"] + np.uint64(1)}),
    ]
    assert len({mark.commitment for mark in [sketch, *others]}) == 12
    assert replace(sketch, baseline=None, created="2001-02-03").commitment == sketch.commitment


def test_the_salt_hides_the_commitment_s_content() -> None:
    """All that is bound may be guessed (a published model's name and shapes), and the salt keeps guesses unchecked."""
    sketch = Watermark.create(KEY, SKETCH, SKETCH_PARAMETERS)
    renamed = Watermark.create(KEY, SKETCH, {**SKETCH_PARAMETERS, "name": "n"})
    assert len({sketch.salt, renamed.salt, marks()[0].salt, "00" * 32}) == 4


@pytest.mark.parametrize("preset", [SKETCH, ADI], ids=["sketch", "adi"])
def test_copies_for_two_customers_share_all_but_their_symbols(preset: Preset) -> None:
    parameters = preset.describe(TASK, "detector-v3")
    plain, first = (Watermark.create(KEY, preset, parameters, message=message) for message in (None, "a"))
    assert plain.geometry == first.geometry
    assert plain.commitment != first.commitment
    for name, array in plain.arrays.items():
        assert np.array_equal(array, first.arrays[name]) == (name != preset.symbols.name)
    for parameter, value in (("name", "detector-v4"), ("inputs", [{**parameters["inputs"][0], "name": "x"}])):
        changed = Watermark.create(KEY, preset, {**parameters, parameter: value})
        assert changed.geometry != plain.geometry


def test_the_mark_of_another_copy_is_the_one_that_create_makes() -> None:
    for mark in marks():
        other = mark.with_message(KEY, "to Ada")
        other.check_derivation(KEY)
        assert content(other) == content(Watermark.create(KEY, mark.preset, mark.parameters, message="to Ada"))
        with pytest.raises(WatermarkError, match="was not made with this key"):
            mark.with_message(replace(KEY, secret=bytes(32)), "to Ada")


def test_a_mark_cannot_be_changed_through_what_made_it() -> None:
    parameters = json.loads(json.dumps(ADI_PARAMETERS))
    baseline = {"matched": 2, "total": 20, "log10_p": "-0.2000"}
    mark = Watermark.create(KEY, ADI, parameters, baseline=baseline)
    before = content(mark)
    parameters["inputs"][0]["shape"][0] = 3
    baseline["matched"] = 20
    with pytest.raises(ValueError, match="read-only"):
        mark.arrays["labels"][0] = 1
    with pytest.raises(AttributeError):
        mark.owner = "Mallory"  # type: ignore[misc]
    assert content(mark) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"owner": " "}, "owner must be text"),
        ({"salt": "00"}, "salt must be 64 hex digits"),
        ({"salt": "AB" * 32}, "salt must be 64 hex digits"),
        ({"salt": "xy" * 32}, "non-hexadecimal|salt must be"),
        ({"created": "today"}, "Invalid isoformat string: 'today'"),
        ({"created": "20240131"}, "created must be an ISO date"),
        ({"record": "00"}, "record must be 64 hex digits"),
        ({"message": ""}, "message must be text"),
        ({"version": 2}, "no scheme 'adi' of version 2; it has sketch/1, uchida/1, adi/1"),
        ({"scheme": "sketch"}, "lack 'bits'"),
        ({"arrays": {}}, "has the arrays triggers, labels"),
    ],
)
def test_a_field_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(marks()[1], **change)


def test_an_owner_is_always_named() -> None:
    with pytest.raises(TypeError, match="owner must be a str, and it is NoneType"):
        replace(marks()[1], owner=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "baseline",
    [
        {},
        [1],
        {**BASELINE, "p": 1},
        {**BASELINE, "total": 65},
        {**BASELINE, "matched": 65},
        {**BASELINE, "matched": -1},
        {**BASELINE, "matched": True},
        {**BASELINE, "matched": 3.0},
        {**BASELINE, "log10_p": -0.5},
        {**BASELINE, "log10_p": "0.5"},
        {**BASELINE, "log10_p": "nan"},
        {**BASELINE, "log10_p": "unlikely"},
        {**BASELINE, "log10_p": "-0." + "1" * 100},
    ],
)
def test_a_baseline_holds_matches_of_the_mark_s_symbols_and_their_p(baseline: Any) -> None:
    with pytest.raises(ValueError, match=r"^baseline"):
        Watermark.create(KEY, SKETCH, SKETCH_PARAMETERS, baseline=baseline)


def test_a_mark_is_not_of_the_future() -> None:
    today = datetime.now(UTC).date()
    Watermark.create(KEY, ADI, ADI_PARAMETERS, created=(today + timedelta(days=1)).isoformat())
    with pytest.raises(ValueError, match="which is still to come"):
        Watermark.create(KEY, ADI, ADI_PARAMETERS, created=(today + timedelta(days=3)).isoformat())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.full(20, 10), "'labels' must hold 0 to 9 only"),
        ("labels", np.full(20, -1), "'labels' must hold 0 to 9 only"),
        ("labels", np.zeros(19, np.int64), r"'labels' must be int64\[20\], not int64\[19\]"),
        ("labels", np.zeros(20, np.int32), r"'labels' must be int64\[20\], not int32\[20\]"),
        ("triggers", np.zeros((20, 8, 8), np.uint8), r"'triggers' must be uint8\[20, 1, 8, 8\]"),
    ],
)
def test_arrays_that_do_not_fit_the_parameters_are_refused(name: str, array: np.ndarray, message: str) -> None:
    mark = marks()[1]
    with pytest.raises(ValueError, match=message):
        replace(mark, arrays={**mark.arrays, name: array})


def test_bits_are_zero_or_one() -> None:
    mark = marks()[0]
    with pytest.raises(ValueError, match="'bits' must hold 0 to 1 only"):
        replace(mark, arrays={**mark.arrays, "bits": np.full(64, 2, np.uint8)})


# --- derivation ---


def test_a_mark_is_derived_from_its_key_again() -> None:
    for mark in marks():
        mark.check_derivation(KEY)


def test_another_key_is_told_apart() -> None:
    for mark in marks():
        with pytest.raises(WatermarkError, match="belongs to 'ACME Vision' and the key to 'Mallory'; give the key"):
            mark.check_derivation(replace(KEY, owner="Mallory"))
        with pytest.raises(WatermarkError, match="'detector-v3' was not made with this key of 'ACME Vision'; give"):
            mark.check_derivation(replace(KEY, secret=bytes(32)))


@pytest.mark.parametrize("name", ["bits", "carrier_keys", "labels", "triggers"])
def test_symbols_written_after_the_fact_are_found_out(name: str) -> None:
    mark = next(mark for mark in marks() if name in mark.arrays)
    forged = mark.arrays[name].copy()
    forged.reshape(-1)[3 % forged.size - 1] ^= 1
    with pytest.raises(
        WatermarkError, match=f"the {name} of the watermark of 'detector-v3' are not those that its key"
    ):
        replace(mark, arrays={**mark.arrays, name: forged}).check_derivation(KEY)


def test_parameters_changed_after_the_fact_are_found_out() -> None:
    mark = marks()[0]
    with pytest.raises(WatermarkError, match="was not made with this key"):
        replace(mark, parameters={**mark.parameters, "carrier": "flat"}).check_derivation(KEY)


@pytest.mark.parametrize(
    "change",
    [{"created": "2001-02-03"}, {"baseline": None}, {"baseline": {**BASELINE, "matched": 30}}, {"record": "00" * 32}],
)
def test_a_date_or_a_baseline_that_the_key_did_not_write_is_found_out(change: dict[str, Any]) -> None:
    with pytest.raises(
        WatermarkError, match=r"date or the baseline of .* was changed by somebody without its key; take"
    ):
        replace(marks()[0], **change).check_derivation(KEY)


def test_the_key_writes_another_baseline() -> None:
    other = {**BASELINE, "matched": 30}
    mark = marks()[0].with_baseline(KEY, other)
    mark.check_derivation(KEY)
    assert (mark.baseline, mark.commitment) == (other, marks()[0].commitment)
    with pytest.raises(WatermarkError, match="was not made with this key"):
        mark.with_baseline(replace(KEY, secret=bytes(32)), other)


def test_the_work_of_a_derivation_grows_with_its_carriers_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in bytes that are spelled to be hashed: the parameters once or twice, and a few for each carrier."""
    spelled: list[int] = []

    def counted(value: Any) -> bytes:
        spelled.append(len(canonical_json(value)))
        return canonical_json(value)

    monkeypatch.setattr(subkeys, "canonical_json", counted)
    work = []
    for carriers in (1000, 4000):
        shapes, places = [[8, 8]] * carriers, list(range(carriers))
        parameters = SKETCH.describe(Task(IMAGES, weights=lambda all=(shapes, places): all), "detector-v3")
        spelled.clear()
        Watermark.create(KEY, SKETCH, parameters)
        work.append((len(spelled), sum(spelled)))
    assert [calls - carriers for (calls, _), carriers in zip(work, (1000, 4000), strict=True)] == [
        work[0][0] - 1000
    ] * 2
    assert work[1][1] < 4.5 * work[0][1]
