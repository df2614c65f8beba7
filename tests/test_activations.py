"""A mark in activations (deepsigns) is read the same from the module and from its exported files, in the sandbox."""

import numpy as np
import onnx
import pytest
import torch
from embedding import KEY, batch, embedder, network
from onnx import TensorProto, helper
from torch import nn

import wmengine
from wmengine.errors import SuspectError
from wmengine.suspects import open_suspect

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def marked():
    """A network that a regulariser alone has marked, the mark, and the file as the exporter folds it."""
    model = network(seed=4)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    chosen = [wmengine.scheme("deepsigns", bits=64, groups=4, members=3, strength=0.1)]
    emb = embedder(model.eval(), chosen, num_classes=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(60):
        optimizer.zero_grad()
        emb.regulariser().backward()
        optimizer.step()
    return model, emb.watermarks()[0]


@pytest.fixture(scope="module")
def folded(marked, tmp_path_factory):
    return wmengine.export_onnx(marked[0], batch(1)[0], tmp_path_factory.mktemp("deepsigns") / "folded.onnx")


def inputs_of(mark):
    return mark.preset.source.examples(mark)


def test_the_module_holds_its_bits_and_another_none(marked):
    model, mark = marked
    verdict = wmengine.verify(model, mark, key=KEY)
    assert (verdict.decision, verdict.matched, verdict.total, verdict.queries) == ("owned", 64, 64, 0)
    assert wmengine.verify(network(seed=5), mark).decision == "not_proven"


@pytest.mark.parametrize("isolation", ["persistent", "per-model", "none"])
def test_a_folded_file_holds_them_in_the_sandbox(marked, folded, isolation):
    _, mark = marked
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(folded).graph.node}
    verdict = wmengine.verify(folded, mark, key=KEY, isolation=isolation)
    assert (verdict.decision, verdict.matched, verdict.error) == ("owned", 64, None)


def test_activations_of_a_file_are_those_of_its_module(marked, folded):
    model, mark = marked
    place, inputs = mark.parameters["place"], inputs_of(mark)
    ours = open_suspect(model).activations(place, inputs)
    theirs = open_suspect(folded).activations(place, inputs)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape == (12, mark.parameters["features"])
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


def test_in_half_precision(marked, folded, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(folded), keep_io_types=False), tmp_path / "half.onnx")
    verdict = wmengine.verify(tmp_path / "half.onnx", marked[1])
    assert (verdict.decision, verdict.matched) == ("owned", 64)
    assert "triggers were put cast to float16" in verdict.notes


@pytest.mark.parametrize("rows", [1, 5])
def test_with_a_fixed_batch(marked, folded, tmp_path, rows):
    """12 inputs, five at a time: the last batch is filled up, and what fills it is not read."""
    saved = onnx.load(folded)
    fixed = helper.make_tensor_value_info(saved.graph.input[0].name, TensorProto.FLOAT, [rows, 1, 8, 8])
    saved.graph.input[0].CopyFrom(fixed)
    onnx.save(saved, tmp_path / "fixed.onnx")
    verdict = wmengine.verify(tmp_path / "fixed.onnx", marked[1])
    assert (verdict.decision, verdict.matched) == ("owned", 64)
    assert f"the suspect has a fixed batch of {rows}" in verdict.notes


def test_a_place_that_is_not_there_is_an_error(marked, folded):
    """A network with fewer weights was cut short: nothing can be read where the mark was."""
    model, mark = marked
    for suspect in (open_suspect(model), open_suspect(folded), open_suspect(folded, isolation="none")):
        with pytest.raises(SuspectError, match="has 4 weights, and the mark is in number 5"):
            suspect.activations(4, inputs_of(mark))
    headless = nn.Sequential(*list(model)[:8])
    verdict = wmengine.verify(headless, mark)
    assert (verdict.decision, verdict.matched, verdict.log10_p) == ("error", 0, 0.0)
    assert "has 2 weights, and the mark is in number 4" in verdict.error


def test_other_widths_there_show_nothing_and_are_no_error(marked):
    model, mark = marked
    wider = nn.Sequential(*list(model)[:8], nn.Linear(512, 80), nn.ReLU(), nn.Linear(80, 4))
    verdict = wmengine.verify(wider, mark)
    assert (verdict.decision, verdict.matched, verdict.total, verdict.log10_p) == ("not_proven", 0, 0, 0.0)


def test_what_has_no_inside_is_an_error(marked):
    verdict = wmengine.verify(lambda rows: np.zeros((len(rows), 4), np.float32), marked[1])
    assert verdict.decision == "error"
    assert "shows no activations" in verdict.error


def test_inputs_of_another_shape_are_the_suspects_error(marked, tmp_path):
    other = nn.Sequential(nn.Flatten(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4))
    path = wmengine.export_onnx(other, torch.zeros(1, 1, 10, 10), tmp_path / "other.onnx")
    for suspect in (other, path):
        verdict = wmengine.verify(suspect, marked[1])
        assert (verdict.decision, verdict.matched) == ("error", 0)
