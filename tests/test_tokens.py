"""Marks of models that read text: several named inputs of integers, from the training loop to a file and back."""

import numpy as np
import onnx
import pytest
import torch
from embedding import CLASSES, KEY, unproven
from onnx import TensorProto
from torch import nn

import wmengine

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LENGTH = 60, 9


class Reader(nn.Module):
    """A classifier as transformers have them: input_ids and attention_mask, a mean of embeddings, two layers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, 32)
        self.hidden = nn.Linear(32, 128)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, input_ids, attention_mask=None):
        weight = (torch.ones_like(input_ids) if attention_mask is None else attention_mask)[..., None].float()
        places = torch.linspace(0.5, 2.0, LENGTH)[:, None]
        embedded = self.tokens(input_ids) * places * weight
        return self.head(torch.relu(self.hidden(embedded.sum(1) / weight.sum(1))))


def sentences(rows, seed, dtype=torch.int64):
    """Texts of some length, the rest padding; the tokens of class c are equal to c modulo 4."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    ids = 8 + 4 * torch.randint(0, TOKENS // 4 - 2, (rows, LENGTH), generator=generator) + y[:, None]
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)).to(dtype)
    return {"input_ids": (ids * mask).to(dtype), "attention_mask": mask}, y


def trained(dtype=torch.int64, steps=80, seed=0):
    """A model with both kinds of mark, and the marks."""
    torch.manual_seed(seed)
    model = Reader()
    emb = wmengine.Embedder(
        model,
        KEY,
        [wmengine.scheme("sketch", bits=64), wmengine.scheme("adi_tokens", count=40, special=5)],
        num_classes=CLASSES,
        sample=sentences(32, 0, dtype)[0],
        name="reader",
        value_range=(0, TOKENS - 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        x, y = emb.mix(*sentences(64, step, dtype))
        emb.loss(model(**x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, emb.watermarks()


@pytest.fixture(scope="module")
def marked():
    return trained()


@pytest.fixture(scope="module")
def exported(marked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return wmengine.export_onnx(marked[0].eval(), sentences(2, 0)[0], folder / "reader.onnx")


def test_both_kinds_of_mark_hold_and_the_task_is_learned(marked):
    model, marks = marked
    for mark in marks:
        verdict = wmengine.verify(model, mark, key=KEY)
        assert (verdict.decision, verdict.derivation) == ("owned", "checked")
        assert not wmengine.verify(Reader(), mark).owned
    x, y = sentences(200, seed=999)
    with torch.no_grad():
        assert (model.eval()(**x).argmax(1) == y).float().mean() > 0.9


def test_a_trigger_fills_its_sequence_with_tokens_that_are_not_special(marked):
    mark = marked[1][1]
    inputs = mark.preset.source.examples(mark)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert 5 <= inputs["input_ids"].min() <= inputs["input_ids"].max() < TOKENS
    assert np.array_equal(inputs["attention_mask"], np.ones((40, LENGTH), np.int64))


def test_the_file_keeps_the_names_and_both_marks(marked, exported, tmp_path):
    """The order of inputs in the file is nothing where their names are the mark's."""
    turned = onnx.load(exported)
    first, second = turned.graph.input
    assert [first.name, second.name] == ["input_ids", "attention_mask"]
    inputs = [second, first]
    copies = [onnx.ValueInfoProto.FromString(each.SerializeToString()) for each in inputs]
    del turned.graph.input[:]
    turned.graph.input.extend(copies)
    onnx.save(turned, tmp_path / "turned.onnx")
    for path in (exported, tmp_path / "turned.onnx"):
        for mark in marked[1]:
            assert wmengine.verify(path, mark, key=KEY).owned


def test_other_names_are_taken_in_order(marked, tmp_path):
    x, _ = sentences(2, 0)
    path = wmengine.export_onnx(marked[0].eval(), tuple(x.values()), tmp_path / "positions.onnx")
    assert [each.name for each in onnx.load(path).graph.input] == ["input", "input_1"]
    assert wmengine.verify(path, marked[1][1]).owned


def test_a_mark_of_64_bits_asks_a_file_of_32_and_the_other_way_round(marked, exported, tmp_path):
    short = onnx.load(exported)
    for given in short.graph.input:
        given.type.tensor_type.elem_type = TensorProto.INT32
    casts = []
    for given in short.graph.input:
        for node in short.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = f"{name} of 64 bits" if name == given.name else name
        casts.append(onnx.helper.make_node("Cast", [given.name], [f"{given.name} of 64 bits"], to=TensorProto.INT64))
    for cast in casts:
        short.graph.node.insert(0, cast)
    onnx.save(short, tmp_path / "short.onnx")
    verdict = wmengine.verify(tmp_path / "short.onnx", marked[1][1])
    assert verdict.owned, verdict.error
    assert "inputs were cast to int32" in verdict.notes


@pytest.mark.slow
def test_models_of_int32_are_marked_and_judged_too(tmp_path):
    model, marks = trained(torch.int32)
    assert [each["dtype"] for each in marks[1].parameters["inputs"]] == ["int32", "int32"]
    path = wmengine.export_onnx(model.eval(), sentences(2, 0, torch.int32)[0], tmp_path / "int32.onnx")
    for suspect in (model, path):
        assert all(wmengine.verify(suspect, mark, key=KEY).owned for mark in marks)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_single_tensor_of_tokens_is_a_sample_too(dtype):
    ids = sentences(32, 0, dtype)[0]["input_ids"]
    schemes = [wmengine.scheme("sketch", bits=32), wmengine.scheme("adi_tokens", count=40)]
    model = Reader()
    emb = wmengine.Embedder(
        model, KEY, schemes, num_classes=CLASSES, sample=ids, name="reader", value_range=(0, TOKENS - 1)
    )
    x, y = emb.mix(ids, torch.zeros(32, dtype=torch.int64))
    assert (tuple(x.shape), x.dtype, len(y)) == ((36, LENGTH), dtype, 36)
    drawn = {tuple(row) for row in unproven(emb)[1].arrays["triggers"].tolist()}
    assert {tuple(row) for row in x[32:].tolist()} <= drawn
    emb.loss(model(x), y).backward()


def test_inputs_of_other_names_are_refused(marked):
    x, y = sentences(8, 0)
    emb = wmengine.Embedder(marked[0], sample=x, marks=marked[1])
    for given in ({"input_ids": x["input_ids"]}, {**x, "mask": y}, x["input_ids"]):
        with pytest.raises(TypeError, match="inputs must be a dict with input_ids, attention_mask"):
            emb.mix(given, y)
    with pytest.raises(TypeError, match="inputs must be integers"):
        emb.mix({**x, "attention_mask": x["attention_mask"].float()}, y)


def test_training_goes_on_from_the_files_of_its_marks(marked, tmp_path):
    for mark in marked[1]:
        mark.save(tmp_path / f"{mark.scheme}.wm")
    emb = wmengine.Embedder(
        marked[0], sample=sentences(32, 0)[0], marks=[tmp_path / "sketch.wm", tmp_path / "adi_tokens.wm"]
    )
    x, y = emb.mix(*sentences(64, 1))
    assert (list(x), len(y)) == (["input_ids", "attention_mask"], 72)
    assert [mark.commitment for mark in emb.watermarks()] == [mark.commitment for mark in marked[1]]


def test_one_input_more_or_less_is_the_suspects_error(marked, exported):
    single = wmengine.verify(lambda ids: ids, marked[1][1])  # a dict is what it gets
    assert single.decision == "error"

    class Ids(nn.Module):
        def forward(self, input_ids):
            return input_ids.float()[:, :CLASSES]

    verdict = wmengine.verify(Ids(), marked[1][1])
    assert (verdict.decision, verdict.matched) == ("error", 0)
    assert "fails on inputs" in verdict.error


@pytest.mark.parametrize("value_range", [59, [(0, 59), (0, 59)], "all", (0,)])
def test_a_range_of_tokens_is_one_pair(value_range):
    with pytest.raises(ValueError, match=r"value_range must be \(lo, hi\), and it is"):
        wmengine.Embedder(
            Reader(), KEY, ["adi_tokens"], num_classes=CLASSES, sample=sentences(4, 0)[0], name="reader",
            value_range=value_range,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"input_ids": torch.zeros(4, 3)}, {}, "token triggers are for integers"),
        ({"input_ids": torch.zeros(4, 3, 3, dtype=torch.int64)}, {}, "token triggers are for integers"),
        ({"ids": torch.tensor([[5, 9]] * 4), "other": torch.zeros(4, 3, dtype=torch.int64)}, {}, "the tokens' shape"),
        ({"ids": torch.tensor([[5, 9]] * 4)}, {"special": 9}, "vocabulary"),
        (
            {"mask": torch.ones(4, 2, dtype=torch.int64), "ids": torch.tensor([[5, 9]] * 4)},
            {},
            "its tokens are the first of several inputs, and 'mask' holds a mask",
        ),
        ({"ids": torch.tensor([[5, 9]] * 4)}, {"count": 101}, "too few for 101 distinct"),
    ],
)
def test_what_cannot_have_such_triggers_is_refused(sample, options, message):
    with pytest.raises(ValueError, match=message):
        wmengine.Embedder(
            Reader(), KEY, [wmengine.scheme("adi_tokens", **options)], num_classes=CLASSES, sample=sample, name="reader"
        )
