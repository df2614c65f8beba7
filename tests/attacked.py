"""Small models that attacks are tried on, and what is looked at after."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def normal(*shape, seed=None):
    of = shape if seed is None else [seed, *shape]
    return np.random.default_rng(of).normal(size=shape).astype(np.float32)


ARRAYS = {"a": normal(8, 3, 3, 3), "bias": normal(8), "b": normal(8 * 16, 10), "shape": np.array([-1, 128])}


def classifier(arrays=ARRAYS, batch="n"):
    """Convolution, ReLU, and a linear layer: x [n, 3, 6, 6] to y [n, 10]."""
    nodes = [
        helper.make_node("Conv", ["x", "a", "bias"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Reshape", ["i", "shape"], ["j"]),
        helper.make_node("MatMul", ["j", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def values(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def content(folder):
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(model, x):
    """The first output of a file, or of a model's bytes, for its first input."""
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model))
    (entry, *_) = session.get_inputs()
    return session.run(None, {entry.name: x})[0]


def same(one, other):
    return np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
