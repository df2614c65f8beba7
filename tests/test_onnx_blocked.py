"""What ONNX Runtime saves at its default level on x86: convolutions whose channels lie in blocks of 8 or 16."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from wmengine.suspects import open_suspect

NCHWC = "com.microsoft.nchwc"


def kernel(filters, channels, size=3, seed=0):
    """As a trained one: its filters and its input channels differ in their norms."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(0, 0.5, (filters, 1, 1, 1)) + generator.normal(0, 0.5, (channels, 1, 1)))
    return (norms * generator.normal(size=(filters, channels, size, size))).astype(np.float32)


def blocked(weight, block):
    """Filters in blocks, and input channels where there are enough of them, the last block filled with zeros."""
    filters, channels, *size = weight.shape
    inner = block if channels >= block else 1
    full = np.zeros((-(-filters // block) * block, -(-channels // inner) * inner, *size), np.float32)
    full[:filters, :channels] = weight
    stored = np.stack(
        [
            np.stack([full[o : o + block, i : i + inner].transpose(2, 3, 1, 0) for i in range(0, full.shape[1], inner)])
            for o in range(0, len(full), block)
        ]
    )
    return stored.reshape(full.shape)


def saved(weights, block, path, groups=None, biases=None):
    """A file of convolutions one behind the other as ONNX Runtime would save them."""
    nodes, constants, value = [], [], "x"
    for number, weight in enumerate(weights):
        depthwise = (groups or {}).get(number, 1) > 1
        filters = -(-len(weight) // block) * block
        constants.append(numpy_helper.from_array(blocked(weight, block), f"w{number}"))
        inputs = [value, f"w{number}"]
        if biases is not None:
            bias = np.zeros(filters, np.float32)
            bias[: len(weight)] = biases[number]
            constants.append(numpy_helper.from_array(bias, f"b{number}"))
            inputs.append(f"b{number}")
        value = f"y{number}"
        attributes = {"group": filters if depthwise else 1, "pads": [1, 1, 1, 1], "activation": "Relu"}
        nodes.append(helper.make_node("Conv", inputs, [value], domain=NCHWC, **attributes))
    nodes.append(helper.make_node("ReorderOutput", [value], ["y"], domain=NCHWC, channels=len(weights[-1])))
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(NCHWC, 1)]
    onnx.save(helper.make_model(made, opset_imports=imports, ir_version=8), path)
    return path


def check(path, weights):
    found = open_suspect(path).tensors()
    assert [tensor.shape for tensor in found] == [weight.shape for weight in weights]
    for tensor, weight in zip(found, weights, strict=True):
        assert np.array_equal(tensor.values, weight)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("sizes", [(3, 32, 64, 32), (3, 24, 40, 12), (3, 20, 36, 20)])
def test_blocks_of_another_machine_are_read_too(tmp_path, block, sizes):
    """The first are full in blocks of either size, so that only what lies in them tells which; others fill none."""
    weights = [kernel(sizes[k + 1], sizes[k], seed=k) for k in range(3)]
    check(saved(weights, block, tmp_path / "m.onnx"), weights)


@pytest.mark.parametrize("block", [8, 16])
def test_channels_on_their_own_fill_up_blocks_too(tmp_path, block):
    weights = [kernel(36, 3), kernel(36, 1, seed=1), kernel(20, 36, seed=2)]
    check(saved(weights, block, tmp_path / "m.onnx", groups={1: 36}), weights)


@pytest.mark.parametrize("shown_by", ["the bias", "the next weight", "the end"])
def test_a_pruned_filter_fills_no_block(tmp_path, shown_by):
    weights = [kernel(32, 3), kernel(64, 32, seed=1)]
    biases = [np.ones(32), np.ones(64)] if shown_by == "the bias" else None
    weights[1 if shown_by == "the end" else 0][-1] = 0
    check(saved(weights, 16, tmp_path / "m.onnx", biases=biases), weights)


def test_one_that_cannot_be_read_keeps_none_of_the_others_from_being_read(tmp_path):
    weights = [kernel(20, 3), kernel(36, 20, seed=1)]
    model = onnx.load(saved(weights, 16, tmp_path / "m.onnx"))
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones((16, 3, 3, 3), np.int8), "bad"),
            numpy_helper.from_array(np.ones(5, np.float32), "scale"),  # of another length than any axis
        ]
    )
    model.graph.node.append(helper.make_node("DequantizeLinear", ["bad", "scale"], ["v"]))
    model.graph.node.append(helper.make_node("Conv", ["x", "v"], ["z"], domain=NCHWC))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "m.onnx")
    suspect = open_suspect(tmp_path / "m.onnx")
    assert [tensor.shape for tensor in suspect.tensors()] == [weight.shape for weight in weights]
    assert ["could not be read" in str(fact) for fact in suspect.facts] == [True]


def test_the_layout_is_the_one_that_onnx_runtime_writes(tmp_path):
    weights = [kernel(20, 3), kernel(36, 20, seed=1), kernel(20, 36, size=1, seed=2)]
    nodes = [
        helper.make_node("Conv", [f"y{number}" if number else "x", f"w{number}"], [f"y{number + 1}"])
        for number in range(3)
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y3", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)],
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    written = [stored[node.input[1]] for node in graph.node if (node.domain, node.op_type) == (NCHWC, "Conv")]
    if not written:
        pytest.skip("ONNX Runtime blocks no convolutions on this processor")
    block = 16 if len(written[0]) == 32 else 8
    for ours, theirs in zip([blocked(weight, block) for weight in weights], written, strict=True):
        assert np.array_equal(ours, theirs)
    check(tmp_path / "m.onnx", weights)
