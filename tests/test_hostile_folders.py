"""A sender may change the folder of his model while it is read, and make files that are large for nothing."""

import os
import resource

import pytest
from hostile_models import SECRET

from wmengine import emmark
from wmengine.errors import SuspectError
from wmengine.suspects import model_file
from wmengine.suspects.model_file import MAXIMUM_BYTES, LocalSource, read_model


@pytest.mark.parametrize("depth", ["", "sub/"])
def test_a_folder_that_becomes_a_link_gives_no_file_of_anybody_elses(tmp_path, depth):
    """Between the model, which names its weights, and these."""
    for name, content in (("upload", b"weights"), ("private", SECRET)):
        (tmp_path / name / depth).mkdir(parents=True)
        (tmp_path / name / depth / "w.bin").write_bytes(content)
    (tmp_path / "upload" / "m.onnx").write_bytes(b"a model")

    def exchange(name, data):
        (tmp_path / "upload").rename(tmp_path / "away")
        (tmp_path / "upload").symlink_to("private")
        return [f"{depth}w.bin"]

    found = read_model(LocalSource(tmp_path / "upload" / "m.onnx"), exchange)
    assert found.external == {f"{depth}w.bin": b"weights"}


def test_a_model_whose_reading_failed_leaves_no_descriptor(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"a model")
    before = os.listdir("/proc/self/fd")
    for location in ("nowhere.bin", "no/where.bin", "."):
        with pytest.raises(SuspectError):
            read_model(LocalSource(tmp_path / "m.onnx"), lambda name, data, location=location: [location])
    assert os.listdir("/proc/self/fd") == before


def test_a_folder_with_a_slash_behind_it_is_a_folder(tmp_path):
    with pytest.raises(SuspectError, match="is a directory"):
        LocalSource(f"{tmp_path}/").read(1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LocalSource(tmp_path / "nowhere" / "m.onnx").read(1)


@pytest.mark.parametrize("name", ["m.onnx", "w.bin"])
def test_a_file_of_holes_is_refused_before_it_is_read(tmp_path, name):
    """Four gigabytes that nobody has written and nobody has paid for."""
    (tmp_path / "m.onnx").write_bytes(b"a model")
    with open(tmp_path / name, "ab") as file:
        file.truncate(MAXIMUM_BYTES - 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SuspectError, match=r"holds no data in \d+ of its 4294967196 bytes; copy it again, whole"):
        read_model(LocalSource(tmp_path / "m.onnx"), lambda name, data: ["w.bin"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


def test_a_link_to_nowhere_is_not_written_through(tmp_path):
    (tmp_path / "out.onnx").symlink_to("victim")
    with pytest.raises(ValueError, match="exists already"):
        emmark("unread.onnx", "unread.key", name="detector", out=tmp_path / "out.onnx")
    assert not (tmp_path / "victim").exists()


def test_a_model_with_room_in_it_is_read(tmp_path, monkeypatch):
    """As a copy is that leaves out what is zero: of a few weights, or of less than half of the file."""
    most = 1 << 20
    monkeypatch.setattr(model_file, "HOLES", most)
    for size, written in ((most, 1), (3 * most, 2 * most)):
        with open(tmp_path / "m.onnx", "wb") as file:
            file.seek(size - written)
            file.write(b"\1" * written)
        assert len(LocalSource(tmp_path / "m.onnx").read(size)) == size
