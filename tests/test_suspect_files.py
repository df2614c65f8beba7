"""No file makes us read what it must not, and what is read is hashed."""

import hashlib
import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from suspect_graphs import (
    CLASSES,
    FLOAT,
    SCORES,
    WEIGHT,
    ask,
    classifier,
    complaint,
    external,
    graph,
    save,
    weight,
    with_external,
)

from wmengine.suspects import OnnxSuspect, open_suspect
from wmengine.suspects.graph_limits import REFUSED, check_operators


def broken_files(directory):
    whole = classifier().SerializeToString()
    contents = {
        "empty.onnx": b"",
        "garbage.onnx": bytes(range(256)) * 8,
        "text.onnx": b"not a model, and location is only a word in it\n" * 20,
        "truncated.onnx": whole[: len(whole) // 2],
        "cut.onnx": whole[:-1],
        "no graph.onnx": onnx.ModelProto(ir_version=9).SerializeToString(),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "folder.onnx").mkdir()
    os.mkfifo(directory / "pipe.onnx")
    return sorted(path for path in directory.iterdir())


def test_what_is_not_a_model_is_refused_for_either_kind_of_mark(tmp_path):
    paths = broken_files(tmp_path)
    assert len(paths) == 8
    for path in paths:
        for method in (lambda suspect: ask(suspect), lambda suspect: suspect.tensors()):
            words = complaint(lambda path, method: method(open_suspect(path)), path, method)
            assert str(path) in words
            assert len(words) < 400


def test_onnx_runtimes_own_format_is_called_by_its_name(tmp_path):
    (tmp_path / "m.ort").write_bytes(b"\x18\0\0\0ORTM" + bytes(64))
    assert "is in ONNX Runtime's own format" in complaint(open_suspect, tmp_path / "m.ort")


def test_an_operator_that_nobody_runs_does_not_keep_weights_from_being_read(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Run", ["s"], ["y"], domain="theirs")]
    suspect = open_suspect(save(graph(nodes, [weight()]), tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    assert "uses the operator 'Run' of domain 'theirs'" in complaint(ask, suspect)


def test_what_onnx_runtime_registers_as_its_own_may_run_and_what_runs_whole_graphs_may_not():
    check_operators("m", [("com.microsoft", name) for name in ("CDist", "GatherBlockQuantized", "MatMulBnb4", "QMoE")])
    for name in (*REFUSED, "PyOp"):
        assert name in complaint(check_operators, "m", [("com.microsoft", name)])


def test_weights_are_read_whatever_type_an_output_has(tmp_path):
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, None))
    outputs = [helper.make_value_info("p", helper.make_sequence_type_proto(maps))]
    zipped = helper.make_node("ZipMap", ["y"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[*range(CLASSES)])
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"]), zipped], [weight()], outputs)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    suspect = open_suspect(save(model, tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)


def test_a_path_that_does_not_exist_is_the_callers_mistake(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx does not exist"):
        open_suspect(tmp_path / "gone.onnx")
    with pytest.raises(TypeError, match="a suspect is a path"):
        open_suspect(3)


def test_the_hash_of_a_single_file_is_its_sha256(tmp_path):
    path = save(classifier(), tmp_path / "m.onnx")
    assert open_suspect(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_beside_the_model_are_read_hashed_and_used(tmp_path):
    (tmp_path / "sub").mkdir()
    data = np.zeros(8, np.uint8).tobytes() + WEIGHT.tobytes()
    hashes = set()
    for location in ("w.bin", "./w.bin", "sub/w.bin"):
        (tmp_path / location).write_bytes(data)
        path = save(with_external(location, offset=8, length=WEIGHT.nbytes), tmp_path / "m.onnx")
        suspect = open_suspect(path)
        np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
        (read,) = suspect.tensors()
        assert np.array_equal(read.values, WEIGHT.T)
        hashes.add(suspect.sha256)
    (tmp_path / "sub" / "w.bin").write_bytes(data[::-1])
    hashes.add(open_suspect(path).sha256)
    assert len(hashes) == 4


def test_weights_in_constants_may_be_external_too(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    nodes = [
        helper.make_node("Constant", [], ["w"], value=external("w.bin")),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    suspect = open_suspect(save(graph(nodes, []), tmp_path / "m.onnx"))
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)


def test_weights_anywhere_else_are_never_read(tmp_path, monkeypatch):
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    secret = outside / "secret.bin"
    secret.write_bytes(WEIGHT.tobytes())
    (home / "symbolic.bin").symlink_to(secret)
    (home / "hard.bin").hardlink_to(secret)
    (home / "linked").symlink_to(outside)
    (home / "folder").mkdir()
    os.mkfifo(home / "pipe.bin")
    monkeypatch.chdir(outside)  # where ONNX Runtime itself would look
    locations = [str(secret), "../outside/secret.bin", "linked/secret.bin", "folder/../../outside/secret.bin"]
    locations += [
        "symbolic.bin",
        "hard.bin",
        "pipe.bin",
        "folder",
        "secret.bin",
        "",
        ".",
        "*/_ORT_MEM_ADDR_/*",
        "hard.bin/x",
    ]
    for location in locations:
        path = save(with_external(location), home / "m.onnx")
        words = complaint(open_suspect, path)
        assert str(home) in words, location


def test_weights_in_a_cache_of_hugging_faces_are_read_from_its_blobs_and_nowhere_else(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    weights, model = "a" * 64, "b" * 40
    (blobs / weights).write_bytes(WEIGHT.tobytes())
    save(with_external("m.onnx_data"), blobs / model)
    (snapshot / "m.onnx").symlink_to(f"../../../blobs/{model}")
    data = snapshot / "m.onnx_data"
    data.symlink_to(f"../../../blobs/{weights}")
    np.testing.assert_allclose(ask(open_suspect(snapshot / "m.onnx")), SCORES, rtol=1e-5, atol=1e-6)
    (tmp_path / weights).write_bytes(WEIGHT.tobytes())
    (blobs / "short").write_bytes(WEIGHT.tobytes())
    (blobs / ("c" * 64)).symlink_to(tmp_path / weights)
    for elsewhere in (f"../../../../{weights}", "../../../blobs/short", f"../../../blobs/{'c' * 64}", blobs / weights):
        data.unlink()
        data.symlink_to(elsewhere)
        assert "must be a regular file and no link" in complaint(open_suspect, snapshot / "m.onnx"), elsewhere


def test_weights_in_a_subgraph_cannot_reach_a_file_either(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    monkeypatch.chdir(tmp_path)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["x", "v"], ["o"])],
            name,
            [],
            [helper.make_tensor_value_info("o", FLOAT, None)],
            [external("w.bin", name="v")],
        )
        for name in ("then", "else")
    }
    model = graph([helper.make_node("If", ["c"], ["y"], **branches)], [weight("c", np.array(True))])
    (tmp_path / "sub").mkdir()
    assert "missing" in complaint(open_suspect, save(model, tmp_path / "sub" / "m.onnx"))
    suspect = open_suspect(save(model, tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    assert "ONNX Runtime" in complaint(ask, suspect)  # which takes no external data in subgraphs


def test_weights_that_end_too_early_are_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-4])
    for entries in ({}, {"length": WEIGHT.nbytes}, {"offset": -4}, {"offset": 10**30}, {"offset": "many"}):
        suspect = open_suspect(save(with_external("w.bin", **entries), tmp_path / "m.onnx"))
        for call in (ask, lambda suspect: [each.read() for each in suspect.tensors()]):
            assert "m.onnx" in complaint(call, suspect)


def test_a_model_and_its_weights_together_have_a_size_limit(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = save(with_external("w.bin"), tmp_path / "m.onnx")
    size = path.stat().st_size + WEIGHT.nbytes
    assert OnnxSuspect(path, maximum_bytes=size).tensors()
    assert "'w.bin' beside" in complaint(lambda: OnnxSuspect(path, maximum_bytes=size - 1))
    assert "m.onnx is larger" in complaint(lambda: OnnxSuspect(path, maximum_bytes=10))


def test_a_location_that_is_no_utf8_is_refused(tmp_path):
    """Protobuf hands it over as bytes."""
    content = with_external("w.bin").SerializeToString().replace(b"w.bin", b"w\xff\xfein")
    (tmp_path / "m.onnx").write_bytes(content)
    assert "UTF-8" in complaint(open_suspect, tmp_path / "m.onnx")


def test_a_directory_that_may_not_be_opened_is_the_suspects_fault(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECTORY and "dir_fd" not in named:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest, **named)

    path = save(with_external("w.bin"), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in complaint(open_suspect, path)
