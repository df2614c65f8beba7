"""`verify(probes=)`: a mark of `response` read on other inputs, which explores and proves nothing to others."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from responding import KEY, PROBES, answers, bent_network, labels_of, network, served, service

from wmengine import Key, Watermark, export_onnx, scheme, verify
from wmengine.judging.exploring import explored
from wmengine.judging.verification import verify_all
from wmengine.parts.base import Task
from wmengine.parts.responses.bases import COUNTED
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = np.random.default_rng(8).random((1500, 1, 8, 8)).astype(np.float32)


def mark() -> Watermark:
    return served().watermark()


@cache
def in_two_views() -> Watermark:
    return service(scheme=scheme("response", probes=512, views=2), controls=[network(9)]).watermark()


@pytest.mark.parametrize("made", [mark, in_two_views])
def test_on_its_own_probes_it_says_what_the_mark_says(made):
    own = to_input(made().arrays["probes"], made().parameters["value_range"])
    controls = [network(), network(9)][: made().parameters["controls"]]
    first, second = (verify(served(), made(), **more) for more in ({}, {"probes": own, "controls": controls}))
    assert second.log10_p == pytest.approx(first.log10_p, abs=1e-6)
    assert (second.queries, first.queries) == (1024, 1024)
    assert second.sha256 == first.sha256


def test_other_probes_read_the_mark_from_scores_and_labels_and_nothing_in_a_stranger():
    given = {"probes": torch.from_numpy(OTHERS), "controls": (network(), network(9))}
    for suspect in (bent_network(mark()), labels_of(bent_network(mark()))):
        found = verify(suspect, mark(), key=KEY, **given)
        assert (found.decision, found.queries, found.derivation) == ("owned", 1500, "checked")
        assert any("1500 probes, and 2 networks" in note and "convinces nobody else" in note for note in found.notes)
    assert verify(bent_network(mark()), mark(), test="sequential", **given).queries < 1500
    stranger = verify(network(11), mark(), **given)
    assert (stranger.decision, stranger.log10_p > -3.0) == ("not_proven", True)


def test_a_verdict_says_of_the_networks_given_and_not_of_the_mark_s_own_and_other_probes_are_another_setting():
    found = [
        verify(served(), in_two_views(), probes=probes, controls=[network()])
        for probes in (OTHERS[:200], OTHERS[:200], OTHERS[1:201])
    ]
    assert any("200 probes, and 1 networks" in note for note in found[0].notes)
    assert not any("was made without controls" in note for note in found[0].notes)
    first, same, other = (each.settings["probes"] for each in found)
    assert first == same != other


def test_a_class_order_is_found_on_other_probes_too():
    order = np.random.default_rng(0).permutation(10)
    turned = verify(
        lambda rows: bent_network(mark())(rows)[:, order], mark(), classes="any", probes=OTHERS, controls=[network()]
    )
    assert turned.decision == "owned"


def test_marks_of_one_geometry_are_explored_once_and_each_has_its_own_symbols():
    asked = []

    def counting(rows):
        asked.append(len(rows))
        return answers(network())(rows)

    made = service(counting).watermark()
    marks = [made, *(made.with_message(KEY, f"customer-{number}") for number in range(4))]
    alone = []
    for several in (marks[:1], marks):
        asked.clear()
        found = verify_all(bent_network(mark()), several, probes=OTHERS, controls=[counting])
        alone.append(sum(asked))
    assert alone[0] == alone[1]
    assert len({each.matched for each in found}) > 1


def test_texts_are_explored_with_their_masks():
    ids = torch.randint(1, COUNTED, (900, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.randint(4, 13, (900, 1), generator=torch.Generator().manual_seed(1))).long()
    texts = {"input_ids": ids * mask, "attention_mask": mask}
    torch.manual_seed(0)
    table = torch.randn(COUNTED, 10)

    def reader(given):
        ids, mask = (torch.as_tensor(given[name]) for name in ("input_ids", "attention_mask"))
        return 2.0 * (table[ids] * mask[..., None]).sum(1).numpy()

    first, others = ({name: rows[part] for name, rows in texts.items()} for part in (slice(0, 500), slice(500, 900)))
    marked = service(reader, sample=first, probes=first, value_range=None, strength=1.0)
    turned = {name: others[name] for name in reversed(others)}
    found = verify(marked, marked.watermark(), probes=turned, controls=[reader])
    assert (found.decision, found.queries) == ("owned", 400)
    assert verify(reader, marked.watermark(), probes=others, controls=[reader]).decision == "not_proven"


def test_the_base_may_be_a_file_and_the_mark_one_with_a_pool_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("wmengine.marks.pools.MOST_INSIDE", 0)
    mark().save(tmp_path / "a.wm", "correct horse")
    export_onnx(network(), torch.from_numpy(PROBES[:8]), tmp_path / "base.onnx")
    given = {"probes": OTHERS, "controls": [tmp_path / "base.onnx"], "passphrase": "correct horse"}
    assert verify(bent_network(mark()), tmp_path / "a.wm", **given).decision == "owned"


def another_last_layer():
    model = deepcopy(network())
    with torch.no_grad():
        model[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probes": OTHERS}, "needs controls=, a list"),
        ({"probes": OTHERS, "controls": network()}, "needs controls=, a list"),
        ({"controls": [network()]}, "controls= are for probes="),
        ({"probes": OTHERS, "controls": [network(9)]}, "not the base of detector-v3"),
        ({"probes": OTHERS, "controls": [another_last_layer()]}, "not the base of detector-v3"),
        ({"probes": OTHERS[:63], "controls": [network()]}, "must be 64 to [0-9,]+, and there are 63"),
        ({"probes": OTHERS[:, :, :4], "controls": [network()]}, r"probes= must be input \[n, 1, 8, 8\]"),
        ({"probes": {"x": OTHERS}, "controls": [network()]}, r"probes= must be input \[n, 1, 8, 8\]"),
        ({"probes": np.where(OTHERS > 0.99, np.nan, OTHERS), "controls": [network()]}, "NaN or Inf"),
        ({"probes": OTHERS > 0.5, "controls": [network()]}, "floating inputs"),
        ({"probes": OTHERS * 255, "controls": [network()]}, "lie outside value_range="),
        ({"probes": OTHERS, "controls": [network()], "adversarial": True, "key": KEY}, "takes no probes="),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        verify(served(), mark(), **given)


def test_probes_outside_the_range_make_no_mark_either():
    with pytest.raises(ValueError, match="lie outside value_range="):
        service(probes=PROBES * 255)


def test_only_marks_in_ordinary_answers_take_other_probes_and_what_explores_is_neither_saved_nor_judged(tmp_path):
    preset = scheme("adi", count=10)
    task = Task({"input": InputSpec((1, 8, 8), "float32")}, 10, [(0.0, 1.0)])
    triggers = Watermark.create(Key("a", bytes(32)), preset, preset.describe(task, "model"))
    with pytest.raises(ValueError, match="probes= is for marks that ordinary inputs are asked for, and model is 'adi'"):
        verify(network(), triggers, probes=OTHERS, controls=[network()])
    (other,) = explored([mark()], OTHERS, [network()])
    with pytest.raises(ValueError, match="save the one that it was made of"):
        other.save(tmp_path / "a.wm")
    with pytest.raises(TypeError, match="must be a Watermark or a path, and it is Explored"):
        verify(network(), other)
    assert verify_all(network(), [], probes=OTHERS, controls=[network()]) == []
