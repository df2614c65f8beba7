"""What the tests of scans judge: small networks that know a mark or do not, and a folder of them."""

import math
import os

import numpy as np
import onnx
from judged import black_box, images, white_box
from onnx import TensorProto, helper, numpy_helper

SHAPE, CLASSES, COUNT, HIDDEN = (1, 4, 4), 10, 60, 400


def mark(name="detector", **options):
    """The mark that copies know, unless told another name, key or message."""
    return black_box(SHAPE, CLASSES, COUNT, name=name, **options)


def weights_mark():
    """One for the first weight of every network of `save`, which holds none of its bits."""
    return white_box([(HIDDEN, math.prod(SHAPE))], name="weights", shape=SHAPE, bits=64)


def save(path, answers_to, labels, seed=0):
    """A network that gives these labels to these inputs: random features, and a last layer by least squares."""
    flat = answers_to.reshape(len(answers_to), -1)
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(flat.shape[1], HIDDEN)).astype(np.float32)
    bias = generator.normal(size=HIDDEN).astype(np.float32)
    features = np.maximum(flat @ hidden + bias, 0)
    target = 2.0 * np.eye(CLASSES)[labels] - 1.0
    out = np.linalg.lstsq(features, target, rcond=None)[0].astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "o"], ["y"]),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in (("w", hidden), ("b", bias), ("o", out))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def copy_of(watermark, path, kept=1.0, seed=0):
    """A network that learned a share of a mark's triggers."""
    labels = watermark.arrays["labels"].copy()
    lost = np.random.default_rng(seed).random(len(labels)) >= kept
    labels[lost] = (labels[lost] + 1) % CLASSES
    save(path, images(watermark), labels, seed)


def stranger(path, seed):
    labels = np.random.default_rng(seed).integers(0, CLASSES, COUNT)
    save(path, np.random.default_rng(seed).normal(size=(COUNT, *SHAPE)), labels, seed)


def hanging(path):
    """A network that runs for ever."""

    def value(name, kind=TensorProto.FLOAT, shape=None):
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v")],
        [value("c2", TensorProto.BOOL, []), value("v2")],
    )  # fmt: skip
    true = numpy_helper.from_array(np.array(True), "true")
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)], "g",
        [value("x", shape=["N", *SHAPE])], [value("y")], [true],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def by_pair(table):
    return {(os.path.basename(row["suspect"]), row["watermark"]): row for row in table.to_pylist()}


def facts(table):
    """A table without what depends on the clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table.to_pylist()]


def fill(folder):
    """Suspects below a folder: a copy, a worn one, its twin under another name, strangers, files that are no models."""
    marks = folder / "registry"
    marks.mkdir()
    first, second = mark(), mark("other")
    first.save(marks / "first.wm")
    second.save(marks / "second.wm")
    models = folder / "models"
    (models / "deep").mkdir(parents=True)
    copy_of(first, models / "copy.onnx")
    copy_of(first, models / "deep" / "worn.onnx", kept=0.7)
    (models / "twin.onnx").write_bytes((models / "copy.onnx").read_bytes())
    copy_of(second, models / "other.onnx")
    for seed in range(1, 5):
        stranger(models / f"stranger{seed}.onnx", seed)
    (models / "broken.onnx").write_bytes(b"this is no model")
    (models / "readme.txt").write_text("not a suspect")
    return folder
