"""What a verdict promises: an exact p-value, a stated bar, `error` for the suspect's faults and exceptions for ours."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from wmengine.key import Key
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.stats import binomial_log10_tail, threshold
from wmengine.triggers import to_input
from wmengine.verify import ADVERSARIAL_ALPHA, verify
from wmengine.watermark import Watermark

import wmengine
from wmengine import ops
from wmengine.errors import KeyFileError, WatermarkError
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import AS_RECORDED

KEY = Key("ACME Vision", bytes(range(32)))
OTHER = Key("ACME Vision", bytes(32))
SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 60
# In order of execution: two convolutions of equal shape, and a linear layer.
CARRIERS = [(8, 8, 3, 3), (8, 8, 3, 3), (10, 72)]
BITS = 128


def black_box(count=COUNT, key=KEY):
    parameters = black_box_parameters(scheme("adi", count=count), SHAPE, CLASSES, [[-1.0, 1.0]], "detector")
    return Watermark.create(key, "adi", parameters)


def white_box(carriers=CARRIERS, key=KEY, **options):
    parameters = white_box_parameters(scheme("sketch", bits=BITS, **options), carriers, SHAPE, "detector")
    return Watermark.create(key, "sketch", parameters)


MARK, BIT_MARK = black_box(), white_box()


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
    inputs = to_input(mark.arrays["triggers"], mark.parameters["value_range"])
    learned = {row.tobytes(): index for index, row in enumerate(inputs)}

    def answer(x):
        index = np.array([learned[row.tobytes()] for row in x])
        labels = (mark.arrays["labels"][index] + (index >= right)) % CLASSES
        return labels if labels_only else np.eye(CLASSES, dtype=np.float32)[labels]

    return answer


# --- black-box --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels_only", [False, True])
def test_the_p_value_is_the_exact_tail_and_the_bar_is_alpha(labels_only):
    needed = threshold(COUNT, 1 / CLASSES, -9)
    for right, decision in [(COUNT, "owned"), (needed, "owned"), (needed - 1, "not_proven"), (0, "not_proven")]:
        verdict = verify(copy_of(MARK, right, labels_only), MARK)
        assert (verdict.decision, verdict.matched, verdict.total, verdict.queries) == (decision, right, COUNT, COUNT)
        assert verdict.log10_p == binomial_log10_tail(right, COUNT, 1 / CLASSES)
        assert verdict.owned == (decision == "owned")
    assert verify(copy_of(MARK, needed), MARK, alpha=1e-30).decision == "not_proven"


def test_a_verdict_says_what_was_judged_and_is_json():
    verdict = verify(copy_of(MARK), MARK)
    fields = json.loads(verdict.to_json())
    assert fields.pop("seconds") == verdict.seconds > 0
    assert fields.pop("notes") == list(verdict.notes)
    assert fields == {
        "suspect": "callable answer",
        "sha256": None,
        "watermark": "detector",
        "scheme": "adi",
        "decision": "owned",
        "matched": COUNT,
        "total": COUNT,
        "queries": COUNT,
        "log10_p": pytest.approx(-COUNT, rel=1e-12),
        "evidence": {"test": "fixed", "matched": COUNT, "asked": COUNT, "chance": 0.1, "log10_share": 0.0},
        "derivation": "not_checked",
        "commitment": MARK.commitment,
        "alpha": 1e-9,
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
    }
    for said, suspect in suspects.items():
        verdict = verify(suspect, MARK)
        assert (verdict.decision, verdict.matched, verdict.queries, verdict.log10_p) == ("error", 0, 0, 0.0)
        assert said in verdict.error
        assert "\n" not in verdict.error
        assert not verdict.owned
        json.loads(verdict.to_json())


def test_a_suspect_with_another_number_of_classes_is_an_error_even_when_it_is_opened_first():
    class Open:
        name, sha256, notes = "open", None, []

        def adapters(self, trigger_shape, value_range, every=True):
            return [AS_RECORDED]

        def close(self):
            raise AssertionError("whoever opened it closes it")

        def query(self, inputs, num_classes=None):
            return np.zeros((len(inputs), 7), np.float32)

        def tensors(self, input_shape=None):
            return []

    assert "7 classes and the watermark has 10" in verify(Open(), MARK).error


def test_the_callers_mistakes_raise(tmp_path):
    right = copy_of(MARK)
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx does not exist"):
        verify(tmp_path / "gone.onnx", MARK)
    with pytest.raises(TypeError, match="a suspect is"):
        verify(7, MARK)
    with pytest.raises(TypeError, match="watermark must be"):
        verify(right, {"scheme": "adi"})
    with pytest.raises(WatermarkError, match=r"gone\.wm"):
        verify(right, tmp_path / "gone.wm")
    with pytest.raises(KeyFileError, match=r"gone\.key"):
        verify(right, MARK, key=tmp_path / "gone.key")
    for alpha in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            verify(right, MARK, alpha=alpha)
    with pytest.raises(ValueError, match="key="):
        verify(right, MARK, adversarial=True)


def test_files_serve_as_well_as_objects(tmp_path):
    KEY.save(tmp_path / "acme.key", "open sesame")
    MARK.save(tmp_path / "acme.wm", "open sesame")
    verdict = verify(copy_of(MARK), tmp_path / "acme.wm", key=tmp_path / "acme.key", passphrase="open sesame")
    assert (verdict.decision, verdict.derivation) == ("owned", "checked")
    with pytest.raises(WatermarkError, match=r"acme\.wm"):
        verify(copy_of(MARK), tmp_path / "acme.wm", passphrase="open barley")


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
    needed = threshold(COUNT, 1 / CLASSES, math.log10(2.0**-128))
    for right, decision in [(needed, "owned"), (needed - 1, "not_proven")]:
        verdict = verify(copy_of(MARK, right), MARK, key=KEY, adversarial=True)
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
    assert verdict.log10_p == pytest.approx(-BITS * math.log10(2), rel=1e-12)
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
    mark = white_box(CARRIERS[:2])
    first, second = marked_weights(mark)
    assert verify(save(network([first, second])), mark).matched == BITS
    swapped = verify(save(network([second, first])), mark)
    assert abs(swapped.matched - BITS / 2) < 5 * math.sqrt(BITS) / 2


def test_a_mark_in_one_layer_is_found_among_its_equals(save):
    """The preset of Uchida et al.: one layer, the mean of its filters, a dense projection."""
    parameters = white_box_parameters(scheme("uchida", bits=32, marked=1), CARRIERS, SHAPE, "detector")
    mark = Watermark.create(KEY, "uchida", parameters)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    mean = ops.project_adjoint(signs, int(mark.arrays["carrier_keys"][0]), 72, "gaussian")
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=shape).astype(np.float32) for shape in CARRIERS]
    weights[1] += 3 * mean.reshape(CARRIERS[1][1:]) / mean.std()
    verdict = verify(save(network(weights)), mark, alpha=1e-3)
    assert verdict.owned
    assert verdict.matched > 28
    assert any("2 orders" in note for note in verdict.notes)
    assert not verify(save(network([weights[0], weights[0]])), mark, alpha=1e-3).owned


def test_a_marked_layer_is_found_at_its_recorded_place_among_more_equals_than_are_tried(save):
    shapes = [(4, 512)] * 80
    parameters = white_box_parameters(scheme("uchida", bits=64, marked=70), shapes, SHAPE, "detector")
    mark = Watermark.create(KEY, "uchida", parameters)
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
    assert verdict.log10_p == pytest.approx(binomial_log10_tail(verdict.matched, 64, 0.5) + math.log10(65), rel=1e-12)
    assert any("65 of the 80 possible orders" in note for note in verdict.notes)


def test_every_order_that_is_tried_is_paid_for(save):
    """An inserted layer of equal shape leaves three orders of two layers; the right one is found, at thrice the p."""
    inserted = np.random.default_rng(3).normal(size=CARRIERS[0]).astype(np.float32)
    verdict = verify(save(network(marked_weights(), extra_first=[inserted])), BIT_MARK)
    assert (verdict.decision, verdict.matched) == ("owned", BITS)
    assert verdict.log10_p == pytest.approx(-BITS * math.log10(2) + math.log10(3), rel=1e-12)
    assert any("3 orders" in note and "paid" in note for note in verdict.notes)


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
        save(network(marked_weights(white_box(key=OTHER))), "other.onnx"),
    )
    for suspect, mark in [(stranger, BIT_MARK), (marked, white_box(key=OTHER))]:
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

    parameters = white_box_parameters(scheme("sketch", bits=BITS), CARRIERS, (8, 3, 3), "module")
    mark, module = Watermark.create(KEY, "sketch", parameters), Module()
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
