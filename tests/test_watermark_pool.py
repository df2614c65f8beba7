"""Material that is too large for a mark's file lies in one beside it, which is checked as the mark is."""

import os
import shutil
import stat
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from example_marks import KEY, content
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from wmengine.errors import WatermarkError
from wmengine.identity import sealing
from wmengine.marks import pools
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
    monkeypatch.setattr(pools, "MOST_INSIDE", 90 * 64)


def pool_in(folder: Path) -> Path:
    (found,) = folder.glob("*.pool")
    return found


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_large_material_lies_beside_its_mark_and_comes_back(tmp_path: Path, passphrase: str | None) -> None:
    mark().save(tmp_path / "a.wm", passphrase)
    assert sorted(os.listdir(tmp_path)) == sorted([pool_in(tmp_path).name, "a.wm"])
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    (tmp_path / "a.wm").rename(tmp_path / "renamed.wm")
    assert content(Watermark.load(tmp_path / "renamed.wm", passphrase)) == content(mark())
    assert [each.commitment for each in load_watermarks([tmp_path], passphrase)] == [mark().commitment]
    held = pool_in(tmp_path).read_bytes()
    assert sealing.is_sealed(held) == (passphrase is not None)
    if passphrase is None:
        material = set(mark().parameters["material"])
        assert set(load_arrays(held)) == material
        assert set(load_arrays((tmp_path / "renamed.wm").read_bytes())) == set(mark().arrays) - material


def test_marks_of_one_pool_share_its_file_and_one_that_is_sealed_has_its_own_whatever_the_passphrase(
    tmp_path: Path,
) -> None:
    other = mark().with_message(KEY, "customer-7")
    for name, each, passphrase in (("a", mark(), None), ("b", other, None), ("c", mark(), "one"), ("d", mark(), "two")):
        each.save(tmp_path / f"{name}.wm", passphrase)
    assert len([*tmp_path.glob("*.pool")]) == 2
    for name, each, passphrase in (("a", mark(), None), ("b", other, None), ("c", mark(), "one"), ("d", mark(), "two")):
        assert content(Watermark.load(tmp_path / f"{name}.wm", passphrase)) == content(each)


def test_as_much_as_a_mark_has_room_for_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(mark().arrays[name].nbytes for name in mark().parameters["material"])
    monkeypatch.setattr(pools, "MOST_INSIDE", size)
    mark().save(tmp_path / "mark")
    assert os.listdir(tmp_path) == ["mark"]
    monkeypatch.setattr(pools, "MOST_INSIDE", size - 1)
    mark().save(tmp_path / "another")
    assert len(os.listdir(tmp_path)) == 3
    assert content(Watermark.load(tmp_path / "mark")) == content(Watermark.load(tmp_path / "another"))


def test_a_mark_without_its_pool_names_what_is_missing_and_a_link_finds_it(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "link.wm").symlink_to(tmp_path / "a.wm")
    assert content(Watermark.load(tmp_path / "away" / "link.wm")) == content(mark())
    shutil.copy(tmp_path / "a.wm", tmp_path / "away" / "b.wm")
    with pytest.raises(WatermarkError, match=rf"^\S+b\.wm needs {pool_in(tmp_path).name} beside it, .* a backup$"):
        Watermark.load(tmp_path / "away" / "b.wm")


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_no_byte_of_a_pool_changes_unseen(tmp_path: Path, passphrase: str | None) -> None:
    mark().save(tmp_path / "a.wm", passphrase)
    pool, said = (
        pool_in(tmp_path),
        r"a\.wm cannot be used" if passphrase is None else r"\.pool is damaged|cannot be used",
    )
    whole = pool.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 60 if passphrase is None else 6):
        pool.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(WatermarkError, match=said):
            Watermark.load(tmp_path / "a.wm", passphrase)
    pool.write_bytes(whole[:-1])
    with pytest.raises(WatermarkError, match=said):
        Watermark.load(tmp_path / "a.wm", passphrase)


def test_another_pool_and_more_than_a_pool_are_refused(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    pool = pool_in(tmp_path)
    held = load_arrays(pool.read_bytes())
    mark(1).save(tmp_path / "b.wm")
    (other,) = set(tmp_path.glob("*.pool")) - {pool}
    other.replace(pool)
    with pytest.raises(WatermarkError, match="does not match its digest"):
        Watermark.load(tmp_path / "a.wm")
    for arrays in ({**held, "more": np.zeros(1)}, {"samples": held["samples"]}, {**held, "labels": np.zeros(20)}):
        pool.write_bytes(save_arrays(arrays))
        with pytest.raises(WatermarkError, match=r"its arrays must be|must be int64|must be uint8"):
            Watermark.load(tmp_path / "a.wm")


def test_a_mark_that_cannot_be_written_leaves_the_one_that_is_there_whole_and_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark().save(tmp_path / "a.wm")
    with pytest.raises(WatermarkError, match=r"a\.wm exists already and is not overwritten"):
        mark(1).save(tmp_path / "a.wm")
    assert len(os.listdir(tmp_path)) == 2

    def full(file: int) -> None:
        if len([*tmp_path.glob("*.pool")]) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WatermarkError, match="No space left"):
        mark(1).save(tmp_path / "a.wm", overwrite=True)
    monkeypatch.undo()
    monkeypatch.setattr(pools, "MOST_INSIDE", 90 * 64)
    assert content(Watermark.load(tmp_path / "a.wm")) == content(mark())
    mark(1).save(tmp_path / "b.wm")
    mark(1).save(tmp_path / "a.wm", overwrite=True)
    assert content(Watermark.load(tmp_path / "a.wm")) == content(Watermark.load(tmp_path / "b.wm")) == content(mark(1))


def test_a_pool_is_a_file_of_the_owner_alone(tmp_path: Path) -> None:
    mark().save(tmp_path / "a.wm")
    pool = pool_in(tmp_path)
    pool.chmod(0o644)
    with pytest.raises(WatermarkError, match=r"^\S+\.pool can be read by other users; .* chmod 600 \S+\.pool$"):
        Watermark.load(tmp_path / "a.wm")
    pool.unlink()
    os.mkfifo(pool)
    with pytest.raises(WatermarkError, match=r"^\S+\.pool is not a file; give the path of a watermark's pool$"):
        Watermark.load(tmp_path / "a.wm")


def test_a_mark_without_material_has_none_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MOST_INSIDE", 0)
    preset = scheme("adi", count=5)
    task = Task({"x": InputSpec((1, 8, 8), "float32")}, 10, [(0.0, 1.0)])
    Watermark.create(KEY, preset, preset.describe(task, "model")).save(tmp_path / "a.wm")
    assert os.listdir(tmp_path) == ["a.wm"]
