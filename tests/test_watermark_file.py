"""A mark's file: what was saved comes back bit for bit, or one sentence says why it does not."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_marks import ADI, ADI_PARAMETERS, BASELINE, KEY, content, marks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from wmengine.errors import WatermarkError, WmengineError
from wmengine.identity.canonical import canonical_json
from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watermarks")


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_mark_survives_its_file(tmp_path: Path, passphrase: str | None) -> None:
    for mark in marks():
        mark.save(tmp_path / "a.wm", passphrase, overwrite=True)
        assert content(Watermark.load(str(tmp_path / "a.wm"), passphrase)) == content(mark)
        assert stat.S_IMODE((tmp_path / "a.wm").stat().st_mode) == 0o600
        assert os.listdir(tmp_path) == ["a.wm"]
        assert (KEY.owner.encode() in (tmp_path / "a.wm").read_bytes()) == (passphrase is None)


def test_a_file_is_overwritten_only_where_that_is_asked_for(tmp_path: Path) -> None:
    first, second = marks()
    first.save(tmp_path / "a.wm")
    with pytest.raises(WatermarkError, match=r"a\.wm exists already and is not overwritten; choose another name"):
        second.save(tmp_path / "a.wm")
    assert Watermark.load(tmp_path / "a.wm").commitment == first.commitment


def test_a_file_that_others_can_read_is_refused_with_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "a.wm"
    marks()[0].save(path)
    path.chmod(0o644)
    with pytest.raises(
        WatermarkError,
        match=f"can be read by other users; if it is a watermark file, make it yours alone with: chmod 600 {path}",
    ):
        Watermark.load(path)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.binary(min_size=32, max_size=32),
    owner=st.text("aß\u4e2d\"\\'/{}", min_size=1, max_size=9),
    message=st.none() | st.text("bß:", min_size=1, max_size=9),
    count=st.integers(1, 6),
    classes=st.integers(2, 2**31),
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=4),
    high=st.floats(0.5, 1e30),
)
def test_any_mark_survives_its_file(
    folder: Path, seed: bytes, owner: str, message: str | None, count: int, classes: int, shape: list[int], high: float
) -> None:
    preset = scheme("adi", count=count)
    task = Task({"x": InputSpec(tuple(shape), "float32")}, classes, [[0.0, high]] * shape[0])
    mark = Watermark.create(Key(owner, seed), preset, preset.describe(task, owner), message=message)
    mark.save(folder / "any.wm", overwrite=True)
    assert content(Watermark.load(folder / "any.wm")) == content(mark)


def test_names_of_carriers_survive_their_file_and_may_be_missing(tmp_path: Path) -> None:
    plain = marks()[0]
    named = replace(plain, names=["a", "b.c", ""])
    for mark in (plain, named):
        mark.save(tmp_path / "a.wm", overwrite=True)
        loaded = Watermark.load(tmp_path / "a.wm")
        assert (loaded.names, loaded.commitment, loaded.geometry) == (mark.names, mark.commitment, mark.geometry)
        assert loaded.with_message(KEY, "to Ada").names == mark.names
        loaded.check_derivation(KEY)
    assert plain.geometry != named.geometry
    for wrong in ("abc", [], ["a", "b"], [7] * 3, ["x" * 1001] * 3):
        with pytest.raises(ValueError, match="names must be"):
            replace(plain, names=wrong)


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
    private(tmp_path / "weights.safetensors", save_arrays({"w": np.zeros(3)}, metadata={"format": "pt"}))
    with pytest.raises(WatermarkError, match=r"weights\.safetensors is not a watermark file"):
        Watermark.load(tmp_path / "weights.safetensors")
    with pytest.raises(WatermarkError, match="choose a folder that exists"):
        marks()[0].save(tmp_path / "absent" / "a.wm")


def private(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


HUGE = {"count": 1 << 20, "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 1 << 20, 1 << 20]}]}


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
        (
            {"scheme": "blend"},
            r"cannot be used \(this wmengine has no scheme 'blend' of version 1; it has .*\); take it",
        ),
        ({"scheme": ["adi"]}, r"cannot be used \(this wmengine has no scheme \['adi'\]"),
        ({"scheme": "sketch"}, r"cannot be used \(the parameters of 'sketch' lack 'bits'\)"),
        ({"version": 2}, r"cannot be used \(this wmengine has no scheme 'adi' of version 2; it has sketch/1, "),
        ({"parameters": {**ADI_PARAMETERS, "colour": 1}}, "hold an unknown field 'colour'"),
        ({"parameters": {**ADI_PARAMETERS, "num_classes": 2}}, "'labels' must hold 0 to 1 only"),
        (
            {"parameters": {**ADI_PARAMETERS, "name": "other"}},
            "does not match its own commitment; take it from a backup",
        ),
        (
            {"parameters": {**ADI_PARAMETERS, **HUGE}},
            r"its array 'triggers' must be uint8\[1048576, 1, 1048576, 1048576\]",
        ),
        ({"parameters": []}, "cannot be used"),
        ({"owner": "Mallory"}, "does not match its own commitment"),
        ({"owner": 7}, "owner must be a str"),
        ({"created": "2024-13-01"}, "cannot be used"),
        ({"created": "3024-12-01"}, "still to come"),
        ({"baseline": "none"}, "baseline must hold matched, total, log10_p"),
        ({"baseline": {**BASELINE, "total": 21, "matched": 0}}, "baseline must be matches of at most 20 symbols"),
        ({"message": "to Ada"}, "does not match its own commitment"),
        ({"message": 7}, "message must be a str"),
        ({"message": "a\u200b"}, "message must be of visible characters"),
        ({"names": ["module"]}, "names must be one for each carrier"),
        ({"record": None}, r"is damaged \(it lacks the field 'record'\)"),
        ({"record": "x" * 64}, "cannot be used"),
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
    with pytest.raises(WatermarkError, match=r"b\.wm .*" + message) as raised:
        Watermark.load(private(tmp_path / "b.wm", rewritten))
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
    path = private(tmp_path / "a.wm", save_arrays({"w": np.zeros(3)}, metadata={"wmengine": text}))
    with pytest.raises(WatermarkError, match=r"a\.wm (is damaged|has format|holds a)"):
        Watermark.load(path)


def test_a_float_in_the_metadata_has_no_one_spelling(tmp_path: Path) -> None:
    marks()[0].save(tmp_path / "a.wm")
    data = (tmp_path / "a.wm").read_bytes()
    for old, new in ((b'\\"version\\":1', b'\\"version\\":1.0'), (b'\\"bits\\":64', b'\\"bits\\":064')):
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip().replace(old, new)
        assert header != data[8 : 8 + length].rstrip()
        header += b" " * (-len(header) % 8)
        changed = len(header).to_bytes(8, "little") + header + data[8 + length :]
        with pytest.raises(WatermarkError, match=r"b\.wm is damaged"):
            Watermark.load(private(tmp_path / "b.wm", changed))


@pytest.fixture(scope="module")
def files(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    saved = []
    for mark in marks():
        mark.save(folder / "whole.wm", overwrite=True)
        saved.append(((folder / "whole.wm").read_bytes(), content(mark)))
    return saved


def load_or_complaint(path: Path, data: bytes) -> Watermark | str:
    try:
        return Watermark.load(private(path, data))
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
    cut = whole[:start] + whole[stop:]
    longer = whole[:stop] + data.draw(st.binary(min_size=1, max_size=9)) + whole[stop:]
    for changed in (cut, longer):
        with pytest.raises(WatermarkError, match=r"changed\.wm "):
            Watermark.load(private(folder / "changed.wm", changed))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_watermark(folder: Path, data: bytes) -> None:
    with pytest.raises(WatermarkError, match=r"random\.wm is not a watermark file"):
        Watermark.load(private(folder / "random.wm", data))


def test_marks_are_loaded_without_torch_or_cryptography(tmp_path: Path) -> None:
    marks()[0].save(tmp_path / "a.wm")
    code = (
        "import sys; from wmengine.marks.watermark import Watermark; Watermark.load(sys.argv[1]); "
        "print([name for name in ('torch', 'cryptography', 'onnxruntime', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.wm")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_marks_of_one_model_hold_what_they_share_once(tmp_path):
    """A registry of a thousand customers is as large in memory as one of their marks."""
    first = Watermark.create(KEY, ADI, ADI_PARAMETERS, message="copy 0")
    first.save(tmp_path / "0.wm")
    first.with_message(KEY, "copy 1").save(tmp_path / "1.wm")
    loaded = [Watermark.load(tmp_path / f"{number}.wm") for number in range(2)]
    assert loaded[0].arrays["triggers"] is loaded[1].arrays["triggers"]
    assert not np.array_equal(loaded[0].arrays["labels"], loaded[1].arrays["labels"])
    with pytest.raises(ValueError, match="read-only"):
        loaded[0].arrays["triggers"][0] = 0
    assert first.with_message(KEY, "copy 2").arrays["triggers"] is first.arrays["triggers"]


BOMB = b"[]," * 3_000_000 + b"[]"


@pytest.mark.parametrize(
    ("load", "content"),
    [
        (Watermark.load, lambda: _with_header(b'{"a":[' + BOMB + b"]}")),
        (Watermark.load, lambda: b'{"kind":"sealed","a":[' + BOMB + b"]}"),
        (Key.load, lambda: b'{"format":"wmengine/1","kind":"key","a":[' + BOMB + b"]}"),
    ],
    ids=["a header", "an envelope", "a key"],
)
def test_a_file_whose_values_would_fill_the_memory_is_refused_before_they_are_read(tmp_path, load, content):
    """Empty lists take thirty times as many bytes in memory as in a file."""
    path = tmp_path / "bomb"
    path.touch(0o600)
    path.write_bytes(content())
    tracemalloc.start()
    try:
        with pytest.raises(WmengineError, match=r"is not a|is larger than 64 KiB"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size
    finally:
        tracemalloc.stop()


def _with_header(header):
    return len(header).to_bytes(8, "little") + header
