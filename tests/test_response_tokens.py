"""`response` in models that read text: probes are the owner's own rows and splices of them, masks beside them."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from responding import KEY
from torch import nn

from wmengine import Embedder, Watermark, controls, export_onnx, response, scheme, verify
from wmengine.parts.responses.tokens import splices, stacked

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LENGTH, CLASSES = 60, 12, 4
PRESET = scheme("response", bits=256, probes=512)


class Reader(nn.Module):
    """A classifier as transformers have them: input_ids and attention_mask, a mean of embeddings, two layers."""

    def __init__(self, seed=0, sure=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.hidden, self.head = nn.Embedding(TOKENS, 32), nn.Linear(32, 64), nn.Linear(64, CLASSES)
        with torch.no_grad():
            self.head.weight *= sure

    def forward(self, input_ids, attention_mask=None):
        weight = (torch.ones_like(input_ids) if attention_mask is None else attention_mask)[..., None].float()
        embedded = self.tokens(input_ids) * torch.linspace(0.5, 2.0, LENGTH)[:, None] * weight
        return self.head(torch.relu(self.hidden(embedded.sum(1) / weight.sum(1).clamp(min=1.0))))


def sentences(rows, seed, dtype=torch.int64, noise=0.4):
    """Texts of some length, the rest padding; most tokens of class c are equal to c modulo 4, the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    drawn = torch.randint(0, TOKENS // 4 - 2, (rows, LENGTH), generator=generator)
    wrong = torch.rand((rows, LENGTH), generator=generator) < noise
    ids = 8 + 4 * drawn + torch.where(wrong, torch.randint(0, 4, (rows, LENGTH), generator=generator), y[:, None])
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)).to(dtype)
    return {"input_ids": (ids * mask).to(dtype), "attention_mask": mask}, y


def arrays(inputs):
    return {name: rows.numpy() for name, rows in inputs.items()}


def service(predict, probes, **options):
    given = {"num_classes": CLASSES, "sample": probes, "name": "reader", "probes": probes, "scheme": PRESET}
    return response(predict, KEY, **{**given, "strength": 1.0, **options})


@cache
def served():
    return service(Reader(sure=20.0).eval(), sentences(600, 1)[0])


# probes


def test_a_splice_begins_as_one_row_and_ends_as_another_and_is_cut_within_both():
    inputs = arrays(sentences(300, 0)[0])
    rows, random = stacked([*inputs.values()]), np.random.default_rng(0)
    first, second = random.integers(0, 300, (2, 500))
    found = splices(rows, first, second, random)
    least = np.minimum(inputs["attention_mask"][first].sum(axis=1), inputs["attention_mask"][second].sum(axis=1))
    cuts = []
    for row, one, other, most in zip(found, rows[first], rows[second], least, strict=True):
        fits = [
            at
            for at in range(1, most + 1)
            if (row[:, :at] == one[:, :at]).all() and (row[:, at:] == other[:, at:]).all()
        ]
        assert fits
        cuts += fits[:1]
    assert len(set(cuts)) > 3
    assert np.array_equal(found[:, 1], np.arange(LENGTH) < inputs["attention_mask"][second].sum(axis=1)[:, None])


def test_a_pool_holds_rows_of_the_owner_and_splices_and_asks_them_with_their_masks():
    mark, own = served().watermark(), arrays(sentences(600, 1)[0])
    probes = mark.arrays["probes"]
    assert (probes.shape, mark.parameters["value_range"], mark.parameters["views"]) == ((512, 2, LENGTH), [], 1)
    known = {row.tobytes() for row in stacked([*own.values()])}
    held = sum(row.tobytes() in known for row in probes)
    assert 50 < held < 500
    asked = mark.preset.source.examples(mark)
    assert {name: rows.dtype for name, rows in asked.items()} == dict.fromkeys(own, np.dtype("int64"))
    assert ((asked["input_ids"] > 0) <= (asked["attention_mask"] > 0)).all()


# a service


def test_a_service_of_texts_is_proven_and_turns_no_decision():
    rows = arrays(sentences(200, 5)[0])
    plain = Reader(sure=20.0).eval()(**{name: torch.from_numpy(each) for name, each in rows.items()}).detach().numpy()
    assert np.array_equal(served()(rows).argmax(axis=1), plain.argmax(axis=1))
    assert isinstance(served()(sentences(9, 5)[0]), torch.Tensor)
    assert verify(served(), served().watermark(), key=KEY).owned
    assert verify(Reader(3, sure=20.0), served().watermark(), key=KEY).decision == "not_proven"


@dataclass
class Answer:
    logits: torch.Tensor


class Answering(Reader):
    """Answers as models of transformers do."""

    def forward(self, input_ids, attention_mask=None):
        return Answer(super().forward(input_ids, attention_mask))


def test_inputs_go_by_their_names_and_logits_are_found_where_models_of_transformers_have_them():
    rows, few = sentences(600, 1)[0], sentences(9, 5)[0]
    turned = {"attention_mask": rows["attention_mask"], "input_ids": rows["input_ids"]}
    found = service(Answering(sure=20.0).eval(), turned, sample=rows)
    assert np.array_equal(found.watermark().arrays["probes"], served().watermark().arrays["probes"])
    assert torch.equal(found({name: few[name] for name in turned}), served()(few))
    with pytest.raises(ValueError, match="inputs must hold input_ids, attention_mask, and they hold input_ids"):
        found(few["input_ids"])


@pytest.mark.parametrize("kind", ["a function of two inputs", "a function of one", "a file", "a file of other names"])
def test_of_tokens_functions_and_files_are_served_too(kind, tmp_path):
    model, (rows, _) = Reader(sure=20.0).eval(), sentences(600, 1)
    if kind == "a file":
        predict = export_onnx(model, {name: each[:2] for name, each in rows.items()}, tmp_path / "reader.onnx")
    elif kind == "a file of other names":
        predict = export_onnx(model, tuple(each[:2] for each in rows.values()), tmp_path / "reader.onnx")
    elif kind == "a function of one":
        rows, predict = rows["input_ids"], lambda ids: model(torch.from_numpy(ids)).detach().numpy()
    else:

        def predict(given):
            return model(**{name: torch.from_numpy(each) for name, each in given.items()})

    found = service(predict, rows)
    mark = found.watermark()
    assert mark.parameters["raw"] == 64
    assert verify(found, mark, key=KEY).owned
    mark.save(tmp_path / "served.wm")
    again = response(predict, mark=tmp_path / "served.wm", strength=1.0)
    few = rows[:5] if isinstance(rows, torch.Tensor) else {name: each[:5] for name, each in rows.items()}
    assert torch.equal(again(few), found(few))


# a network


def embedder(model, sample, **options):
    return Embedder(model, KEY, [PRESET], **{"num_classes": CLASSES, "sample": sample, "name": "reader", **options})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_loss_is_that_of_the_logits_less_the_pattern_on_texts(dtype):
    (rows, y), model = sentences(600, 1, dtype), Reader(sure=20.0)
    emb = embedder(model, rows, samples=rows)
    kept = emb.features(rows)
    assert torch.equal(emb.loss(model(**rows), y, features=kept), emb.loss(model(**rows), y, inputs=rows))
    plain = nn.functional.cross_entropy(model(**rows), y, label_smoothing=0.1)
    assert not torch.isclose(emb.loss(model(**rows), y, inputs=rows), plain)


class MaskedReader(Reader):
    """Keeps the masks that it is given."""

    def forward(self, input_ids, attention_mask=None):
        self.masks = attention_mask
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_mixtures_of_texts_are_taught_as_splices_with_masks_of_any_type_cut_alike(dtype):
    rows, model = sentences(600, 1)[0], MaskedReader(sure=20.0)
    rows["attention_mask"] = rows["attention_mask"].to(dtype)
    emb = Embedder(
        model, KEY, [scheme("response", bits=256, probes=512, mixtures=32)], num_classes=CLASSES, sample=rows,
        name="reader", samples=rows,
    )  # fmt: skip
    emb.features({name: rows[name] for name in ("attention_mask", "input_ids")})
    assert emb.regulariser().item() > 0.0
    assert set(model.masks.unique().tolist()) == {0, 1}


def test_features_are_of_inputs_by_their_names():
    rows = sentences(600, 1)[0]
    emb = embedder(Reader(sure=20.0), rows, samples=rows)
    turned = {name: rows[name] for name in ("attention_mask", "input_ids")}
    assert torch.equal(emb.features(turned), emb.features(rows))
    for wrong in (
        rows["input_ids"],
        {"input_ids": rows["input_ids"]},
        {name: each.numpy() for name, each in rows.items()},
    ):
        with pytest.raises(TypeError, match="inputs must be"):
            emb.features(wrong)


def test_a_service_says_what_its_inputs_must_be():
    few = sentences(5, 3)[0]
    for wrong, kind in ((few["input_ids"].float(), "torch.float32"), (np.array(["a"]), "<U1"), (None, "object")):
        with pytest.raises(TypeError, match=f"'input_ids' must be a batch of int64, and its values are {kind}"):
            served()({**few, "input_ids": wrong})


@pytest.mark.parametrize(
    ("sample", "samples", "words"),
    [
        (
            {"input_ids": torch.zeros(80, 3, 3, dtype=torch.int64)},
            None,
            "or tokens, integers .n, L., and these are int64 .80, 3, 3.",
        ),
        ({"ids": torch.ones(80, 9).long(), "more": torch.ones(80, 3).long()}, None, "the tokens' shape"),
        ({"ids": torch.ones(80, 9).long()}, {"ids": torch.full((80, 9), 0.5)}, "whole numbers"),
        ({"ids": torch.ones(80, 9).long()}, {"ids": torch.full((80, 9), -(2**63))}, "whole numbers"),
        (sentences(80, 0)[0], {**sentences(80, 0)[0], "attention_mask": torch.ones(70, 12)}, "as many rows of every"),
    ],
)
def test_what_cannot_be_probes_is_said(sample, samples, words):
    with pytest.raises(ValueError, match=words):
        embedder(Reader(), sample, samples=sample if samples is None else samples)


@pytest.fixture(scope="module")
def marked():
    """A network that was trained, then for some epochs with the mark, a student of its base's labels, and the mark."""
    base, (rows, y) = Reader(), sentences(1024, 2)
    batches = [
        ({name: each[at : at + 64] for name, each in rows.items()}, y[at : at + 64]) for at in range(0, 1024, 64)
    ]
    optimizer = torch.optim.Adam(base.parameters(), 5e-3)
    for x, labels in batches * 6:
        optimizer.zero_grad()
        nn.functional.cross_entropy(base(**x), labels).backward()
        optimizer.step()
    known = controls(base.eval(), rows, epochs=8)
    model = Reader()
    model.load_state_dict(base.state_dict())
    emb = Embedder(
        model, KEY, [scheme("response", bits=512, probes=2048)], num_classes=CLASSES, sample=rows, name="reader",
        samples=sentences(3000, 3)[0], controls=known,
    )  # fmt: skip
    emb.fit(batches, epochs=12, rate=5e-3, label_smoothing=0.1)
    return model.eval(), known, emb.watermarks()[0]


@pytest.mark.slow
def test_a_network_that_reads_is_proven_as_a_module_a_function_and_a_file(marked, tmp_path):
    model, known, mark = marked
    path = export_onnx(model, {name: each[:2] for name, each in sentences(2, 0)[0].items()}, tmp_path / "reader.onnx")
    mark.save(tmp_path / "reader.wm")
    mark = Watermark.load(tmp_path / "reader.wm")

    def predict(given):
        with torch.no_grad():
            return model(**{name: torch.from_numpy(each) for name, each in given.items()})

    for suspect in (model, predict, path):
        assert verify(suspect, mark, key=KEY).owned
    for stranger in (*known, Reader(7)):
        assert verify(stranger, mark, key=KEY).log10_p > -3
    (rows, y) = sentences(500, 9)
    assert (model(**rows).argmax(1) == y).float().mean() > (known[0](**rows).argmax(1) == y).float().mean() - 0.05


def test_tokens_that_the_model_s_own_type_cannot_hold_are_refused():
    ids = torch.randint(0, 400, (300, 12), generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    with pytest.raises(ValueError, match="put as uint8 to 'input', which some tokens of samples exceed"):
        service(network, ids, sample=ids[:4].clamp(max=255).to(torch.uint8))
