"""What the Embedder promises: two changed lines mark a model, marks go on, and what cannot work is refused at once."""

import copy
import warnings

import numpy as np
import pytest
import torch
from embedding import CLASSES, KEY, batch, embedder, network, small, train, unproven
from torch import nn

import wmengine
from wmengine.judging import judge
from wmengine.marking import embedder as home

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def marked():
    """(model, embedder, base): one training with both marks, and the model before it."""
    model = network()
    base = copy.deepcopy(model)
    emb = embedder(model)
    return train(model, emb, 100), emb, base


def test_two_changed_lines_embed_both_marks_and_the_task_is_learned(marked):
    model, emb, base = marked
    sketch, adi = emb.watermarks()
    for mark in (sketch, adi):
        verdict = wmengine.verify(model, mark, key=KEY)
        assert (verdict.decision, verdict.derivation) == ("owned", "checked")
        assert not wmengine.verify(base, mark).owned
    assert wmengine.verify(model, sketch).matched == sketch.total == 64, "the bits reach their margin"
    x, y = batch(200, seed=5)
    with torch.no_grad():
        assert (model.eval()(x).argmax(dim=1) == y).float().mean() > 0.97


def test_another_keys_marks_stay_at_chance(marked):
    model, _, _ = marked
    other = wmengine.Embedder(
        model, wmengine.Key("Other", bytes(32)), small(), num_classes=CLASSES, sample=batch(64)[0], name="theirs"
    )
    with pytest.warns(UserWarning, match="does not prove itself"):
        marks = other.watermarks()
    assert not any(wmengine.verify(model, mark).owned for mark in marks)


def test_uchidas_scheme_embeds_its_bits_in_one_weight():
    model = network(seed=2)
    emb = embedder(model, [wmengine.scheme("uchida", bits=64)], num_classes=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        emb.regulariser().backward()
        optimizer.step()
    (mark,) = emb.watermarks()
    assert mark.parameters["carriers"] == [[64, 512]]
    assert mark.names == ("8",)
    assert wmengine.verify(model, mark).matched == 64


def test_a_key_is_taken_from_its_file(tmp_path):
    KEY.save(tmp_path / "acme.key")
    emb = wmengine.Embedder(
        network(), tmp_path / "acme.key", small(), num_classes=CLASSES, sample=batch(64)[0], name="test-model"
    )
    assert [mark.commitment for mark in unproven(emb)] == [mark.commitment for mark in unproven(embedder(network()))]


def test_marks_are_judged_by_the_judge_of_verify(monkeypatch):
    """At the beginning and at the end, all marks together, and with no question of its own."""
    asked = []

    def spy(suspect, marks, terms):
        asked.append([mark.scheme for mark in marks])
        return judge.judge_suspect(suspect, marks, terms)

    monkeypatch.setattr(home, "judge_suspect", spy)
    emb = embedder(network())
    unproven(emb)
    assert asked == [["sketch", "adi"]] * 2


# Going on


def test_registered_marks_go_on_as_they_are(marked, tmp_path):
    """Their baseline is the one of the model before it was marked, and their training ends owned again."""
    model, emb, base = marked
    sketch, adi = emb.watermarks()
    adi.save(tmp_path / "adi.wm")
    tuned = copy.deepcopy(model)
    again = wmengine.Embedder(tuned, sample=batch(64)[0], marks=[sketch, tmp_path / "adi.wm"])
    train(tuned, again, 3, seed=4)
    found = again.watermarks()
    assert [mark.commitment for mark in found] == [sketch.commitment, adi.commitment]
    assert again.num_classes == CLASSES
    for before, after in zip((sketch, adi), found, strict=True):
        verdict = wmengine.verify(base, before)
        assert after.baseline == before.baseline == {
            "matched": verdict.matched,
            "total": verdict.total,
            "log10_p": f"{verdict.log10_p:.4f}",
        }  # fmt: skip
        after.check_derivation(KEY)
        assert wmengine.verify(tuned, after, key=KEY).owned


def test_a_model_that_holds_the_mark_already_is_not_marked_anew(marked):
    """A baseline of a marked model would be no baseline."""
    with pytest.raises(ValueError, match=r"holds the mark 'sketch' already \(64 of 64 symbols match\): give marks="):
        embedder(marked[0])


def test_options_of_training_steer_it_and_are_given_again_to_go_on():
    """They are no part of a mark: a forger could turn them for free."""
    model = network()
    strong = [wmengine.scheme("sketch", bits=64, strength=0.5, margin=1.0)]
    emb, weak = embedder(model, strong), embedder(model, [wmengine.scheme("sketch", bits=64)])
    (mark,) = unproven(emb)
    assert mark.commitment == unproven(weak)[0].commitment
    again, other = (
        wmengine.Embedder(model, sample=batch(64)[0], marks=[mark], schemes=schemes) for schemes in (strong, None)
    )
    assert again.regulariser() == emb.regulariser() > 10 * weak.regulariser()
    assert other.regulariser() == weak.regulariser()
    with pytest.raises(ValueError, match="how these are trained, and none is of 'adi'"):
        wmengine.Embedder(model, sample=batch(64)[0], marks=[mark], schemes=["adi"])


def drawn(emb, steps):
    return [torch.cat([*map(torch.flatten, emb.mix(*batch(24, seed=step)))]) for step in range(steps)]


def test_state_dict_resumes_the_order_of_triggers_exactly(tmp_path):
    model = network()
    emb = embedder(model)
    marks = unproven(emb)
    drawn(emb, 5)
    torch.save(emb.state_dict(), tmp_path / "state.pt")
    expected = drawn(emb, 40)  # several passes
    again = wmengine.Embedder(model, sample=batch(64)[0], marks=marks)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn(again, 40), expected, strict=True))
    fresh = wmengine.Embedder(model, sample=batch(64)[0], marks=marks)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(drawn(fresh, 40), expected, strict=True))


def test_the_state_of_other_marks_is_refused():
    state = embedder(network(), name="another").state_dict()
    emb = embedder(network())
    for strange in (state, {}, None):
        with pytest.raises(ValueError, match="this state is of other marks"):
            emb.load_state_dict(strange)
    with pytest.raises(ValueError, match="this is no state of the mark 'adi': KeyError"):
        emb.load_state_dict({name: {} for name in emb.state_dict()})
    for broken in ({"queue": torch.tensor([40])}, {"queue": torch.zeros(3)}, {"generator": torch.zeros(3).byte()}):
        with pytest.raises(ValueError, match="this is no state of the mark 'adi': "):
            emb.load_state_dict({name: {**held, **broken} for name, held in emb.state_dict().items()})


def test_two_embedders_share_no_state():
    """Of one model and one key: what the one draws, sees and forgets is nothing to the other."""
    model = network()
    first, second, alone = embedder(model), embedder(model), embedder(network())
    drawn(first, 7)
    _, y = first.mix(*batch(512))
    first.loss(torch.zeros(len(y), CLASSES), y)
    assert first.metrics
    assert second.metrics == {}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn(second, 9), drawn(alone, 9), strict=True))


def test_marks_of_another_model_or_other_inputs_do_not_go_on(marked):
    marks = marked[1].watermarks()
    with pytest.raises(ValueError, match=r"is for inputs .* and the sample holds"):
        wmengine.Embedder(network(), sample=torch.zeros(2, 1, 9, 9), marks=marks)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, CLASSES))
    with pytest.raises(ValueError, match="'sketch' is of a model with other weights"):
        wmengine.Embedder(other, sample=batch(64)[0], marks=marks[:1])
    activations = unproven(embedder(network(), [wmengine.scheme("deepsigns", bits=64)], num_classes=None))
    for model in (other, nn.Sequential(*list(network())[:8])):
        with pytest.raises(ValueError, match="'deepsigns' is of a model with other weights"):
            wmengine.Embedder(model, sample=batch(64)[0], marks=activations)
    with pytest.raises(ValueError, match="is of 4 classes, and num_classes is 5"):
        wmengine.Embedder(network(), sample=batch(64)[0], marks=marks, num_classes=5)


# What it tells


def test_a_mark_that_does_not_prove_itself_is_warned_about(marked):
    with pytest.warns(UserWarning, match=r"the mark 'sketch' does not prove itself on this model: \d+ of 64"):
        embedder(network(), [wmengine.scheme("sketch", bits=64)]).watermarks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked[1].watermarks()


def test_watermarks_come_in_the_order_of_the_schemes_and_survive_their_file(marked, tmp_path):
    model, emb, _ = marked
    marks = emb.watermarks()
    assert [mark.scheme for mark in marks] == ["sketch", "adi"]
    assert [mark.scheme for mark in unproven(embedder(network(), small()[::-1]))] == ["adi", "sketch"]
    for mark in marks:
        mark.check_derivation(KEY)
        mark.save(tmp_path / f"{mark.scheme}.wm")
        assert wmengine.verify(model, tmp_path / f"{mark.scheme}.wm", key=KEY).owned


def test_two_models_of_one_owner_share_nothing():
    first, second = (unproven(embedder(network(), name=name)) for name in ("one", "two"))
    for one, two in zip(first, second, strict=True):
        assert not any(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_a_message_changes_the_symbols_and_nothing_else():
    plain, sold = (unproven(embedder(network(), message=message)) for message in (None, "sold to B"))
    for one, two in zip(plain, sold, strict=True):
        assert (one.geometry, two.message) == (two.geometry, "sold to B")
        assert not np.array_equal(one.symbols, two.symbols)


# What it refuses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be from 2 to .*, and it is 1"),
        ({"num_classes": 4.0}, ValueError, "num_classes must be an integer, and it is 4.0"),
        ({"num_classes": None}, ValueError, "scheme 'adi': it needs num_classes, the width of the model's logits"),
        ({"num_classes": 7}, ValueError, "answers with 4 classes and the watermark has 7.*is num_classes right"),
        ({"sample": np.zeros((4, 1, 8, 8), np.float32)}, TypeError, "sample must be a tensor.*ndarray"),
        ({"sample": torch.zeros(4, 1, 8, 8, dtype=torch.complex64)}, TypeError, "sample must be a tensor.*complex64"),
        ({"sample": {"a": torch.zeros(4, 8), "b": [1.0]}}, TypeError, r"sample\['b'\] must be a tensor.*list"),
        ({"sample": {}}, ValueError, "sample must hold at least one input"),
        ({"sample": torch.zeros(8)}, ValueError, r"sample must be a batch \[n, ...\]"),
        ({"sample": torch.zeros(0, 1, 8, 8)}, ValueError, "at least one row"),
        ({"sample": torch.full((4, 1, 8, 8), torch.nan)}, ValueError, "sample holds NaN or Inf"),
        ({"sample": torch.ones(4, 1, 8, 8)}, ValueError, "value_range is so narrow"),
        ({"value_range": [(0, 1), (0, 1)]}, ValueError, "one pair for each of the 1 channels"),
        ({"value_range": 3}, ValueError, r"value_range must be \(lo, hi\) or one pair .*, and it is 3"),
        ({"value_range": [(0, 1), 2]}, ValueError, r"value_range must be \(lo, hi\)"),
        ({"value_range": (0, 10**400)}, ValueError, r"value_range must be \(lo, hi\)"),
        ({"value_range": (0, 1e308)}, ValueError, "value_range must be finite in float32"),
        ({"value_range": (1, 0)}, ValueError, "lo must not exceed hi"),
        ({"chosen": []}, ValueError, "schemes must be a list"),
        ({"chosen": "sketch"}, ValueError, "schemes must be a list"),
        ({"chosen": ["sketsch"]}, ValueError, "there is no scheme 'sketsch'; the schemes are sketch"),
        ({"chosen": ["sketch", 3]}, TypeError, "one is 3"),
        ({"chosen": ["adi", wmengine.scheme("adi", count=50)]}, ValueError, "each scheme can be embedded once"),
        ({"chosen": [wmengine.scheme("sketch", bits=4096)]}, ValueError, r"needs at least \d+ carrier values for 4096"),
        ({"chosen": [wmengine.scheme("uchida", bits=1024)]}, ValueError, "1 carriers hold 512; ask for fewer"),
        ({"chosen": 3}, ValueError, "schemes must be a list"),
        ({"sample": torch.zeros(4, 8, 8)}, ValueError, r"the model does not run on inputs torch.float32 \[1, 8, 8\]"),
        ({"sample": torch.zeros(4, 1, 8, 8).double()}, ValueError, "does not run on inputs torch.float64"),
        ({"sample": torch.zeros(4, 1, 8, 8).long()}, ValueError, "does not run on inputs torch.int64"),
        ({"controls": ["clean.onnx"]}, TypeError, "a model must be a torch.nn.Module, and str is none"),
        ({"name": ""}, ValueError, "name"),
        ({"name": None}, ValueError, "a new mark needs key, schemes and name"),
        ({"marks": []}, ValueError, "leave key, name and message out"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, error, message):
    with pytest.raises(error, match=message):
        embedder(network(), **options)


@pytest.mark.parametrize("model", [None, "model.onnx", lambda x: x])
def test_what_is_no_module_is_no_model(model, tmp_path):
    with pytest.raises(TypeError, match=r"a model must be a torch.nn.Module, and (NoneType|str|function) is none"):
        embedder(model)
    with pytest.raises(TypeError, match="a model must be"):
        wmengine.export_onnx(model, batch(1)[0], tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="a model must be"):
        embedder(network()).watermarks(model or "none")


@pytest.mark.parametrize("key", [3, bytes(32)])
def test_a_key_is_a_key_or_a_path_and_is_not_printed(key):
    with pytest.raises(TypeError, match=r"key must be a Key or the path of its file, and (int|bytes) is neither"):
        wmengine.Embedder(network(), key, small(), num_classes=CLASSES, sample=batch(64)[0], name="test-model")


def test_a_key_or_a_mark_that_is_not_there_is_named(tmp_path):
    options = {"num_classes": CLASSES, "sample": batch(64)[0]}
    with pytest.raises(ValueError, match=r"none.key does not exist; give the path of a key file"):
        wmengine.Embedder(network(), tmp_path / "none.key", small(), name="test-model", **options)
    with pytest.raises(ValueError, match=r"none.wm does not exist; give the path of a watermark file"):
        wmengine.Embedder(network(), marks=tmp_path / "none.wm", **options)
    with pytest.raises(TypeError, match="marks= must hold Watermarks or paths of their files, and one is 3"):
        wmengine.Embedder(network(), marks=[3], **options)


def test_no_marks_to_go_on_with_are_none():
    with pytest.raises(ValueError, match="marks= is empty"):
        wmengine.Embedder(network(), sample=batch(64)[0], marks=[])


def test_a_model_without_weights_to_mark_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64))
    with pytest.raises(ValueError, match="this network trains none"):
        embedder(model, ["sketch"], num_classes=64)
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="this network trains none"):
        embedder(frozen, ["sketch"])


def test_frozen_layers_carry_nothing():
    model = network()
    model[3].weight.requires_grad_(False)
    (mark,) = unproven(embedder(model, [wmengine.scheme("sketch", bits=64)]))
    assert mark.parameters["carriers"] == [[16, 1, 3, 3], [64, 512], [4, 64]]
    assert mark.parameters["carrier_indices"] == [0, 2, 3]  # places among all layers, frozen ones too
    (mark,) = unproven(embedder(model, [wmengine.scheme("sketch", bits=64, marked=2)]))
    assert mark.parameters["carriers"] == [[64, 512]]
    with pytest.raises(ValueError, match="is to mark weight 1, which is not trained"):
        embedder(model, [wmengine.scheme("sketch", bits=64, marked=1)])


def test_a_model_that_does_not_answer_is_refused():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            self.inner(x)

    with pytest.raises(ValueError, match=r"cannot be judged by its mark 'adi'.*do its answers hold logits"):
        embedder(Silent())
