"""What `wmengine attack` and `wmengine attacks` promise: one line or one JSON value, and a file where all went well."""

import json
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import wmengine as wm
from wmengine.cli import main

MODELS = """
import torch

def detector():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

def nothing():
    return None

def broken():
    raise RuntimeError("no weights here")
"""


def classifier():
    arrays = {"a": np.arange(128).reshape(16, 8), "b": np.arange(24).reshape(8, 3)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["i"]),
            helper.make_node("MatMul", ["i", "b"], ["y"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a model, data of the thief's, and a module of functions that make models."""
    onnx.save(classifier(), tmp_path / "model.onnx")
    rows = np.random.default_rng(0).normal(size=(20, 16))
    np.savez(tmp_path / "flat.npz", inputs=rows)
    np.savez(tmp_path / "named.npz", x=rows, labels=np.zeros(20, np.int64))
    np.savez(tmp_path / "images.npz", inputs=rows.reshape(20, 1, 4, 4), labels=np.zeros(20, np.int64))
    np.savez(tmp_path / "empty.npz", labels=np.zeros(20, np.int64))
    np.savez(tmp_path / "soft.npz", inputs=rows.reshape(20, 1, 4, 4), labels=np.full((20, 3), 1 / 3))
    np.savez(tmp_path / "far.npz", inputs=rows.reshape(20, 1, 4, 4), labels=np.full(20, 7))
    np.savez(tmp_path / "words.npz", inputs=np.array(["a", "b"]))
    np.savez(tmp_path / "one.npz", inputs=np.float32(3))
    np.savez(tmp_path / "nan.npz", inputs=np.full((20, 16), np.nan))
    (tmp_path / "shop.py").write_text(MODELS)
    (tmp_path / "there.onnx").write_bytes(b"precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("shop", None)


@pytest.fixture
def run(folder, capfd):
    """Run a command in the folder: (status, what it printed, what it complained of)."""

    def call(*arguments):
        status = main(arguments)
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return call


def zeros(path):
    return sum(int((numpy_helper.to_array(tensor) == 0).sum()) for tensor in onnx.load(path).graph.initializer)


def test_an_attacked_file_is_written_and_one_line_says_what_was_done(run, folder):
    status, out, err = run("attack", "prune", "model.onnx", "--out", "p.onnx", "--option", "share=0.25")
    assert (status, out, err) == (0, "p.onnx, prune, share=0.25, per_layer=false\n", "")
    assert zeros(folder / "p.onnx") == 38


def test_json_is_one_object_with_all_options(run, folder):
    options = ("--option", "kind=qoperator", "--option", "calibration=16", "--seed", "3")
    status, out, err = run("attack", "int8", "model.onnx", "--out", "q.onnx", "--data", "flat.npz", *options, "--json")
    assert (status, err) == (0, "")
    chosen = {"kind": "qoperator", "calibration": 16}
    assert json.loads(out) == {"out": "q.onnx", "attack": "int8", "options": chosen, "seed": 3}
    assert "QLinearMatMul" in {node.op_type for node in onnx.load(folder / "q.onnx").graph.node}
    assert run("attack", "int8", "model.onnx", "--out", "r.onnx", "--data", "named.npz")[0] == 0


def test_the_seed_is_of_everything_random(run, folder):
    for out, seed in (("a.onnx", "1"), ("b.onnx", "1"), ("c.onnx", "2")):
        assert run("attack", "noise", "model.onnx", "--out", out, "--seed", seed)[0] == 0
    first, again, other = ((folder / f"{name}.onnx").read_bytes() for name in "abc")
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["prune", "rescale", "rename"])
def test_the_module_that_a_function_returns_becomes_an_onnx_file(run, folder, attack):
    status, out, err = run("attack", attack, "shop:detector", "--out", "d.onnx", "--data", "images.npz")
    assert (status, err) == (0, "")
    assert out.startswith(f"d.onnx, {attack}")
    assert onnx.load(folder / "d.onnx").graph.output[0].type.tensor_type.shape.dim[1].dim_value == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prunes", "model.onnx", "--out", "p.onnx"), "there is no attack 'prunes'; the attacks are ftll, "),
        (
            ("prune", "model.onnx", "--out", "p.onnx", "--option", "ratio=1"),
            "'prune' has no option 'ratio'; it has share",
        ),
        (
            ("prune", "model.onnx", "--out", "p.onnx", "--option", "share"),
            "--option share has no value: write NAME=VALUE",
        ),
        (("prune", "model.onnx", "--out", "p.onnx", "--option", "share=all"), "share must be a number, and"),
        (("prune", "model.onnx", "--out", "p.onnx", "--option", "per_layer=False"), "per_layer must be true or false"),
        (("rescale", "model.onnx", "--out", "p.onnx", "--option", "low=little"), "low must be a number"),
        (("prune", "model.onnx", "--out", "there.onnx"), "there.onnx is there already"),
        (("prune", "model.onnx", "--out", "p.safetensors"), "p.safetensors must end in .onnx"),
        (("prune", "nothing.onnx", "--out", "p.onnx"), "nothing.onnx does not exist"),
        (("prune", "model.onnx"), "Missing option '--out': see wmengine attack --help"),
        (("int8", "model.onnx", "--out", "p.onnx"), "the attack 'int8' needs data=inputs"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "model.onnx"), "model.onnx must be an .npz file with an"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "empty.npz"), "an array `inputs`, and it has none"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "nothing.npz"), "nothing.npz"),
        (("prune", "shop:detector", "--out", "p.onnx"), "a torch module is exported: give data=inputs"),
        (
            ("prune", "shop:nothing", "--out", "p.onnx"),
            "shop:nothing returned NoneType, and must return a torch module",
        ),
        (("prune", "shop:missing", "--out", "p.onnx"), "shop:missing must be package.module:function, a function that"),
        (("prune", "market:detector", "--out", "p.onnx"), "that makes the model (ModuleNotFoundError: No module named"),
        (("prune", "shop:broken", "--out", "p.onnx"), "(RuntimeError: no weights here)"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "words.npz"), "data's input must hold rows of numbers"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "one.npz"), "inputs is one value alone"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "nan.npz"), "data's input holds NaN or Inf"),
        (("int8", "model.onnx", "--out", "p.onnx", "--data", "images.npz"), "takes x [n, 16], and a row of data is"),
        (("prune", "shop:detector", "--out", "p.onnx", "--data", "named.npz"), "the model does not run on a row of"),
        (("ftal", "model.onnx", "--out", "p.onnx", "--data", "images.npz"), "on the command line package.module:func"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(run, folder, arguments, said):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    status, out, err = run("attack", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert json.loads(run("attack", *arguments, "--json")[1])["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "said"), [("soft", "labels must be one class number for"), ("far", "and one is 7")])
def test_labels_that_are_no_classes_are_one_line_too(run, data, said):
    status, out, err = run("attack", "ftal", "shop:detector", "--out", "p.onnx", "--data", f"{data}.npz")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.slow
def test_a_student_is_named_as_the_model_is(run, folder):
    options = ("--data", "images.npz", "--option", "epochs=1", "--option", "student=shop:detector")
    status, out, err = run("attack", "distil", "shop:detector", "--out", "p.onnx", *options)
    assert (status, err) == (0, "")
    assert 'student="shop:detector"' in out
    assert (folder / "p.onnx").exists()


def test_a_file_that_is_there_is_overwritten_if_forced(run, folder):
    assert run("attack", "prune", "model.onnx", "--out", "there.onnx", "--force")[0] == 0
    assert len(onnx.load(folder / "there.onnx").graph.initializer) == 2
    assert "model.onnx is the model itself" in run("attack", "prune", "model.onnx", "--out", "model.onnx", "--force")[2]


def test_the_list_of_attacks_is_one_json_list(run):
    status, out, err = run("attacks", "--json")
    listed = json.loads(out)
    assert (status, err, [each["name"] for each in listed]) == (0, "", list(wm.attacks.ATTACKS))
    for each in listed:
        assert list(each) == ["name", "family", "takes", "needs", "options", "promise", "paper"]
        assert set(each["needs"]) <= {"module", "inputs", "labels"}
        assert ("module" in each["needs"]) == (each["takes"] == "module")
        assert each["options"] == dict(wm.attacks.ATTACKS[each["name"]].defaults)
    needs = {each["name"]: each["needs"] for each in listed}
    assert (needs["prune"], needs["int8"]) == ([], ["inputs"])


def test_the_table_of_attacks_has_a_line_for_each(run):
    status, out, err = run("attacks")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["attack", *wm.attacks.ATTACKS]


def test_the_help_shows_both_commands(run):
    shown = run("--help")[1]
    assert "  attack  " in shown
    assert "  attacks " in shown
