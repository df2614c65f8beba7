"""Material that is too large for a mark's file lies in one beside it, which is checked as the mark is."""

import os
import stat
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from example_marks import KEY, content
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from wmengine.errors import WatermarkError
from wmengine.marks import watermark
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.scanning.listing import load_watermarks
from wmengine.suspects.base import InputSpec


@cache
def mark(number: int = 0) -> Watermark:
    """One with a pool of samples, 90 pictures of 64 bytes."""
    samples = np.random.default_rng(number).random((90, 1, 8, 8)).astype(np.float32)
    inputs = {"x": InputSpec((1, 8, 8), "float32")}
    task = Task(inputs, 10, [(0.0, 1.0)], samples={"x": samples}, sample_labels=np.arange(90) % 10)
    preset = scheme("zhang_noise", count=20)
    material = preset.gather(task)
    return Watermark.create(KEY, preset, preset.describe(task, "model", material), material=material)


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "_MOST_INSIDE", 90 * 64)


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_large_material_lies_beside_its_mark_and_comes_back(tmp_path: Path, passphrase: str | None) -> None:
    mark().save(tmp_path / "a.wm", passphrase)
    assert sorted(os.listdir(tmp_path)) == ["a.pool", "a.wm"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    assert content(Watermark.load(tmp_path / "a.wm", passphrase)) == content(mark())
    assert [each.commitment for each in load_watermarks([tmp_path], passphrase)] == [mark().commitment]
    if passphrase is None:
        material = set(mark().parameters["material"])
        assert set(load_arrays((tmp_path / "a.pool").read_bytes())) == material
        assert set(load_arrays((tmp_path / "a.wm").read_bytes())) == set(mark().arrays) - material
    else:
        with pytest.raises(WatermarkError, match=r"a\.wm does not open with this passphrase"):
            Watermark.load(tmp_path / "a.wm", "wrong")
        mark().save(tmp_path / "b.wm", "another")
        (tmp_path / "b.pool").replace(tmp_path / "a.pool")
        with pytest.raises(WatermarkError, match=r"a\.pool does not open with this passphrase"):
            Watermark.load(tmp_path / "a.wm", passphrase)


def test_as_much_as_a_mark_has_room_for_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(mark().arrays[name].nbytes for name in mark().parameters["material"])
    monkeypatch.setattr(watermark, "_MOST_INSIDE", size)
    mark().save(tmp_path / "mark")
    assert os.listdir(tmp_path) == ["mark"]
    monkeypatch.setattr(watermark, "_MOST_INSIDE", size - 1)
    mark().save(tmp_path / "another")
    assert sorted(os.listdir(tmp_path)) == ["another", "another.pool", "mark"]
    assert content(Watermark.load(tmp_path / "mark")) == content(Watermark.load(tmp_path / "another"))


def test_a_mark_without_its_pool_names_what_is_missing(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    (tmp_path / "a.wm").replace(tmp_path / "b.wm")
    with pytest.raises(
        WatermarkError, match=r"b\.wm needs \S+b\.pool beside it, which holds what it asks; put it back"
    ):
        Watermark.load(tmp_path / "b.wm")


def test_no_byte_of_a_pool_changes_unseen(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    whole, pool = (tmp_path / "a.pool").read_bytes(), tmp_path / "a.pool"
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        pool.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(WatermarkError, match=r"a\.wm cannot be used"):
            Watermark.load(tmp_path / "a.wm")
    pool.write_bytes(whole[:-1])
    with pytest.raises(WatermarkError, match=r"a\.wm cannot be used"):
        Watermark.load(tmp_path / "a.wm")


def test_another_pool_and_more_than_a_pool_are_refused(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    mark(1).save(tmp_path / "b.wm")
    held = load_arrays((tmp_path / "a.pool").read_bytes())
    (tmp_path / "b.pool").replace(tmp_path / "a.pool")
    with pytest.raises(WatermarkError, match="does not match its digest"):
        Watermark.load(tmp_path / "a.wm")
    for arrays in ({**held, "more": np.zeros(1)}, {"samples": held["samples"]}, {**held, "labels": np.zeros(20)}):
        (tmp_path / "a.pool").write_bytes(save_arrays(arrays))
        with pytest.raises(WatermarkError, match=r"its arrays must be|must be int64|must be uint8"):
            Watermark.load(tmp_path / "a.wm")


def test_neither_file_is_overwritten_unasked_and_a_pool_is_a_file_of_the_owner_alone(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    with pytest.raises(WatermarkError, match=r"a\.wm exists already and is not overwritten"):
        mark(1).save(tmp_path / "a.wm")
    (tmp_path / "a.wm").replace(tmp_path / "b.wm")
    with pytest.raises(WatermarkError, match=r"a\.pool exists already and is not overwritten"):
        mark(1).save(tmp_path / "a.wm")
    assert sorted(os.listdir(tmp_path)) == ["a.pool", "b.wm"]
    mark(1).save(tmp_path / "a.wm", overwrite=True)
    assert content(Watermark.load(tmp_path / "a.wm")) == content(mark(1))
    (tmp_path / "a.pool").chmod(0o644)
    with pytest.raises(WatermarkError, match=r"a\.pool can be read by other users; .* chmod 600"):
        Watermark.load(tmp_path / "a.wm")
    (tmp_path / "a.pool").unlink()
    os.mkfifo(tmp_path / "a.pool")
    with pytest.raises(WatermarkError, match=r"a\.pool is not a file"):
        Watermark.load(tmp_path / "a.wm")


def test_a_mark_without_material_has_none_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "_MOST_INSIDE", 0)
    plain = replace(mark(), arrays=dict(mark().arrays))
    assert plain.commitment == mark().commitment
    preset = scheme("adi", count=5)
    task = Task({"x": InputSpec((1, 8, 8), "float32")}, 10, [(0.0, 1.0)])
    Watermark.create(KEY, preset, preset.describe(task, "model")).save(tmp_path / "a.wm")
    assert os.listdir(tmp_path) == ["a.wm"]
