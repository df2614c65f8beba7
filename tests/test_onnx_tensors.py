"""What reading an ONNX graph promises: every export of a network shows the same weights, in order, filters first."""

import logging
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from wmengine import export_onnx
from wmengine.errors import SuspectError
from wmengine.parts.matching import fitted
from wmengine.parts.sources.weights import folded
from wmengine.sandbox import Limits
from wmengine.suspects import OnnxSuspect, open_suspect
from wmengine.suspects.base import InputSpec

FEATURES, CLASSES = 6, 4
FLOAT = TensorProto.FLOAT
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
INPUTS = np.random.default_rng(1).normal(size=(5, FEATURES)).astype(np.float32)


def graph(nodes, initializers, inputs=None, opset=17):
    """An ONNX model from x, float32 [N, 6], to y."""
    inputs = inputs or [helper.make_tensor_value_info("x", FLOAT, ["N", FEATURES])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, None)]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=9)


def weight(name="w", values=WEIGHT):
    return numpy_helper.from_array(np.asarray(values), name)


def save(model, path):
    path.write_bytes(model.SerializeToString())
    return path


class Network(nn.Module):
    """One of each kind of layer, with running statistics worth folding."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 10, bias=False)
        self.c1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        # without a bias, on which ONNX Runtime's quantizer stumbles where there are groups
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
        self.hidden = nn.Linear(6, 6)
        nn.init.normal_(self.b1.running_mean)
        nn.init.uniform_(self.b1.running_var, 0.5, 2)
        nn.init.normal_(self.b1.weight)

    def forward(self, x):
        x = torch.relu(self.b1(self.c1(x)))
        x = torch.relu(self.depthwise(x))
        return self.head(torch.relu(self.hidden(self.up(x).mean((2, 3)))))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Network().eval()
    return model, open_suspect(model).tensors({"input": InputSpec((1, 6, 6), "float32")})


@pytest.fixture(scope="module")
def exports(network, tmp_path_factory):
    """The network, as exported, unfolded, by the old exporter, and as copies of it quantised and optimised."""
    from onnxruntime import quantization

    folder = tmp_path_factory.mktemp("exports")
    model, _ = network
    x = torch.zeros(1, 1, 6, 6)
    paths = {"folded": export_onnx(model, x, folder / "folded.onnx")}
    paths["traced"] = export_onnx(model, x, folder / "traced.onnx", fold_batchnorm=False)
    paths["external"] = folder / "external.onnx"
    onnx.save(
        onnx.load(paths["folded"]), paths["external"], save_as_external_data=True, size_threshold=0, location="w.data"
    )
    paths["old"] = folder / "old.onnx"
    axes = {"x": {0: "N"}}
    torch.onnx.export(model, (x,), paths["old"], dynamo=False, input_names=["x"], dynamic_axes=axes)

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self):
            generator = np.random.default_rng(0)
            self.batches = iter([{"input": generator.normal(size=(4, 1, 6, 6)).astype(np.float32)} for _ in range(2)])

        def get_next(self):
            return next(self.batches, None)

    logging.disable(logging.WARNING)
    for name, kind, per_channel in [
        ("qdq", "QDQ", True),
        ("qdq tensor", "QDQ", False),
        ("qoperator", "QOperator", True),
    ]:
        paths[name] = folder / f"{name}.onnx"
        form = quantization.QuantFormat[kind]
        quantization.quantize_static(
            paths["folded"], paths[name], Calibration(), quant_format=form, per_channel=per_channel
        )
    paths["dynamic"] = folder / "dynamic.onnx"
    quantization.quantize_dynamic(paths["folded"], paths["dynamic"], per_channel=True)
    logging.disable(logging.NOTSET)
    for source, level in [("traced", "EXTENDED"), ("qdq", "EXTENDED"), ("dynamic", "EXTENDED"), ("folded", "ALL")]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.log_severity_level = 4
        paths[f"{source} {level}"] = folder / f"{source}-{level}.onnx"
        options.optimized_model_filepath = str(paths[f"{source} {level}"])
        onnxruntime.InferenceSession(paths[source], options, providers=["CPUExecutionProvider"])
    return paths


COPIES = ["folded", "traced", "external", "old", "qdq", "qdq tensor", "qoperator", "dynamic"]
COPIES += ["traced EXTENDED", "qdq EXTENDED", "dynamic EXTENDED", "folded ALL"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("copy", COPIES)
def test_every_export_shows_the_weights_of_the_network_in_order(network, exports, copy):
    """With what stands behind each filter folded into it, as some copies are and others not; and int8 rounds."""
    suspect = open_suspect(exports[copy])
    found = suspect.tensors()
    _, expected = network
    integers = any("quantised to integers" in note for note in map(str, suspect.facts))
    assert integers == any(word in copy for word in ("qdq", "qoperator", "dynamic"))
    assert {each.factors is None for each in found[1:]} == {True}
    assert (found[0].factors is None) == (not copy.startswith("traced"))
    for ours, theirs in zip(map(canonical, found), map(canonical, expected), strict=True):
        assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=(0.02 if integers else 1e-6) * np.abs(theirs).max())


def canonical(tensor):
    return folded(tensor.values, tensor.factors, "filter_mean")


def test_matrices_are_turned_so_that_each_row_makes_one_output(tmp_path):
    """W is [4 outputs, 6 inputs] in all of these, and comes out as that."""
    matrix = np.ascontiguousarray(WEIGHT.T)
    column = [helper.make_tensor_value_info("x", FLOAT, [FEATURES, "N"])]
    rows = [helper.make_tensor_value_info("x", FLOAT, ["N", FEATURES])]
    cases = [
        ("Gemm", ["x", "w"], {"transB": 1}, matrix, rows, ""),
        ("Gemm", ["x", "w"], {"transB": 0}, matrix.T, rows, ""),
        ("Gemm", ["w", "x"], {"transA": 0}, matrix, column, ""),
        ("Gemm", ["w", "x"], {"transA": 1}, matrix.T, column, ""),
        ("MatMul", ["x", "w"], {}, matrix.T, rows, ""),
        ("MatMul", ["w", "x"], {}, matrix, column, ""),
        ("FusedMatMul", ["x", "w"], {"transB": 1}, matrix, rows, "com.microsoft"),
    ]
    for operator, operands, attributes, stored, inputs, domain in cases:
        node = helper.make_node(operator, operands, ["y"], domain=domain, **attributes)
        suspect = open_suspect(save(graph([node], [weight(values=stored)], inputs=inputs), tmp_path / "m.onnx"))
        (tensor,) = suspect.tensors()
        assert np.array_equal(tensor.values, matrix), (operator, operands)
        assert tensor.source == "w"


def chain(*nodes, stored=WEIGHT, initializers=(), opset=17):
    """A MatMul whose weight is reached from the initializer w through these nodes, which end in v."""
    nodes = [*nodes, helper.make_node("MatMul", ["x", "v"], ["y"])]
    return graph(nodes, [weight(values=stored), *initializers], opset=opset)


def test_chains_that_only_move_values_are_followed(tmp_path):
    steps = [
        helper.make_node("Identity", ["w"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "flat"], ["c"]),
        helper.make_node("Reshape", ["c", "back"], ["d"]),
        helper.make_node("Cast", ["d"], ["e"], to=FLOAT),
        helper.make_node("Transpose", ["e"], ["v"], perm=[1, 0]),
    ]
    shapes = [weight("flat", np.array([-1])), weight("back", np.array([CLASSES, FEATURES]))]
    suspect = open_suspect(
        save(chain(*steps, stored=WEIGHT.astype(np.float16), initializers=shapes), tmp_path / "m.onnx")
    )
    (tensor,) = suspect.tensors()
    assert np.array_equal(tensor.values, WEIGHT.astype(np.float16).astype(np.float32).T)
    assert [*map(str, suspect.facts)] == ["1 of 1 weights are float16"]


def test_a_weight_that_depends_on_the_input_is_none(tmp_path):
    node = helper.make_node("Add", ["w", "x"], ["v"])
    inputs = [helper.make_tensor_value_info("x", FLOAT, [FEATURES, FEATURES])]
    model = graph(
        [node, helper.make_node("MatMul", ["x", "v"], ["y"])],
        [weight(values=np.eye(6, dtype=np.float32))],
        inputs=inputs,
    )
    assert open_suspect(save(model, tmp_path / "m.onnx")).tensors() == []


@pytest.mark.parametrize(
    ("scale_shape", "axis", "block"), [((), 0, 0), ((FEATURES,), 0, 0), ((CLASSES,), 1, 0), ((3, CLASSES), 0, 2)]
)
def test_dequantisation_is_undone_per_tensor_axis_and_block(tmp_path, scale_shape, axis, block):
    generator = np.random.default_rng(2)
    stored = generator.integers(-128, 128, WEIGHT.shape).astype(np.int8)
    scale = generator.uniform(0.1, 1, scale_shape).astype(np.float32)
    zero = generator.integers(-9, 9, scale_shape).astype(np.int8)
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    node = helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"], **attributes)
    model = chain(node, stored=stored, initializers=[weight("scale", scale), weight("zero", zero)], opset=21)
    suspect = open_suspect(save(model, tmp_path / "m.onnx"))
    (tensor,) = suspect.tensors()
    reference = onnx.reference.ReferenceEvaluator(model).run(None, {"x": np.eye(FEATURES, dtype=np.float32)})[0]
    np.testing.assert_allclose(tensor.values.T, reference, rtol=1e-6)
    assert [*map(str, suspect.facts)] == ["1 of 1 weights are quantised to integers"]


@pytest.mark.parametrize(
    ("scale_shape", "attributes"),
    [((1000,), {"axis": 0}), ((1000, 1), {"axis": 1, "block_size": 1 << 40}), ((1, 3), {"axis": 1, "block_size": 2})],
)
def test_scales_cannot_make_a_weight_larger(tmp_path, scale_shape, attributes):
    node = helper.make_node("DequantizeLinear", ["w", "scale"], ["v"], **attributes)
    scale = weight("scale", np.ones(scale_shape, np.float32))
    model = chain(node, stored=np.ones((1, CLASSES), np.int8), initializers=[scale], opset=21)
    (tensor,) = open_suspect(save(model, tmp_path / "m.onnx")).tensors()
    with pytest.raises(SuspectError, match="do not fit"):
        tensor.read()


def test_a_chain_of_scales_that_are_computed_themselves_is_no_weight(tmp_path):
    """Following each would take 3^15 steps."""
    names = ["w", *(f"d{index}" for index in range(14)), "v"]
    nodes = [helper.make_node("DequantizeLinear", [name] * 3, [then]) for name, then in pairwise(names)]
    assert open_suspect(save(chain(*nodes), tmp_path / "m.onnx")).tensors() == []


def test_a_scale_may_be_an_identity_of_another(tmp_path):
    nodes = [
        helper.make_node("Identity", ["scale"], ["same"]),
        helper.make_node("DequantizeLinear", ["w", "same"], ["v"]),
    ]
    stored = np.arange(24, dtype=np.int8).reshape(WEIGHT.shape)
    model = chain(*nodes, stored=stored, initializers=[weight("scale", np.array(0.5, np.float32))])
    (tensor,) = open_suspect(save(model, tmp_path / "m.onnx")).tensors()
    assert np.array_equal(tensor.values, stored.T / 2)


def test_a_weight_stored_as_float_and_quantised_in_the_graph_is_read_as_float(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["v"]),
    ]
    model = chain(*nodes, initializers=[weight("scale", np.array(0.05, np.float32))])
    (tensor,) = open_suspect(save(model, tmp_path / "m.onnx")).tensors()
    assert np.array_equal(tensor.values, WEIGHT.T)


@pytest.mark.parametrize("condition", ["constant", "computed"])
def test_order_is_that_of_execution_and_a_weight_used_twice_counts_once(tmp_path, condition):
    """The nodes are listed out of order, as ONNX Runtime accepts; sub is in a branch, and two nodes use big."""
    big, sub = np.eye(FEATURES, dtype=np.float32), 2 * np.eye(FEATURES, dtype=np.float32)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["b", f"sub_{name}"], ["o"])],
            name,
            [],
            [helper.make_tensor_value_info("o", FLOAT, None)],
            [weight(f"sub_{name}", sub)],
        )
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("MatMul", ["s", "w"], ["y"]),
        helper.make_node("If", ["c"], ["s"], **branches),
        helper.make_node("MatMul", ["a", "big"], ["b"]),
        helper.make_node("MatMul", ["x", "big"], ["a"]),
    ]
    constants = [weight(), weight("big", big), weight("yes", np.array(True))]
    if condition == "constant":
        nodes.append(helper.make_node("Identity", ["yes"], ["c"]))
    else:
        nodes += [
            helper.make_node("IsNaN", ["x"], ["n"]),
            helper.make_node("Cast", ["n"], ["m"], to=TensorProto.INT32),
            helper.make_node("ReduceMax", ["m"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["c"], to=TensorProto.BOOL),
        ]
    suspect = open_suspect(save(graph(nodes, constants), tmp_path / "m.onnx"))
    np.testing.assert_allclose(suspect.answer({"x": INPUTS}, CLASSES).values, 2 * INPUTS @ WEIGHT, rtol=1e-5, atol=1e-5)
    subs = ["sub_then"] if condition == "constant" else ["sub_then", "sub_else"]
    found = [tensor.source for tensor in suspect.tensors()]
    assert found in (["big", *subs, "w"], ["big", *subs[::-1], "w"])


def test_a_cycle_is_refused(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes += [helper.make_node("MatMul", ["b", "w"], ["y"])]
    with pytest.raises(SuspectError, match="cycle"):
        open_suspect(save(graph(nodes, [weight()]), tmp_path / "m.onnx")).tensors()


BITS = [("QOperator", 2), ("QOperator", 4), ("QOperator", 8), ("QDQ", 4)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "bits"), BITS)
def test_weights_quantised_by_block_are_what_they_multiply_by(tmp_path, form, bits, symmetric):
    """MatMulNBits, or dequantisation in blocks; the last block is not full, and two or four numbers share a byte."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    rows, columns = 24, 70
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", columns])]
    values = np.random.default_rng(0).normal(size=(columns, rows)).astype(np.float32)
    made = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight(values=values)], inputs=inputs, opset=21)
    tool = MatMulNBitsQuantizer(made, bits=bits, block_size=32, is_symmetric=symmetric, quant_format=QuantFormat[form])
    tool.process()
    tool.model.save_model_to_file(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    suspect = open_suspect(tmp_path / "m.onnx")
    (tensor,) = suspect.tensors()
    np.testing.assert_allclose(tensor.values, expected.T, atol=1e-5)
    assert [*map(str, suspect.facts)] == ["1 of 1 weights are quantised to integers"]


def test_packed_projections_of_attention_are_one_weight_of_three(tmp_path):
    """ONNX Runtime's optimiser for transformers packs queries, keys and values side by side; they may be quantised."""
    from onnxruntime import quantization

    packed = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    node = helper.make_node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2)
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", 5, 8])]
    constants = [weight(values=packed), weight("b", np.zeros(24, np.float32))]
    path = save(graph([node], constants, inputs=inputs), tmp_path / "m.onnx")
    parts = fitted([(8, 8)] * 3, open_suspect(path).tensors())
    for tensor, expected in zip(parts, np.split(packed.T, 3), strict=True):
        assert np.array_equal(tensor.values, expected)
    # Where all of a sequence is equal, attention gives back its values.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    row = np.random.default_rng(1).normal(size=8).astype(np.float32)
    (answer,) = session.run(None, {"x": np.broadcast_to(row, (1, 5, 8))})
    np.testing.assert_allclose(answer[0, 0], parts[2].values @ row, rtol=1e-4, atol=1e-5)
    quantization.quantize_dynamic(path, tmp_path / "q.onnx", per_channel=True)
    (integers,) = open_suspect(tmp_path / "q.onnx").tensors()
    np.testing.assert_allclose(integers.values, packed.T, atol=0.02)


def test_weights_with_channels_last_are_turned(tmp_path):
    """What ONNX Runtime's tool for image models makes of convolutions."""
    from onnxruntime.transformers.fusion_nhwc_conv import FusionNhwcConv
    from onnxruntime.transformers.onnx_model import OnnxModel

    kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 2)).astype(np.float32)
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", 4, 6, 6])]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[3, 2])]
    tool = OnnxModel(graph(nodes, [weight(values=kernel), weight("b", np.zeros(8, np.float32))], inputs=inputs))
    FusionNhwcConv(tool, update_weight=True).apply()
    assert "NhwcConv" in {node.op_type for node in tool.model.graph.node}
    (tensor,) = open_suspect(save(tool.model, tmp_path / "m.onnx")).tensors()
    assert np.array_equal(tensor.values, kernel)


def test_weights_need_room_one_by_one_and_not_together(tmp_path):
    """A mixture of many experts, of long names: all together they are beyond what one answer may hold."""
    large = np.ones((FEATURES, 1 << 16), np.float32)
    names = [f"model.layers.{number}.block_sparse_moe.experts.{number}.weight_transposed" for number in range(12_000)]
    experts = [weight(name, np.ones((FEATURES, 2), np.float32)) for name in names]
    heads = [weight(f"head{number}", large) for number in range(3)]
    nodes = [helper.make_node("MatMul", ["x", each.name], [f"y {each.name}"]) for each in experts + heads]
    gathered = [helper.make_node("Concat", [node.output[0] for node in nodes], ["y"], axis=1)]
    path = save(graph(nodes + gathered, experts + heads), tmp_path / "m.onnx")
    suspect = OnnxSuspect(path, limits=Limits(answer_bytes=large.nbytes + (1 << 12)))
    found = suspect.tensors()
    assert [tensor.source for tensor in found] == [*names, "head0", "head1", "head2"]
    for tensor in found[-3:]:
        assert np.array_equal(tensor.values, large.T)
