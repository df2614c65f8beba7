"""Small graphs that suspects are, and how tests ask them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from wmengine.errors import SuspectError
from wmengine.suspects.base import CHUNK

FEATURES, CLASSES = 6, 4
FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
# More rows than two chunks, and not a multiple of one.
INPUTS = np.random.default_rng(1).normal(size=(2 * CHUNK + 7, FEATURES)).astype(np.float32)
SCORES = INPUTS @ WEIGHT


def graph(nodes, initializers, outputs=("y",), inputs=None, opset=17):
    """An ONNX model; inputs and outputs default to float32 x [N, 6] and outputs of any type."""
    inputs = inputs or [helper.make_tensor_value_info("x", FLOAT, ["N", FEATURES])]
    outputs = [
        output if isinstance(output, onnx.ValueInfoProto) else helper.make_tensor_value_info(output, FLOAT, None)
        for output in outputs
    ]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=9)


def weight(name="w", values=WEIGHT):
    return numpy_helper.from_array(np.asarray(values), name)


def classifier(**options):
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight()], **options)


def external(location, values=WEIGHT, name="w", **entries):
    tensor = TensorProto(name=name, data_type=FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_external(location, **entries):
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [external(location, **entries)])


def save(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def ask(suspect, inputs=INPUTS, classes=CLASSES):
    """What it answers, as values: scores, labels, or the classes of several outputs."""
    return suspect.answer({"x": inputs}, classes).values


def said(suspect):
    return [str(fact) for fact in suspect.facts]


def complaint(call, *arguments):
    """The one sentence of the SuspectError that a call raises."""
    with pytest.raises(SuspectError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
