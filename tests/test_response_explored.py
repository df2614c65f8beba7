"""`verify(probes=)`: a mark of `response` read on other inputs, which explores and proves nothing to others."""

import numpy as np
import pytest
import torch
from responding import KEY, PROBES, bent_network, labels_of, network, served

from wmengine import Key, Watermark, export_onnx, scheme, verify
from wmengine.judging.exploring import explored
from wmengine.parts.base import Task
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = np.random.default_rng(8).random((1500, 1, 8, 8)).astype(np.float32)


def mark() -> Watermark:
    return served().watermark()


def test_on_its_own_probes_it_says_what_the_mark_says():
    own = to_input(mark().arrays["probes"], mark().parameters["value_range"])
    first, second = (verify(served(), mark(), **more) for more in ({}, {"probes": own, "controls": [network()]}))
    assert second.log10_p == pytest.approx(first.log10_p, abs=1e-6)
    assert (second.settings["probes"], second.queries, "probes" in first.settings) == (1024, first.queries, False)


def test_other_probes_read_the_mark_from_scores_and_labels_and_nothing_in_a_stranger():
    given = {"probes": torch.from_numpy(OTHERS), "controls": [network(), network(9)]}
    for suspect in (bent_network(mark()), labels_of(bent_network(mark()))):
        found = verify(suspect, mark(), **given)
        assert found.decision == "owned"
        assert found.queries == 1500
        assert any("chosen by the claimant after marking" in note for note in found.notes)
        assert any("2 unmarked controls" in note for note in found.notes)
    assert verify(bent_network(mark()), mark(), test="sequential", **given).queries < 1500
    stranger = verify(network(11), mark(), **given)
    assert (stranger.decision, stranger.log10_p > -3.0) == ("not_proven", True)


def test_the_base_may_be_a_file(tmp_path):
    export_onnx(network(), torch.from_numpy(PROBES[:8]), tmp_path / "base.onnx")
    found = verify(bent_network(mark()), mark(), probes=OTHERS, controls=[tmp_path / "base.onnx"])
    assert found.decision == "owned"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probes": OTHERS}, "needs controls="),
        ({"controls": [network()]}, "controls= are for probes="),
        ({"probes": OTHERS, "controls": [network(9)]}, "not the base of this mark"),
        ({"probes": OTHERS[:63], "controls": [network()]}, "must be 64 or more, and there are 63"),
        ({"probes": OTHERS[:, :, :4], "controls": [network()]}, r"probes= must be input \[n, 1, 8, 8\]"),
        ({"probes": {"x": OTHERS}, "controls": [network()]}, r"probes= must be input \[n, 1, 8, 8\]"),
        ({"probes": np.where(OTHERS > 0.99, np.nan, OTHERS), "controls": [network()]}, "NaN or Inf"),
        ({"probes": OTHERS > 0.5, "controls": [network()]}, "floating inputs"),
        ({"probes": OTHERS, "controls": [network()], "adversarial": True, "key": KEY}, "takes no probes="),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        verify(served(), mark(), **given)


def test_only_marks_in_ordinary_answers_take_other_probes_and_what_explores_is_not_saved(tmp_path):
    preset = scheme("adi", count=10)
    task = Task({"input": InputSpec((1, 8, 8), "float32")}, 10, [(0.0, 1.0)])
    triggers = Watermark.create(Key("a", bytes(32)), preset, preset.describe(task, "model"))
    with pytest.raises(ValueError, match="probes= is for marks that ordinary inputs are asked for, and model is 'adi'"):
        verify(network(), triggers, probes=OTHERS, controls=[network()])
    with pytest.raises(ValueError, match="save the one that it was made of"):
        explored(mark(), OTHERS, [network()]).save(tmp_path / "a.wm")
