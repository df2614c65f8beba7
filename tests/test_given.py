"""What a file takes beside a mark's inputs, or takes them as: told from what it declares, or by whoever verifies."""

import json

import numpy as np
import onnx
import pytest
from judged import KEY, black_box, images
from onnx import TensorProto, helper, numpy_helper

from wmengine import Watermark, scheme, verify
from wmengine.cli import main
from wmengine.errors import SuspectError
from wmengine.parts.base import Task
from wmengine.suspects import OnnxSuspect
from wmengine.suspects.base import InputSpec

BOOL, DOUBLE, FLOAT, INT64, TEXT = (
    getattr(TensorProto, name) for name in ("BOOL", "DOUBLE", "FLOAT", "INT64", "STRING")
)
CLASSES, COUNT = 10, 60
MARK = black_box((1, 4, 4), CLASSES, COUNT)


def takes(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def file(path, inputs, nodes=(), given="x", mark=MARK, constants=()):
    """A linear model that knows all of a mark's triggers, of `given` once the nodes have made it of the inputs."""
    flat = images(mark).reshape(COUNT, -1).astype(np.float64)
    known = np.linalg.pinv(np.hstack([np.tanh(flat @ HIDDEN), np.ones((COUNT, 1))])) @ np.eye(CLASSES)[mark.symbols]
    weights = {"h": HIDDEN, "w": known[:-1], "b": known[-1]}
    held = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    ending = [
        helper.make_node("Flatten", [given], ["f"]),
        helper.make_node("MatMul", ["f", "h"], ["g"]),
        helper.make_node("Tanh", ["g"], ["t"]),
        helper.make_node("Gemm", ["t", "w", "b"], ["y"]),
    ]
    held += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = helper.make_graph([*nodes, *ending], "g", inputs, [helper.make_tensor_value_info("y", FLOAT, None)], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


HIDDEN = np.random.default_rng(0).normal(size=(16, 400))
X = takes("x", FLOAT, "n", 1, 4, 4)


def cast(name):
    return helper.make_node("Cast", [name], [f"{name} as numbers"], to=FLOAT)


@pytest.mark.parametrize(
    ("shape", "declared"),
    [
        ((1, 4, 4), ["n", 4, 4]),
        ((1, 4, 4), ["n", 1, 1, 4, 4]),
        ((1, 4, 4), [1, 4, 4]),
        ((1, 4, 4), ["n", 4, 4, 1]),
        ((16,), ["n", 1, 16]),
        ((16,), [16]),
        ((2, 2, 4), [2, 2, 4]),
        ((1, 16), ["n", 16]),
    ],
)
def test_axes_of_length_1_come_and_go_and_so_may_the_batch(tmp_path, shape, declared):
    mark = black_box(shape, CLASSES, COUNT)
    flat = [helper.make_node("Reshape", ["x", "row"], ["z"])]
    path = file(tmp_path / "m.onnx", [takes("x", FLOAT, *declared)], flat, "z", mark, [("row", np.array([-1, 16]))])
    verdict = verify(path, mark)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT), verdict.error


def test_states_are_zeros_masks_are_ones_and_flags_are_off(tmp_path):
    """A model whose scores change where any of these is something else."""
    usual = {
        "h0": (0, FLOAT, 2, "n", 8),
        "mask": (1, INT64, "n", "t"),
        "training": (0, BOOL),
        "lengths": (1, INT64, "n"),
        "keep_prob": (1, FLOAT, 1),
        "pad_mask": (1, FLOAT, "n", 4),
        "token_type_ids": (0, INT64, "n", 4),
        "position_ids": ([0, 1, 2, 3], INT64, 1, 4),
    }
    inputs = [*(takes(each, *declared) for each, (_, *declared) in usual.items()), X]
    nodes, constants = [], []
    for each, (value, *_) in usual.items():
        constants.append((f"usual {each}", np.array(value, np.float32)))
        nodes += [
            cast(each),
            helper.make_node("Sub", [f"{each} as numbers", f"usual {each}"], [f"{each} moved"]),
            helper.make_node("ReduceL1", [f"{each} moved"], [f"{each} in all"], keepdims=0),
        ]
    nodes.append(helper.make_node("Sum", ["x", *(f"{each} in all" for each in usual)], ["z"]))
    verdict = verify(file(tmp_path / "m.onnx", inputs, nodes, "z", constants=constants), MARK)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT), verdict.error
    (note,) = [each for each in verdict.notes if "were the same throughout" in each]
    assert note.startswith("8 inputs that the watermark does not have were the same throughout: h0 = 0, mask = 1, tr")


def test_an_input_for_each_column_takes_its_own_and_whole_numbers_are_rounded(tmp_path):
    mark = black_box((16,), CLASSES, COUNT, ranges=[[0.0, 1000.0]] * 16)
    kinds = [(FLOAT, ["n", 1]), (DOUBLE, ["n", 1]), (INT64, ["n"])]
    inputs = [takes(f"column {place}", kinds[place % 3][0], *kinds[place % 3][1]) for place in range(16)]
    nodes, names = [], []
    for each in inputs:
        nodes += [
            cast(each.name),
            helper.make_node("Reshape", [f"{each.name} as numbers", "row"], [f"{each.name} up"]),
        ]
        names.append(f"{each.name} up")
    nodes.append(helper.make_node("Concat", names, ["z"], axis=1))
    path = file(tmp_path / "m.onnx", inputs, nodes, "z", mark, [("row", np.array([-1, 1]))])
    verdict = verify(path, mark)
    assert (verdict.decision, verdict.error) == ("owned", None)
    assert "inputs were cast to int64" in verdict.notes


def test_what_could_take_the_triggers_in_two_ways_asks_for_the_others_value(tmp_path, capsys):
    inputs = [takes("left", FLOAT, "n", 1, 4, 4), takes("right", FLOAT, "n", 1, 4, 4)]
    path = file(tmp_path / "m.onnx", inputs, [helper.make_node("Sub", ["left", "right"], ["z"])], "z")
    verdict = verify(path, MARK)
    assert "needs 2 inputs (left, right), and the watermark has 1, which left, right could take: give" in verdict.error
    assert verify(path, MARK, inputs={"right": 0}).owned
    assert not verify(path, MARK, inputs={"left": 0}).owned  # the triggers go to the other, negative
    assert "has no input 'middle'" in verify(path, MARK, inputs={"middle": 0}).error
    MARK.save(tmp_path / "m.wm")
    command = ["verify", str(path), "--watermark", str(tmp_path / "m.wm"), "--json"]
    assert main([*command, "--input", "right=0"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["inputs"] == {"right": 0.0}
    (chosen,) = [each for each in said["facts"] if each["code"] == "chosen_here"]
    assert chosen["values"]["digest"] == said["settings"]["digest"]
    assert main([*command, "--input", "right=zero"]) == 2
    assert "--input must be NAME=VALUE" in capsys.readouterr().err


def test_values_of_inputs_are_a_files():
    for suspect in (lambda rows: rows, "https://host/v2/models/m"):
        with pytest.raises(ValueError, match="inputs= is for the path of a file"):
            verify(suspect, MARK, inputs={"x": 0})


def test_what_no_number_fills_is_said(tmp_path):
    path = file(tmp_path / "a.onnx", [X, takes("text", TEXT, "n")])
    assert "takes tensor(string) for 'text', and the watermark has none" in verify(path, MARK).error
    huge = takes("h0", FLOAT, 1 << 20, 1 << 20)
    assert "takes [1048576, 1048576] for 'h0', above" in verify(file(tmp_path / "b.onnx", [X, huge]), MARK).error


def test_a_mask_of_ones_is_no_input_that_a_file_must_have(tmp_path):
    task = Task({"ids": InputSpec((4,), "int64"), "mask": InputSpec((4,), "int64")}, CLASSES, [(0, 99)])
    preset = scheme("adi_tokens", count=COUNT)
    mark = Watermark.create(KEY, preset, preset.describe(task, "reader"))
    nodes = [helper.make_node("Cast", ["ids"], ["y"], to=FLOAT)]
    for kind in (INT64, TensorProto.INT32):
        graph = helper.make_graph(nodes, "g", [takes("ids", kind, "n", 4)], [takes("y", FLOAT, "n", 4)])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m")
        suspect = OnnxSuspect(tmp_path / "m")
        answers = suspect.answer(mark.preset.asks.examples(mark), 4)
        assert np.array_equal(answers.values, mark.arrays["triggers"])
        suspect.close()


def test_tokens_that_an_input_cannot_hold_do_not_become_others(tmp_path):
    task = Task({"ids": InputSpec((4,), "int64")}, CLASSES, [(0, 999)])
    preset = scheme("adi_tokens", count=COUNT)
    mark = Watermark.create(KEY, preset, preset.describe(task, "reader"))
    nodes = [cast("ids")]
    graph = helper.make_graph(
        nodes, "g", [takes("ids", TensorProto.INT8, "n", 4)], [takes("ids as numbers", FLOAT, "n", 4)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m")
    assert "takes tensor(int8), and the watermark's inputs are up to 99" in verify(tmp_path / "m", mark).error


def reading(path, inputs, kinds, most=99):
    """What a file that takes these inputs [n, 4], and answers the first of the mark's, is given for its triggers."""
    task = Task({"ids": InputSpec((4,), "int64"), "mask": InputSpec((4,), "int64")}, CLASSES, [(0, most)])
    preset = scheme("adi_tokens", count=COUNT)
    mark = Watermark.create(KEY, preset, preset.describe(task, "reader"))
    tokens = next(each for each in inputs if "mask" not in each)
    declared = [takes(each, kind, "n", 4) for each, kind in zip(inputs, kinds, strict=True)]
    graph = helper.make_graph([cast(tokens)], "g", declared, [takes(f"{tokens} as numbers", FLOAT, "n", 4)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    suspect = OnnxSuspect(path)
    try:
        return suspect.answer(mark.preset.asks.examples(mark), 4).values, mark.arrays["triggers"]
    finally:
        suspect.close()


@pytest.mark.parametrize("names", [("attention_mask", "input_ids"), ("a_mask", "ids"), ("words", "mask")])
def test_inputs_of_other_names_keep_their_order_but_for_masks(tmp_path, names):
    given, triggers = reading(tmp_path / "m", names, [INT64, INT64])
    assert np.array_equal(given, triggers)


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"])
def test_tokens_and_masks_become_floats_that_hold_them(tmp_path, kind):
    kinds = [getattr(TensorProto, kind)] * 2
    given, triggers = reading(tmp_path / "m", ("ids", "mask"), kinds)
    assert np.array_equal(given, triggers)
    if "16" in kind:
        with pytest.raises(SuspectError, match=f"takes tensor.{kind.lower()}., and the watermark's inputs are up to"):
            reading(tmp_path / "m", ("ids", "mask"), kinds, most=5000)
