"""A watermark and its file: what was saved comes back bit for bit, or one sentence says why it does not."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from wmengine.key import Key, canonical_json
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.watermark import Watermark

from wmengine.errors import WatermarkError

KEY = Key("ACME Vision", bytes(range(32)))
SHAPES = [[16, 1, 3, 3], [32, 16, 3, 3], [10, 128]]
SKETCH = white_box_parameters(scheme("sketch", bits=64), SHAPES, [1, 8, 8], "detector-v3")  # type: ignore[arg-type]
ADI = black_box_parameters(scheme("adi", count=20), [1, 8, 8], 10, [[0.0, 1.0]], "detector-v3")  # type: ignore[arg-type]
CONTROL = {"matched": 31, "total": 64, "log10_p": "-0.2218"}


def marks() -> list[Watermark]:
    return [Watermark.create(KEY, "sketch", SKETCH, CONTROL), Watermark.create(KEY, "adi", ADI)]


def content(mark: Watermark) -> dict[str, Any]:
    """Every field of a mark, in a form that can be compared."""
    arrays = {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in mark.arrays.items()}
    return {**vars(mark), "arrays": arrays, "commitment": mark.commitment}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watermarks")


# --- the mark itself ---


@pytest.mark.parametrize(
    ("name", "parameters", "commitment"),
    [
        ("sketch", SKETCH, "612a3de283043eed4275d85cc541d8a8934e5f73818f9125cbf7aebc2bf40972"),
        ("adi", ADI, "e0d38c5e8abb11a64ce638567c78f62b474cf60a97693ece8bd54b89048bc599"),
    ],
)
def test_golden_commitments(name: str, parameters: dict[str, Any], commitment: str) -> None:
    assert Watermark.create(KEY, name, parameters).commitment == commitment


def test_a_mark_says_what_it_is() -> None:
    sketch, adi = marks()
    assert (sketch.name, sketch.scheme, sketch.kind, sketch.total) == ("detector-v3", "sketch", "white-box", 64)
    assert (adi.name, adi.scheme, adi.kind, adi.total) == ("detector-v3", "adi", "black-box", 20)
    assert (adi.owner, adi.control, sketch.control) == ("ACME Vision", None, CONTROL)
    assert repr(adi) == "Watermark(name='detector-v3', scheme='adi', owner='ACME Vision', total=20)"


def test_the_commitment_binds_owner_scheme_parameters_and_salt_but_not_the_control() -> None:
    sketch = marks()[0]
    renamed = {**SKETCH, "name": "detector-v4"}
    others = [
        Watermark.create(replace(KEY, owner="Acme"), "sketch", SKETCH),
        Watermark.create(replace(KEY, secret=bytes(32)), "sketch", SKETCH),
        Watermark.create(KEY, "sketch", renamed),
        Watermark.create(KEY, "uchida", SKETCH),
        replace(sketch, salt="00" * 32),
        replace(sketch, owner="Mallory"),
    ]
    assert len({mark.commitment for mark in [sketch, *others]}) == 7
    assert replace(sketch, control=None, created="2001-02-03").commitment == sketch.commitment


def test_the_salt_hides_the_commitment_s_content() -> None:
    """All that is bound may be guessed (a published model's name and shapes), and the salt keeps guesses unchecked."""
    sketch = marks()[0]
    assert bytes.fromhex(sketch.salt) != bytes(32)
    assert sketch.salt != Watermark.create(KEY, "sketch", {**SKETCH, "name": "n"}).salt


def test_a_mark_cannot_be_changed_through_what_made_it() -> None:
    parameters = json.loads(json.dumps(ADI))
    mark = Watermark.create(KEY, "adi", parameters)
    before = content(mark)
    parameters["input_shape"][0] = 3
    with pytest.raises(ValueError, match="read-only"):
        mark.arrays["labels"][0] = 1
    with pytest.raises(AttributeError):
        mark.owner = "Mallory"  # type: ignore[misc]
    assert content(mark) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"owner": " "}, "owner must be printable"),
        ({"salt": "00"}, "salt must be 64 hex digits"),
        ({"salt": "AB" * 32}, "salt must be 64 hex digits"),
        ({"salt": "xy" * 32}, "non-hexadecimal|salt must be"),
        ({"created": "today"}, "Invalid isoformat string: 'today'"),
        ({"created": "20240131"}, "created must be an ISO date"),
        ({"version": 2}, "version 2 of scheme 'adi' is not this wmengine's 1"),
        ({"scheme": "sketch"}, "lack 'bits'"),
        ({"arrays": {}}, "has the arrays triggers, labels"),
    ],
)
def test_a_field_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(marks()[1], **change)


@pytest.mark.parametrize("control", [{"log10_p": -0.5}, {"p": None}, [1]])
def test_a_control_holds_integers_and_strings(control: Any) -> None:
    with pytest.raises(TypeError):
        Watermark.create(KEY, "adi", ADI, control)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.full(20, 10), "'labels' must hold classes from 0 to 9"),
        ("labels", np.full(20, -1), "'labels' must hold classes from 0 to 9"),
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
    with pytest.raises(ValueError, match="'bits' must hold 0 and 1 only"):
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


# --- its file ---


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_mark_survives_its_file(tmp_path: Path, passphrase: str | None) -> None:
    for mark in marks():
        mark.save(tmp_path / "a.wm", passphrase)  # the second in place of the first
        assert content(Watermark.load(str(tmp_path / "a.wm"), passphrase)) == content(mark)
        assert stat.S_IMODE((tmp_path / "a.wm").stat().st_mode) == 0o600
        assert os.listdir(tmp_path) == ["a.wm"]
        assert (KEY.owner.encode() in (tmp_path / "a.wm").read_bytes()) == (passphrase is None)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.binary(min_size=32, max_size=32),
    owner=st.text("aß\u4e2d\"\\'/{}", min_size=1, max_size=9),
    count=st.integers(1, 6),
    classes=st.integers(2, 2**31),
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=4),
    high=st.floats(0.5, 1e30),
)
def test_any_mark_survives_its_file(
    folder: Path, seed: bytes, owner: str, count: int, classes: int, shape: list[int], high: float
) -> None:
    preset = scheme("adi", count=count)
    parameters = black_box_parameters(preset, shape, classes, [[0.0, high]] * shape[0], owner)  # type: ignore[arg-type]
    mark = Watermark.create(Key(owner, seed), "adi", parameters)
    mark.save(folder / "any.wm")
    assert content(Watermark.load(folder / "any.wm")) == content(mark)


def test_the_file_holds_this_mark_s_secrets_only_and_no_pickle(tmp_path: Path) -> None:
    mark = marks()[1]
    mark.save(tmp_path / "a.wm")
    data = (tmp_path / "a.wm").read_bytes()
    assert KEY.secret not in data
    assert KEY.secret.hex().encode() not in data
    assert set(load_arrays(data)) == {"triggers", "labels"}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    document = json.loads(header["__metadata__"]["wmengine"])
    assert canonical_json(document).decode() == header["__metadata__"]["wmengine"]
    assert (document["format"], document["commitment"]) == ("wmengine/1", mark.commitment)


def test_a_sealed_mark_needs_its_passphrase(tmp_path: Path) -> None:
    marks()[0].save(tmp_path / "a.wm", "correct horse")
    with pytest.raises(WatermarkError, match=r"a\.wm is sealed; give its passphrase"):
        Watermark.load(tmp_path / "a.wm")
    with pytest.raises(WatermarkError, match=r"a\.wm does not open with this passphrase; give the one"):
        Watermark.load(tmp_path / "a.wm", "battery staple")


def test_what_is_no_watermark_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WatermarkError, match=r"absent\.wm does not exist; give the path of a watermark file"):
        Watermark.load(tmp_path / "absent.wm")
    with pytest.raises(WatermarkError, match="is not a file; give the path of a watermark file"):
        Watermark.load(tmp_path)
    KEY.save(tmp_path / "a.key")
    with pytest.raises(WatermarkError, match=r"a\.key is not a watermark file; give a \.wm file"):
        Watermark.load(tmp_path / "a.key")
    (tmp_path / "weights.safetensors").write_bytes(save_arrays({"w": np.zeros(3)}, metadata={"format": "pt"}))
    with pytest.raises(WatermarkError, match=r"weights\.safetensors is not a watermark file"):
        Watermark.load(tmp_path / "weights.safetensors")
    with pytest.raises(WatermarkError, match="choose a folder that exists"):
        marks()[0].save(tmp_path / "absent" / "a.wm")


HUGE = {"count": 1 << 20, "input_shape": [1, 1 << 20, 1 << 20]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "wmengine/2"},
            "has format 'wmengine/2' and this wmengine reads 'wmengine/1'; use the one that made it",
        ),
        ({"kind": "key"}, "holds a 'key', not a watermark; give a .wm file"),
        ({"colour": "red"}, "has an unknown field 'colour'; use the wmengine that made it"),
        ({"salt": None}, r"is damaged \(it lacks the field 'salt'\); take it from a backup"),
        ({"scheme": "blind"}, r"cannot be used \(there is no scheme 'blind'; the schemes are .*\); take it"),
        ({"scheme": ["adi"]}, r"cannot be used \(there is no scheme \['adi'\]"),
        ({"scheme": "sketch"}, r"cannot be used \(the parameters of 'sketch' lack 'bits'\)"),
        ({"version": 2}, r"cannot be used \(version 2 of scheme 'adi' is not this wmengine's 1\)"),
        ({"parameters": {**ADI, "colour": 1}}, "hold an unknown field 'colour'"),
        ({"parameters": {**ADI, "num_classes": 2}}, "'labels' must hold classes from 0 to 1 only"),
        ({"parameters": {**ADI, "name": "other"}}, "does not match its own commitment; take it from a backup"),
        ({"parameters": {**ADI, **HUGE}}, r"its array 'triggers' must be uint8\[1048576, 1, 1048576, 1048576\]"),
        ({"parameters": []}, "cannot be used"),
        ({"owner": "Mallory"}, "does not match its own commitment"),
        ({"owner": 7}, "owner must be a str"),
        ({"created": "2024-13-01"}, "cannot be used"),
        ({"control": "none"}, "control must be a dict"),
        ({"arrays": {}}, "its arrays must be triggers, labels"),
        ({"arrays": {"labels": "", "triggers": ""}}, "its array 'triggers' does not match its digest"),
    ],
)
def test_a_wrong_field_is_named_even_if_the_digest_was_made_to_fit(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    mark = marks()[1]
    mark.save(tmp_path / "a.wm")
    rewritten = rewrite((tmp_path / "a.wm").read_bytes(), lambda document: document.update(change))
    (tmp_path / "b.wm").write_bytes(rewritten)
    with pytest.raises(WatermarkError, match=r"b\.wm .*" + message) as raised:
        Watermark.load(tmp_path / "b.wm")
    assert "\n" not in str(raised.value)


def rewrite(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with its metadata changed, fields set to None removed, and the digest made to fit."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    document = json.loads(header["__metadata__"]["wmengine"])
    change(document)
    document = {field: value for field, value in document.items() if value is not None and field != "digest"}
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    return save_arrays(load_arrays(data), metadata={"wmengine": canonical_json(document).decode()})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        '{"format":',
        '{"format":"wmengine/1","format":"wmengine/1"}',
        "[" * 50_000,
        '"\\ud800"',
        "NaN",
    ],
)
def test_metadata_that_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.wm").write_bytes(save_arrays({"w": np.zeros(3)}, metadata={"wmengine": text}))
    with pytest.raises(WatermarkError, match=r"a\.wm (is damaged|has format|holds a)"):
        Watermark.load(tmp_path / "a.wm")


def test_a_float_in_the_metadata_has_no_one_spelling(tmp_path: Path) -> None:
    marks()[0].save(tmp_path / "a.wm")
    data = (tmp_path / "a.wm").read_bytes()
    for old, new in ((b'\\"version\\":1', b'\\"version\\":1.0'), (b'\\"bits\\":64', b'\\"bits\\":064')):
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip().replace(old, new)
        assert header != data[8 : 8 + length].rstrip()
        header += b" " * (-len(header) % 8)
        (tmp_path / "b.wm").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        with pytest.raises(WatermarkError, match=r"b\.wm is damaged"):
            Watermark.load(tmp_path / "b.wm")


@pytest.fixture(scope="module")
def files(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    saved = []
    for mark in marks():
        mark.save(folder / "whole.wm")
        saved.append(((folder / "whole.wm").read_bytes(), content(mark)))
    return saved


def load_or_complaint(path: Path, data: bytes) -> Watermark | str:
    path.write_bytes(data)
    try:
        return Watermark.load(path)
    except WatermarkError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1), st.data())
def test_a_changed_byte_is_refused_or_harmless(
    folder: Path, files: list[tuple[bytes, dict[str, Any]]], which: int, data: st.DataObject
) -> None:
    whole, expected = files[which]
    header = 8 + int.from_bytes(whole[:8], "little")
    position = data.draw(st.integers(0, header - 1) | st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789abcdef"{}[],: \\'))
    found = load_or_complaint(folder / "changed.wm", whole[:position] + bytes([byte]) + whole[position + 1 :])
    if isinstance(found, str):
        assert "changed.wm" in found
        assert "\n" not in found
    else:
        assert content(found) == expected


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1), st.data())
def test_a_cut_or_lengthened_file_is_refused(
    folder: Path, files: list[tuple[bytes, dict[str, Any]]], which: int, data: st.DataObject
) -> None:
    whole, _ = files[which]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    (folder / "cut.wm").write_bytes(whole[:start] + whole[stop:])
    with pytest.raises(WatermarkError, match=r"cut\.wm "):
        Watermark.load(folder / "cut.wm")
    (folder / "long.wm").write_bytes(whole[:stop] + data.draw(st.binary(min_size=1, max_size=9)) + whole[stop:])
    with pytest.raises(WatermarkError, match=r"long\.wm "):
        Watermark.load(folder / "long.wm")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_watermark(folder: Path, data: bytes) -> None:
    (folder / "random.wm").write_bytes(data)
    with pytest.raises(WatermarkError, match=r"random\.wm is not a watermark file"):
        Watermark.load(folder / "random.wm")


def test_marks_are_loaded_without_torch_or_cryptography(tmp_path: Path) -> None:
    marks()[0].save(tmp_path / "a.wm")
    code = (
        "import sys; from wmengine.watermark import Watermark; Watermark.load(sys.argv[1]); "
        "print([name for name in ('torch', 'cryptography', 'onnxruntime', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.wm")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
