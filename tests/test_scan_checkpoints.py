"""What a scan promises of checkpoints: where marks lie in weights they are suspects, read as `verify` reads them."""

import json
import math
import os

import numpy as np
import pytest
import torch
from judged import white_box
from safetensors.torch import save_file
from scan_models import by_pair, copy_of, mark

import wmengine as wm
from wmengine import ops
from wmengine.scanning.listing import list_suspects
from wmengine.scanning.scanner import scan

SHAPE = (64, 32, 3, 3)


@pytest.fixture(scope="module")
def weights_mark():
    return white_box([SHAPE], name="weights", shape=(3, 8, 8))


@pytest.fixture(scope="module")
def stolen(weights_mark):
    """The state dict of a network that holds the mark in one of two weights of the carrier's shape."""
    signs = (2.0 * weights_mark.arrays["bits"] - 1.0).astype(np.float32)
    held = ops.sketch_adjoint(signs, int(weights_mark.arrays["carrier_keys"][0]), math.prod(SHAPE)).reshape(SHAPE)
    state = stranger(0)
    state["one"] += torch.from_numpy(np.array(held / held.std()))
    return state


def stranger(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=generator) for name in ("zero", "one")}


def listed(*paths):
    found = list_suspects(paths, checkpoints=True)
    return [sorted(map(os.path.basename, each.names)) for each in found.suspects], found.empty, found.others


@pytest.fixture
def folder(tmp_path, stolen):
    """A checkpoint of every kind, and what lies about beside them."""
    models = tmp_path / "models"
    (models / "deep").mkdir(parents=True)
    save_file(stolen, models / "stolen.safetensors")
    torch.save(stranger(1), models / "stranger.pt")
    torch.save({"model": stolen}, models / "deep" / "stolen.BIN")
    copy_of(mark(), models / "model.onnx")
    (models / "stranger.ckpt").write_bytes((models / "stranger.pt").read_bytes())
    (models / "broken.gguf").write_bytes(b"GGUF and nothing of it")
    (models / "external.bin").write_bytes(b"numbers of an ONNX file")
    (models / "notes.txt").write_text("no suspect")
    (models / "empty.pth").touch()
    return models


def test_checkpoints_stand_in_the_table_of_every_mark(folder, weights_mark):
    """Marks in answers say of them what they say of a model of another task."""
    table = scan(folder, [weights_mark, mark()])
    rows = by_pair(table)
    assert {name: row["decision"] for (name, of), row in rows.items() if of == "weights"} == {
        "broken.gguf": "error",
        "model.onnx": "not_proven",
        "stolen.BIN": "owned",
        "stolen.safetensors": "owned",
        "stranger.ckpt": "not_proven",
        "stranger.pt": "not_proven",
    }
    answers = {name: row for (name, of), row in rows.items() if of == "detector"}
    assert answers.pop("model.onnx")["decision"] == "owned"
    assert answers.pop("broken.gguf")["decision"] == "error"
    for row in answers.values():
        assert (row["decision"], row["error"], row["queries"]) == ("other_task", None, 0)
        assert "this file holds weights and no network that could answer" in row["notes"][-1]
    assert {row["tests"] for row in rows.values()} == {12}
    assert table.schema.metadata == {b"empty files left out": b"1", b"other files left out": b"2"}
    assert rows["stranger.pt", "weights"]["notes"][0].startswith("the same bytes as ")


def test_a_row_of_a_checkpoint_is_what_verify_says(folder, weights_mark):
    rows = by_pair(scan(folder, [weights_mark, mark()]))
    for name in ("stolen.safetensors", "stranger.ckpt"):
        row, verdict = rows[name, "weights"], wm.verify(folder / name, weights_mark)
        for same in ("sha256", "matched", "total", "log10_p"):
            assert row[same] == getattr(verdict, same)
        assert row["log10_p_corrected"] == min(0.0, row["log10_p"] + math.log10(12))
        (orders,) = (note for note in row["notes"] if "2 of the 2 possible orders" in note)
        assert orders in verdict.notes


def test_without_a_mark_in_weights_folders_hold_no_checkpoints(folder):
    (row,) = scan(folder, mark()).to_pylist()
    assert os.path.basename(row["suspect"]) == "model.onnx"
    (named,) = scan(folder / "stolen.safetensors", mark()).to_pylist()  # by the caller
    assert named["decision"] == "other_task"


def test_names_of_one_checkpoint_count_once_and_other_forms_of_it_do_not(folder):
    """What is called .onnx is read as a model, whatever it begins as."""
    found, empty, others = listed(folder)
    for number in range(3):
        (folder / f"link{number}.pth").symlink_to("stolen.safetensors")
        (folder / "deep" / f"{number}.safetensors").hardlink_to(folder / "stolen.safetensors")
    (folder / "stolen.onnx").hardlink_to(folder / "stolen.safetensors")
    names = [*(f"{number}.safetensors" for number in range(3)), *(f"link{number}.pth" for number in range(3))]
    more = [[*names, "stolen.safetensors"] if same == ["stolen.safetensors"] else same for same in found]
    again = listed(folder)
    assert sorted(again[0]) == sorted([*more, ["stolen.onnx"]])
    assert again[1:] == (empty, others) == (1, 2)


def test_a_model_of_the_same_bytes_does_not_speak_for_a_checkpoint(folder, weights_mark):
    (folder / "a.onnx").write_bytes((folder / "stolen.safetensors").read_bytes())
    for jobs in (1, 2):
        rows = by_pair(scan(folder, weights_mark, jobs=jobs))
        decisions = [rows[name, "weights"]["decision"] for name in ("a.onnx", "stolen.safetensors")]
        assert decisions == ["error", "owned"]
        assert rows["a.onnx", "weights"]["sha256"] == rows["stolen.safetensors", "weights"]["sha256"]


def test_a_name_that_is_led_elsewhere_speaks_for_no_other(folder, weights_mark, tmp_path):
    save_file(stranger(2), folder / "0.safetensors")
    save_file(stranger(3), tmp_path / "clean.safetensors")
    for name in ("a.safetensors", "m.safetensors"):
        (folder / name).hardlink_to(tmp_path / "clean.safetensors")
    given = {"watermarks": weights_mark, "jobs": 1, "out": tmp_path / "rows.parquet"}

    def lead_elsewhere(done, total, rows):
        (folder / "a.safetensors").unlink()
        (folder / "a.safetensors").hardlink_to(folder / "stolen.safetensors")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(folder, **given, progress=lead_elsewhere)
    rows = by_pair(scan(folder, **given))
    assert "is another file than the one that was listed" in rows["m.safetensors", "weights"]["error"]
    assert rows["stolen.safetensors", "weights"]["decision"] == "owned"


def test_an_index_speaks_for_the_files_beside_it(tmp_path, stolen, weights_mark):
    """Links to one index are as many suspects as there are folders."""
    index = json.dumps({"weight_map": {"one": "w.safetensors"}})
    for name, state in (("a", stranger(4)), ("b", stolen)):
        (tmp_path / name).mkdir()
        save_file({"one": state["one"]}, tmp_path / name / "w.safetensors")
    (tmp_path / "a" / "m.index.json").write_text(index)
    (tmp_path / "b" / "m.index.json").hardlink_to(tmp_path / "a" / "m.index.json")
    rows = scan(tmp_path, weights_mark).to_pylist()
    decisions = {row["suspect"].removeprefix(f"{tmp_path}/"): row["decision"] for row in rows}
    assert decisions == {
        "a/m.index.json": "not_proven",
        "a/w.safetensors": "not_proven",
        "b/m.index.json": "owned",
        "b/w.safetensors": "owned",
    }
    (tmp_path / "b" / "w.safetensors").unlink()
    (tmp_path / "b" / "w.safetensors").symlink_to(tmp_path / "a" / "w.safetensors")
    rows = by_pair(scan(tmp_path / "b" / "m.index.json", weights_mark))
    assert "must be a regular file and no link" in rows["m.index.json", "weights"]["error"]


def test_a_strangers_checkpoint_of_holes_is_refused(tmp_path, weights_mark):
    """It costs its sender nothing, and would take minutes."""
    size = 1 << 30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (row,) = scan(tmp_path, weights_mark).to_pylist()
    assert row["decision"] == "error"
    assert "holds no data in" in row["error"]


def test_a_scan_of_checkpoints_is_resumed(folder, weights_mark, tmp_path):
    given = {"watermarks": [weights_mark, mark()], "jobs": 1, "out": tmp_path / "rows.parquet"}

    def stop(done, total, rows):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(folder, **given, progress=stop)
    told = []
    rows = by_pair(scan(folder, **given, progress=lambda done, total, rows: told.append(done)))
    assert told == [5, 6]
    whole = by_pair(scan(folder, [weights_mark, mark()]))
    assert {pair: row["decision"] for pair, row in rows.items()} == {
        pair: row["decision"] for pair, row in whole.items()
    }
