"""Recurrent layers are weights like any other: a mark in them is trained, and found again in every export."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from embedding import KEY, regularised
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import wmengine
from wmengine.suspects import open_suspect
from wmengine.suspects.base import InputSpec
from wmengine.suspects.weights import module_tensors

STEPS, FEATURES, HIDDEN = 4, 5, 8
SAMPLE = torch.rand(8, STEPS, FEATURES, generator=torch.Generator().manual_seed(0))
SIGNATURE = {"input": InputSpec((STEPS, FEATURES), "float32")}
# What the old exporter says.
QUIET = [
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:Exporting a model to ONNX with a batch",
]


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.LazyLinear(3)
        self.layer = getattr(nn, kind)(FEATURES, HIDDEN, batch_first=True, **options)
        self(SAMPLE)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.norm, self.head = (
            getattr(nn, kind)(FEATURES, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.Linear(HIDDEN, 3),
        )

    def forward(self, x):
        state = None
        for step in range(STEPS):
            state = self.cell(x[:, step], state)
        return self.head(self.norm(state[0] if isinstance(state, tuple) else state))


NETWORKS = {
    "LSTM of two layers and directions": lambda: Recurrent("LSTM", num_layers=2, bidirectional=True),
    "GRU": lambda: Recurrent("GRU", bidirectional=True),
    "RNN": lambda: Recurrent("RNN", bias=False),
    "LSTMCell": lambda: Cell("LSTMCell"),
    "GRUCell": lambda: Cell("GRUCell"),
}


def exported(model, path, dynamo=True):
    if dynamo:
        return wmengine.export_onnx(model, SAMPLE[:1], path)
    axes = {"input": {0: "batch"}}
    torch.onnx.export(model, (SAMPLE[:2],), path, dynamo=False, input_names=["input"], dynamic_axes=axes)
    return path


def weights(found):
    return [(tensor.values, tensor.factors) for tensor in found]


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_both_exporters_show_the_weights_of_a_recurrent_network(tmp_path, kind, dynamo):
    """With torch's order of gates, the forward direction before the other; no normalisation is behind a state."""
    model = NETWORKS[kind]().eval()
    expected = weights(open_suspect(model).tensors(SIGNATURE))
    names = [name for name, each in model.named_parameters() if each.ndim == 2 and "head" not in name]
    names = names[::-1] if kind == "LSTMCell" else names  # as torch multiplies in it
    assert len(expected) == len(names) + 1
    for name, (values, factors) in zip(names, expected, strict=False):
        assert np.array_equal(values, model.get_parameter(name).detach())
        assert factors is None
    suspect = open_suspect(exported(model, tmp_path / "m.onnx", dynamo))
    found = weights(suspect.tensors())
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert not any("could not be read" in str(each) for each in suspect.facts)


@pytest.fixture(scope="module")
def marked():
    """A network of recurrent layers with 64 bits in its weights, and the watermark."""
    model = NETWORKS["LSTM of two layers and directions"]()
    mark = regularised(model, SAMPLE, num_classes=3)
    return model.eval(), mark


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("copy", ["module", "new", "old", "int8 by channel", "int8 by tensor", "checkpoint"])
def test_a_mark_in_recurrent_layers_is_proven(tmp_path, marked, copy):
    from onnxruntime import quantization

    model, mark = marked
    assert len(mark.parameters["carriers"]) == 9
    if copy == "module":
        suspect = model
    elif copy == "checkpoint":
        suspect = tmp_path / "m.pt"
        torch.save(model.state_dict(), suspect)
    else:
        suspect = exported(model, tmp_path / "m.onnx", dynamo=copy == "new")
    if copy.startswith("int8"):
        logging.disable(logging.WARNING)
        quantization.quantize_dynamic(suspect, tmp_path / "q.onnx", per_channel="channel" in copy)
        logging.disable(logging.NOTSET)
        suspect = tmp_path / "q.onnx"
        assert "DynamicQuantizeLSTM" in {node.op_type for node in onnx.load(suspect).graph.node}
    verdict = wmengine.verify(suspect, mark)
    assert (verdict.decision, verdict.matched) == ("owned", 64)
    assert any("9 of 9 carriers" in note for note in verdict.notes)


def test_a_normalisation_behind_a_recurrent_layer_is_of_its_state(tmp_path):
    """Neither a module nor its checkpoint folds it into the weights."""
    model = Cell("RNNCell")
    nn.init.normal_(model.norm.weight)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for suspect in (model, tmp_path / "m.pt"):
        assert [tensor.factors for tensor in open_suspect(suspect).tensors(SIGNATURE)] == [None] * 3


def test_only_recurrent_weights_that_are_trained_are_marked():
    model = NETWORKS["RNN"]()
    model.layer.weight_hh_l0.requires_grad_(False)
    emb = wmengine.Embedder(
        model, KEY, [wmengine.scheme("sketch", bits=2)], num_classes=3, sample=SAMPLE, name="recurrent"
    )
    with pytest.warns(UserWarning, match="does not prove itself"):
        (mark,) = emb.watermarks()
    assert mark.parameters["carrier_indices"] == [0, 2]


def test_a_recurrent_weight_that_is_computed_is_read_as_it_is_now():
    model = NETWORKS["GRU"]()
    plain = model.layer.weight_hh_l0.detach().clone()
    nn.utils.parametrizations.weight_norm(model.layer, "weight_hh_l0")
    (found,) = [each for each in module_tensors(model, {"input": SAMPLE}) if each.name == "weight_hh_l0"]
    torch.testing.assert_close(found.weight, plain)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_are_where_the_operator_has_them(tmp_path, kind):
    """By the operator alone: with one gate's rows at zero in what is read, torch and ONNX Runtime still agree."""
    layer = getattr(nn, kind)(FEATURES, HIDDEN, bias=False)
    count = len(layer.weight_ih_l0) // HIDDEN
    generator = np.random.default_rng(0)
    stored = [generator.normal(size=(1, count * HIDDEN, size)).astype(np.float32) for size in (FEATURES, HIDDEN)]
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    made = helper.make_graph(
        [helper.make_node(kind, ["x", "w", "r"], ["y"], hidden_size=HIDDEN, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, 1, FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for values, name in zip(stored, "wr", strict=True)],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = open_suspect(path).tensors()
    with torch.no_grad():
        for weight, tensor in zip((layer.weight_ih_l0, layer.weight_hh_l0), found, strict=True):
            weight.copy_(torch.tensor(tensor.values))
        expected = layer(SAMPLE[0].unsqueeze(1))[0].numpy()
    (answer,) = onnxruntime.InferenceSession(path).run(None, {"x": SAMPLE[0].unsqueeze(1).numpy()})
    np.testing.assert_allclose(answer[:, 0], expected, atol=1e-6)


def test_a_network_that_ends_in_a_recurrent_layer_has_no_last_linear_layer():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRUCell(FEATURES, HIDDEN)

        def forward(self, x):
            return self.layer(x)

    deepsigns = wmengine.scheme("deepsigns", bits=32)
    with pytest.raises(ValueError, match="there a recurrent one is"):
        wmengine.Embedder(
            Ends(), KEY, [deepsigns], num_classes=HIDDEN, sample=SAMPLE[:, 0], name="ends", value_range=(0, 1)
        )
