"""What a verdict promises: an exact p-value, a stated bar, `error` for the suspect's faults and exceptions for ours."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from judged import KEY, OTHER, Stub, black_box, by_heart, images, one_hot, white_box
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import wmengine
from wmengine import ops
from wmengine.errors import KeyFileError, SuspectGone, WatermarkError
from wmengine.judging.verdict import ADVERSARIAL_ALPHA
from wmengine.judging.verification import verify, verify_all
from wmengine.parts.statistics.tails import binomial_log10_tail, threshold
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import Adapter

SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 60
# In order of execution: two convolutions of equal shape, and a linear layer.
CARRIERS = [(8, 8, 3, 3), (8, 8, 3, 3), (10, 72)]
BITS = 128
HALF = math.log10(2)  # each of two statistics has half of the evidence

MARK, BIT_MARK = black_box(SHAPE, CLASSES, COUNT), white_box(CARRIERS, bits=BITS)


def marked_weights(mark=BIT_MARK, strength=3.0):
    """Weights that hold a white-box mark: noise plus the adjoint of the bits, the direction that training takes."""
    generator = np.random.default_rng(0)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    weights = []
    for shape, key in zip(mark.parameters["carriers"], mark.arrays["carrier_keys"], strict=True):
        size = math.prod(shape)
        direction = ops.sketch_adjoint(signs, int(key), size)
        noise = generator.normal(size=size).astype(np.float32)
        weights.append((noise + strength * direction / direction.std()).reshape(shape))
    return weights


def network(weights, transform=None, extra_first=()):
    """An ONNX graph of convolutions and one Gemm over [N, 8, 5, 5]; only its weights matter."""
    nodes, initializers, value = [], [], "x"
    for index, weight in enumerate([*extra_first, *weights]):
        weight = transform(weight) if transform else weight
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"val_{index}"))
        if weight.ndim == 4:
            nodes.append(helper.make_node("Conv", [value, f"val_{index}"], [f"h{index}"], pads=[1, 1, 1, 1]))
        else:
            nodes.append(helper.make_node("Flatten", [value], ["flat"]))
            nodes.append(helper.make_node("Gemm", ["flat", f"val_{index}"], [f"h{index}"], transB=1))
        value = f"h{index}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8, 3, 3])]
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def save(tmp_path):
    def write(model, name="suspect.onnx"):
        path = tmp_path / name
        path.write_bytes(model.SerializeToString())
        return path

    return write


def copy_of(mark, right=COUNT, labels_only=False):
    """A suspect that has learned the first `right` triggers and answers wrongly to the others."""
    labels = (mark.arrays["labels"] + (np.arange(mark.total) >= right)) % CLASSES
    return by_heart(mark, labels if labels_only else one_hot(labels))


# --- black-box --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels_only", [False, True])
def test_the_p_value_is_the_exact_tail_and_the_bar_is_alpha(labels_only):
    """Answers that say which class, and nothing of the others, are worth their matches in either statistic."""
    needed = threshold(COUNT, 1 / CLASSES, -9 - HALF)
    for right, decision in [(COUNT, "owned"), (needed, "owned"), (needed - 1, "not_proven"), (0, "not_proven")]:
        verdict = verify(copy_of(MARK, right, labels_only), MARK)
        assert (verdict.decision, verdict.matched, verdict.total, verdict.queries) == (decision, right, COUNT, COUNT)
        assert verdict.log10_p == pytest.approx(min(0, binomial_log10_tail(right, COUNT, 1 / CLASSES) + HALF), rel=1e-9)
        assert verdict.owned == (decision == "owned")
    assert verify(copy_of(MARK, needed), MARK, alpha=1e-30).decision == "not_proven"


def test_a_verdict_says_what_was_judged_and_is_json():
    verdict = verify(copy_of(MARK, labels_only=True), MARK)
    fields = json.loads(verdict.to_json())
    assert fields.pop("seconds") == verdict.seconds > 0
    assert fields.pop("notes") == list(verdict.notes)
    assert [each["code"] for each in fields.pop("facts")] == ["not_derived"]
    assert fields.pop("evidence")["asked"] == COUNT
    assert fields == {
        "suspect": "callable <lambda>",
        "sha256": None,
        "watermark": "detector",
        "message": None,
        "commitment": MARK.commitment,
        "scheme": "adi",
        "null": "exact",
        "decision": "owned",
        "matched": COUNT,
        "total": COUNT,
        "queries": COUNT,
        "log10_p": pytest.approx(HALF - COUNT, rel=1e-9),
        "log10_p_corrected": verdict.log10_p,
        "log10_e": pytest.approx(COUNT - HALF - 2 * math.log10(COUNT * math.log(10)), abs=0.1),
        "q_value": None,
        "tests": 1,
        "alpha": 1e-9,
        "derivation": "not_checked",
        "settings": {"test": "fixed", "classes": "same", "isolation": "persistent", "device": "cpu"},
        "engine": wmengine.__version__,
        "error": None,
    }


def test_answers_that_are_no_numbers_are_misses_and_noted():
    right = copy_of(MARK)

    def abstains(x):
        answers = right(x)
        answers[: len(x) // 2, 3] = np.nan
        answers[-1, 0] = np.inf
        return answers

    verdict = verify(abstains, MARK)
    lost = sum(len(x) // 2 + 1 for x in (range(32), range(COUNT - 32)))
    assert verdict.matched == COUNT - lost
    assert f"{lost} of {COUNT} answers hold NaN or Inf or name no class, and count as misses" in verdict.notes


def test_the_suspects_faults_are_errors_with_one_sentence(tmp_path, save):
    (tmp_path / "text.onnx").write_text("hello")
    suspects = {
        "has 10": lambda x: np.zeros((len(x), 7)),
        "it broke": lambda x: (_ for _ in ()).throw(RuntimeError("it broke")),
        "text.onnx": tmp_path / "text.onnx",
        "[N, 8, 3, 3] and the watermark's triggers are [N, 1, 4, 4]": save(network(marked_weights())),
        "directory": tmp_path,
        "7 classes and the watermark has 10": Stub(lambda rows: np.zeros((len(rows), 7), np.float32)),
        "answers [8, 10]": Stub(lambda rows: np.zeros((8, 10), np.float32)),
        "no attribute 'values'": Stub(lambda rows: rows.tolist()),
    }
    for said, suspect in suspects.items():
        verdict = verify(suspect, MARK)
        assert (verdict.decision, verdict.matched, verdict.queries, verdict.log10_p) == ("error", 0, 0, 0.0)
        assert said in verdict.error
        assert "\n" not in verdict.error
        assert not verdict.owned
        json.loads(verdict.to_json())


def test_the_callers_mistakes_raise(tmp_path):
    right = copy_of(MARK)
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx does not exist"):
        verify(tmp_path / "gone.onnx", MARK)
    with pytest.raises(TypeError, match="a suspect is"):
        verify(7, MARK)
    with pytest.raises(TypeError, match="watermark must be"):
        verify(right, {"scheme": "adi"})
    with pytest.raises(TypeError, match="key must be"):
        verify(right, MARK, key=b"secret")
    with pytest.raises(WatermarkError, match=r"gone\.wm"):
        verify(right, tmp_path / "gone.wm")
    with pytest.raises(KeyFileError, match=r"gone\.key"):
        verify(right, MARK, key=tmp_path / "gone.key")
    for alpha in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            verify(right, MARK, alpha=alpha)
    with pytest.raises(ValueError, match="test must be one of fixed, sequential, and it is 'all'"):
        verify(right, MARK, test="all")
    with pytest.raises(ValueError, match="key="):
        verify(right, MARK, adversarial=True)


def test_files_serve_as_well_as_objects(tmp_path):
    KEY.save(tmp_path / "acme.key", "open sesame")
    MARK.save(tmp_path / "acme.wm", "open sesame")
    verdict = verify(copy_of(MARK), tmp_path / "acme.wm", key=tmp_path / "acme.key", passphrase="open sesame")
    assert (verdict.decision, verdict.derivation) == ("owned", "checked")
    with pytest.raises(WatermarkError, match=r"acme\.wm"):
        verify(copy_of(MARK), tmp_path / "acme.wm", passphrase="open barley")


# --- several marks ----------------------------------------------------------------------------------------------------


def test_several_watermarks_open_a_suspect_once_and_each_is_judged_for_itself(monkeypatch, save):
    opened = []
    monkeypatch.setattr(
        "wmengine.judging.verification.open_suspect", lambda *given: opened.append(open_suspect(*given)) or opened[-1]
    )
    marks = [BIT_MARK, white_box(CARRIERS, bits=BITS, message="for somebody else"), white_box(CARRIERS, key=OTHER)]
    path = save(network(marked_weights()))
    verdicts = verify_all(path, marks)
    assert len(opened) == 1
    assert [verdict.decision for verdict in verdicts] == ["owned", "not_proven", "not_proven"]
    assert [verdict.message for verdict in verdicts] == [None, "for somebody else", None]
    for verdict, mark in zip(verdicts, marks, strict=True):
        alone = verify(path, mark)
        assert (verdict.log10_p, verdict.matched, verdict.tests) == (alone.log10_p, alone.matched, 1)
    assert verify_all(copy_of(MARK), []) == []


def test_marks_of_other_tasks_do_not_mind_each_other():
    """The suspect is of the first mark's task, and cannot be judged by the others."""
    marks = [MARK, black_box(SHAPE, 7), black_box((1, 5, 5)), BIT_MARK]
    known = {row.tobytes(): label for row, label in zip(images(MARK), one_hot(MARK.arrays["labels"]), strict=True)}

    def answer(rows):
        if rows.shape[1:] != SHAPE:
            raise RuntimeError("another shape")
        return np.stack([known.get(row.tobytes(), one_hot(0)) for row in rows])

    owned, *others = verify_all(answer, marks)
    assert owned.owned
    said = ["10 classes and the watermark has 7", "another shape", "no weights"]
    for words, verdict in zip(said, others, strict=True):
        assert verdict.decision == "error"
        assert words in verdict.error


def test_a_suspect_that_ends_while_it_is_asked_for_another_mark_stays_proven():
    marks = [MARK, black_box(SHAPE, CLASSES, COUNT, message="for somebody else")]
    right = copy_of(MARK)

    def ends(rows):
        if rows.ndim == 2:
            raise SuspectGone("killed by signal 11")
        return right(rows)

    ways = [Adapter(share=0.5), Adapter(layout="flat", share=0.5)]
    owned, other = verify_all(Stub(ends, ways=ways), marks)
    assert (owned.decision, owned.matched) == ("owned", COUNT)
    assert any("killed by signal 11" in note for note in owned.notes)
    assert (other.decision, other.error) == ("error", "killed by signal 11")


# --- trust ------------------------------------------------------------------------------------------------------------


def test_a_watermark_that_its_key_does_not_make_raises():
    forged = replace(MARK, arrays=MARK.arrays | {"labels": (MARK.arrays["labels"] + 1) % CLASSES})
    with pytest.raises(WatermarkError, match="labels"):
        verify(copy_of(MARK), forged, key=KEY)
    with pytest.raises(WatermarkError, match="not made with this key"):
        verify(copy_of(MARK), MARK, key=OTHER)


def test_an_unchecked_derivation_is_said():
    unchecked, checked = verify(copy_of(MARK), MARK), verify(copy_of(MARK), MARK, key=KEY)
    assert (unchecked.derivation, checked.derivation) == ("not_checked", "checked")
    assert any("not derived from its key" in note for note in unchecked.notes)
    assert not any("not derived from its key" in note for note in checked.notes)


def test_evidence_against_others_needs_two_to_the_minus_128():
    assert ADVERSARIAL_ALPHA == 2.0**-128
    needed = threshold(COUNT, 1 / CLASSES, math.log10(2.0**-128) - HALF)
    for right, decision in [(needed, "owned"), (needed - 1, "not_proven")]:
        verdict = verify(Stub(copy_of(MARK, right)), MARK, key=KEY, adversarial=True)
        assert (verdict.decision, verdict.alpha, verdict.derivation) == (decision, 2.0**-128, "checked")
        assert any("2^-128" in note and "timestamp" in note for note in verdict.notes)
    friendly = verify(copy_of(MARK, needed - 1), MARK, key=KEY)
    assert friendly.owned
    assert any(MARK.created in note for note in friendly.notes)
    assert not any(MARK.created in note for note in verify(copy_of(MARK, needed), MARK, key=KEY).notes)


# --- white-box --------------------------------------------------------------------------------------------------------


def test_bits_are_read_from_an_onnx_file_by_structure_alone(save):
    verdict = verify(save(network(marked_weights())), BIT_MARK)
    assert (verdict.decision, verdict.matched, verdict.total, verdict.queries) == ("owned", BITS, BITS, 0)
    assert verdict.log10_p == pytest.approx((1 - BITS) * math.log10(2), rel=1e-9)
    assert "3 of 3 carriers matched to the suspect's tensors by shape and order" in verdict.notes
    assert len(verdict.sha256) == 64


TRANSFORMS = {
    "float16": lambda weight: weight.astype(np.float16),
    "filters rescaled": lambda weight: weight * np.logspace(-3, 3, len(weight)).reshape(-1, *[1] * (weight.ndim - 1)),
    "pruned": lambda weight: np.where(np.abs(weight) > np.median(np.abs(weight)), weight, 0),
    "noisy": lambda weight: weight + np.random.default_rng(1).normal(size=weight.shape) * weight.std() / 2,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_mark_outlives_what_leaves_the_filters_directions(save, transform):
    model = network(marked_weights(), lambda weight: TRANSFORMS[transform](weight).astype(np.float32))
    assert verify(save(model), BIT_MARK).matched > 0.95 * BITS


def test_layers_of_equal_shape_are_told_apart_by_order(save):
    mark = white_box(CARRIERS[:2], bits=BITS)
    first, second = marked_weights(mark)
    assert verify(save(network([first, second])), mark).matched == BITS
    swapped = verify(save(network([second, first])), mark)
    assert abs(swapped.matched - BITS / 2) < 5 * math.sqrt(BITS) / 2


def test_a_mark_in_one_layer_is_found_among_its_equals(save):
    """The preset of Uchida et al.: one layer, the mean of its filters, a dense projection."""
    mark = white_box(CARRIERS, preset="uchida", bits=32, marked=1)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    mean = ops.project_adjoint(signs, int(mark.arrays["carrier_keys"][0]), 72, "gaussian")
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=shape).astype(np.float32) for shape in CARRIERS]
    weights[1] += 3 * mean.reshape(CARRIERS[1][1:]) / mean.std()
    verdict = verify(save(network(weights)), mark, alpha=1e-3)
    assert verdict.owned
    assert verdict.matched > 0.8 * 32
    assert any("2 of the 2 possible orders" in note for note in verdict.notes)
    assert not verify(save(network([weights[0], weights[0]])), mark, alpha=1e-3).owned


def test_a_marked_layer_is_found_at_its_recorded_place_among_more_equals_than_are_tried(save):
    shapes = [(4, 512)] * 80
    mark = white_box(shapes, preset="uchida", bits=64, marked=70)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    mean = ops.project_adjoint(signs, int(mark.arrays["carrier_keys"][0]), 512, "gaussian")
    weights = [np.random.default_rng(seed).normal(size=(4, 512)).astype(np.float32) for seed in range(80)]
    weights[70] += 9 * mean / mean.std()
    names = [f"w{index}" for index in range(80)]
    nodes = [helper.make_node("Gemm", ["x", name], [f"y{name}"], transB=1) for name in names]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 512])]
    outputs = [helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, None) for name in names]
    stored = [numpy_helper.from_array(weight, name) for weight, name in zip(weights, names, strict=True)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    verdict = verify(save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])), mark)
    assert verdict.owned
    assert verdict.evidence.log10_share == pytest.approx(-math.log10(65) - HALF)
    assert any("65 of the 80 possible orders" in note for note in verdict.notes)


def test_every_order_that_is_tried_is_paid_for(save):
    """An inserted layer of equal shape leaves three orders of two layers; the right one is found, at thrice the p."""
    inserted = np.random.default_rng(3).normal(size=CARRIERS[0]).astype(np.float32)
    verdict = verify(save(network(marked_weights(), extra_first=[inserted])), BIT_MARK)
    assert (verdict.decision, verdict.matched) == ("owned", BITS)
    assert verdict.log10_p == pytest.approx((1 - BITS) * math.log10(2) + math.log10(3), rel=1e-9)
    assert any("3 of the 3 possible orders" in note and "paid" in note for note in verdict.notes)


def test_each_layer_is_projected_once_for_each_carrier(save, monkeypatch):
    calls = []
    project = ops.carrier_projection
    monkeypatch.setattr(ops, "carrier_projection", lambda *arguments: calls.append(arguments) or project(*arguments))
    inserted = [np.random.default_rng(seed).normal(size=CARRIERS[0]).astype(np.float32) for seed in range(3)]
    verify(save(network(marked_weights(), extra_first=inserted)), BIT_MARK)
    assert len(calls) <= 2 * 5 + 1  # two carriers with five candidates, and the linear layer


def test_part_of_the_layers_is_enough_where_they_hold_enough(save):
    first, second, _ = marked_weights()
    verdict = verify(save(network([first, second])), BIT_MARK)
    assert verdict.owned
    assert "2 of 3 carriers matched to the suspect's tensors by shape and order" in verdict.notes


def test_no_tensor_of_a_carriers_shape_is_not_proven_with_nothing_tested(save):
    verdict = verify(save(network([np.ones((8, 8, 5, 5), np.float32)])), BIT_MARK)
    assert (verdict.decision, verdict.matched, verdict.total, verdict.log10_p) == ("not_proven", 0, 0, 0.0)
    assert any("no tensor" in note for note in verdict.notes)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_ties_and_what_is_no_number_match_nothing(save, value):
    weights = [np.full(shape, value, np.float32) for shape in CARRIERS]
    verdict = verify(save(network(weights)), BIT_MARK)
    assert (verdict.decision, verdict.matched, verdict.total) == ("not_proven", 0, BITS)


def test_a_stranger_and_another_key_match_about_half(save):
    marked, stranger = (
        save(network(marked_weights())),
        save(network(marked_weights(white_box(CARRIERS, key=OTHER, bits=BITS))), "other.onnx"),
    )
    for suspect, mark in [(stranger, BIT_MARK), (marked, white_box(CARRIERS, key=OTHER, bits=BITS))]:
        verdict = verify(suspect, mark)
        assert verdict.decision == "not_proven"
        assert abs(verdict.matched - BITS / 2) < 5 * math.sqrt(BITS) / 2


def test_a_modules_bits_are_read_in_order_of_execution():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(72, 10)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.first = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.head(self.second(self.first(x)).flatten(1))

    mark, module = BIT_MARK, Module()
    with torch.no_grad():
        for layer, weight in zip((module.first, module.second, module.head), marked_weights(mark), strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    verdict = verify(module, mark)
    assert (verdict.matched, verdict.suspect, verdict.sha256) == (BITS, "module Module", None)
    assert verify(module.half(), mark).matched == BITS


def test_a_white_box_mark_needs_weights_to_read():
    verdict = verify(copy_of(MARK), BIT_MARK)
    assert (verdict.decision, verdict.total) == ("error", BITS)
    assert "no weights" in verdict.error


def test_a_suspect_may_be_opened_once_for_many_marks(save):
    """And the notes of one verdict do not reach the next."""
    suspect = open_suspect(save(network(marked_weights(), lambda weight: weight.astype(np.float16))))
    verdicts = [verify(suspect, BIT_MARK) for _ in range(2)]
    assert verdicts[0].notes == verdicts[1].notes
    assert verdicts[0].matched == verdicts[1].matched == BITS
    assert verify(suspect, MARK).decision == "error"


# --- what is imported -------------------------------------------------------------------------------------------------


def loaded_by_verifying(suspect, mark):
    code = f"""
import sys
import wmengine
assert wmengine.verify({str(suspect)!r}, {str(mark)!r}).decision in ("owned", "not_proven")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_verifying_imports_only_what_it_needs(tmp_path, save):
    BIT_MARK.save(tmp_path / "bits.wm")
    MARK.save(tmp_path / "triggers.wm")
    weight = numpy_helper.from_array(np.ones((16, CLASSES), np.float32), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    answers = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "answers.onnx")
    # Nothing that parses or runs a stranger's bytes is even loaded: that happens in the sandbox.
    never = {"torch", "scipy", "matplotlib", "triton", "onnx", "onnx_ir", "onnxruntime", "google.protobuf"}
    assert not never & loaded_by_verifying(save(network(marked_weights())), tmp_path / "bits.wm")
    assert not never & loaded_by_verifying(answers, tmp_path / "triggers.wm")


def test_what_runs_in_this_process_convinces_nobody_else(save):
    """It could look for the expected symbols where they lie, in the memory of whoever verifies."""
    path = save(network(marked_weights()))
    torch = pytest.importorskip("torch")
    for suspect, isolation in [(lambda rows: rows, "persistent"), (torch.nn.Identity(), "persistent"), (path, "none")]:
        with pytest.raises(ValueError, match="could read the symbols"):
            verify(suspect, BIT_MARK, key=KEY, adversarial=True, isolation=isolation)
    assert verify(path, BIT_MARK, key=KEY, adversarial=True).decision != "error"


def test_how_an_endpoint_was_asked_is_said_to_be_the_claimants_choice():
    suspect = Stub(copy_of(MARK, COUNT), settings={"layout": "flat", "digest": "ab" * 32})
    verdict = verify(suspect, MARK, key=KEY)
    assert verdict.owned
    assert verdict.settings["layout"] == "flat"
    assert any(("ab" * 32) in note and "chosen by the claimant" in note for note in verdict.notes)
    assert not any("chosen by the claimant" in note for note in verify(Stub(copy_of(MARK, COUNT)), MARK).notes)
