"""Matrix products in other words: what is written in place of MatMul shows the same weights."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from embedding import regularised
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import wmengine
from wmengine.parts.matching import fitted
from wmengine.suspects import open_suspect

FLOAT = TensorProto.FLOAT
GENERATOR = np.random.default_rng(0)
# Equation, shape of x, shape of the weight, whether the weight is on the left.
PRODUCTS = {
    "rows": ("bd,od->bo", (3, 6), (4, 6), False),
    "columns": ("bd, do -> bo", (3, 6), (6, 4), False),
    "a sequence": ("bld,od->blo", (2, 3, 6), (4, 6), False),
    "any axes before": ("...d,od->...o", (2, 3, 6), (4, 6), False),
    "heads": ("bld,dhk->bhlk", (2, 3, 6), (6, 2, 5), False),
    "heads joined": ("bhlk,khd->bld", (2, 2, 3, 5), (5, 2, 6), False),
    "on the left": ("od,bld->bol", (2, 3, 6), (4, 6), True),
}


def einsum(equation, x, weight, left, path):
    operands = ["w", "x"] if left else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node("Einsum", operands, ["y"], equation=equation)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, x)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_einsum_that_is_a_matrix_product_has_a_weight(tmp_path, product):
    """Each row that is read makes one output: x·Wᵀ, axes in the order of x and of y, is what ONNX Runtime answers."""
    equation, shape, stored, left = PRODUCTS[product]
    path = einsum(equation, shape, GENERATOR.normal(size=stored).astype(np.float32), left, tmp_path / "m.onnx")
    (tensor,) = open_suspect(path).tensors()
    x = GENERATOR.normal(size=shape).astype(np.float32)
    (answer,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    if product == "heads joined":
        x = x.transpose(0, 2, 1, 3).reshape(2, 3, 10)
    expected = x.reshape(*x.shape[:-1], -1) @ tensor.values.T
    if product == "heads":
        expected = expected.reshape(2, 3, 2, 5).transpose(0, 2, 1, 3)
    if product == "on the left":
        expected = expected.transpose(0, 2, 1)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["bhd,hdo->bho", "bhd,oud->bho", "bhd,hdd->bh"])
def test_an_einsum_that_is_no_matrix_product_is_counted(tmp_path, equation):
    suspect = open_suspect(einsum(equation, (2, 3, 3), np.ones((3, 3, 3), np.float32), False, tmp_path / "m.onnx"))
    assert suspect.tensors() == []
    assert ["could not be read" in str(fact) for fact in suspect.facts] == [True]


@pytest.mark.parametrize("equation", ["bhd,d->bhd", "bhd,->bhd"])
def test_an_einsum_that_scales_is_no_product(tmp_path, equation):
    weight = np.ones((3,) if "d-" in equation.split(",")[1] else (), np.float32)
    suspect = open_suspect(einsum(equation, (2, 3, 3), weight, False, tmp_path / "m.onnx"))
    assert (suspect.tensors(), suspect.facts) == ([], [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_mark_is_proven_where_a_copy_multiplies_by_einsum(tmp_path, dynamo):
    """As torch's exporters write torch.einsum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    mark = regularised(model, torch.zeros(2, 24), num_classes=4)

    class Copy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    x = torch.einsum("bd,do->bo", x, layer.weight.T) + layer.bias
                else:
                    x = layer(x)
            return x

    path, axes = tmp_path / "m.onnx", {"x": {0: "batch"}}
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": axes}
    copy = Copy().eval()
    torch.onnx.export(copy, (torch.zeros(2, 24),), path, dynamo=dynamo, input_names=["x"], verbose=False, **options)
    verdict = wmengine.verify(path, mark)
    assert (verdict.decision, verdict.matched) == ("owned", 64)
    assert any("3 of 3 carriers" in note for note in verdict.notes)


LENGTH, WIDTH, HEADS = 8, 32, 4
FUSED = {"Attention": False, "MultiHeadAttention": True}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The file of a tiny BERT with a mark, and the mark."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 64}
    config = transformers.BertConfig(
        vocab_size=40, max_position_embeddings=LENGTH, num_labels=3, attn_implementation="eager", **sizes
    )
    model = transformers.BertForSequenceClassification(config)
    sample = {name: torch.ones(2, LENGTH, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    mark = regularised(model, sample, num_classes=3)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    axes = {name: {0: "batch"} for name in sample}
    torch.onnx.export(
        Logits().eval(), tuple(sample.values()), path, dynamo=False, input_names=[*sample], dynamic_axes=axes
    )
    return path, mark


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:Exporting aten")
@pytest.mark.parametrize("kind", [*FUSED, "Attention, int8"])
def test_a_mark_is_proven_in_what_the_optimiser_for_transformers_makes(tmp_path, bert, kind):
    from onnxruntime import quantization
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    path, mark = bert
    options = FusionOptions("bert")
    options.use_multi_head_attention = FUSED[kind.partition(",")[0]]
    logging.disable(logging.WARNING)
    made = optimizer.optimize_model(
        str(path), "bert", num_heads=HEADS, hidden_size=WIDTH, optimization_options=options, opt_level=0
    )
    made.save_model_to_file(str(tmp_path / "m.onnx"))
    assert kind.partition(",")[0] in {node.op_type for node in made.model.graph.node}
    copy = tmp_path / "m.onnx"
    if "int8" in kind:
        copy = tmp_path / "q.onnx"
        quantization.quantize_dynamic(
            tmp_path / "m.onnx", copy, per_channel=True, extra_options={"DefaultTensorType": FLOAT}
        )
        assert "QAttention" in {node.op_type for node in onnx.load(copy).graph.node}
    logging.disable(logging.NOTSET)
    verdict = wmengine.verify(copy, mark)
    assert (verdict.decision, verdict.matched) == ("owned", 64)
    assert any("14 of 14 carriers" in note for note in verdict.notes)


# Operator, where it takes weights, and its other inputs' names.
ATTENTION = {
    "PackedAttention": ["x", "a", "b"],
    "DecoderMaskedSelfAttention": ["x", "a", "b"],
    "LongformerAttention": ["x", "a", "b", "m", "c"],
    "DecoderAttention": ["x", "x", "a", "c"],
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_projections_are_found_in_other_kinds_of_attention(tmp_path, kind):
    first, second = (GENERATOR.normal(size=(6, count)).astype(np.float32) for count in (18, 12))
    constants = [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "c")]
    constants += [numpy_helper.from_array(np.zeros(18, np.float32), "b")]
    graph = helper.make_graph(
        [helper.make_node(kind, ATTENTION[kind], ["y"], domain="com.microsoft", num_heads=2)],
        "g",
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("x", "m")],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        constants,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    found = open_suspect(tmp_path / "m.onnx").tensors()
    expected = [first, second][: 1 + ("c" in ATTENTION[kind])]
    assert [tensor.values.shape for tensor in found] == [each.T.shape for each in expected]
    parts = fitted([(6, 6)] * 3, found[:1])
    assert np.array_equal(np.concatenate([part.values for part in parts]), first.T)


@pytest.mark.parametrize("kind", ["FP4", "NF4"])
def test_weights_in_codes_of_four_bits_are_what_they_multiply_by(tmp_path, kind):
    """The last block is not full, and half of the last byte is none of a value's."""
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    values = GENERATOR.normal(size=(35, 9)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 35])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 9])],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tool = MatMulBnb4Quantizer(model, getattr(MatMulBnb4Quantizer, kind), 32)
    tool.process()
    tool.model.save_model_to_file(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": np.eye(35, dtype=np.float32)})
    suspect = open_suspect(tmp_path / "m.onnx")
    (tensor,) = suspect.tensors()
    np.testing.assert_allclose(tensor.values, expected.T, atol=1e-6)
    assert [*map(str, suspect.facts)] == ["1 of 1 weights are quantised to integers"]


@pytest.mark.parametrize("operator", ["MoE", "MatMul"])
def test_many_matrices_in_one_tensor_are_counted(tmp_path, operator):
    experts = numpy_helper.from_array(np.ones((3, 6, 6), np.float32), "w")
    inputs = ["x", "w"] if operator == "MatMul" else ["x", "x", "w"]
    domain = "" if operator == "MatMul" else "com.microsoft"
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, None)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [experts],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    suspect = open_suspect(tmp_path / "m.onnx")
    assert suspect.tensors() == []
    assert ["could not be read" in str(fact) for fact in suspect.facts] == [True]
