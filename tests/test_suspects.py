"""Whatever answers is asked the same way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from suspect_graphs import (
    CLASSES,
    DOUBLE,
    FEATURES,
    FLOAT,
    FLOAT16,
    INPUTS,
    SCORES,
    WEIGHT,
    ask,
    classifier,
    complaint,
    graph,
    said,
    save,
    weight,
)
from torch import nn

from wmengine.suspects import OnnxSuspect, onnx_engine, open_suspect
from wmengine.suspects.base import CHUNK, InputSpec


def test_all_inputs_are_answered_in_order_whatever_the_chunks(tmp_path):
    suspect = open_suspect(save(classifier(), tmp_path / "m.onnx"))
    for count in (1, CHUNK, CHUNK + 1, len(INPUTS)):
        answers = ask(suspect, INPUTS[:count], CLASSES)
        assert answers.dtype == np.float32
        np.testing.assert_allclose(answers, SCORES[:count], rtol=1e-5, atol=1e-6)
    assert said(suspect) == []


@pytest.mark.parametrize("batch", [1, 5, 200])
def test_a_fixed_batch_is_honoured_by_padding(tmp_path, batch):
    inputs = [helper.make_tensor_value_info("x", FLOAT, [batch, FEATURES])]
    suspect = OnnxSuspect(save(classifier(inputs=inputs), tmp_path / "m.onnx"))
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
    assert said(suspect) == [f"the suspect has a fixed batch of {batch}"]


def test_a_fixed_batch_is_no_way_to_use_up_our_memory(tmp_path):
    inputs = [helper.make_tensor_value_info("x", FLOAT, [10**9, FEATURES])]
    suspect = OnnxSuspect(save(classifier(inputs=inputs), tmp_path / "m.onnx"))
    assert f"fixed batch of {10**9}" in complaint(ask, suspect)


def test_a_batch_of_one_baked_into_a_dynamic_model_is_found_out(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "one"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    model = graph(nodes, [weight(), weight("one", np.array([1, FEATURES]))])
    suspect = OnnxSuspect(save(model, tmp_path / "m.onnx"))
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
    assert said(suspect) == ["the suspect answers only one input at a time"]


@pytest.mark.parametrize(("kind", "dtype"), [(FLOAT16, np.float16), (DOUBLE, np.float64)])
def test_half_and_double_inputs_are_cast(tmp_path, kind, dtype):
    inputs = [helper.make_tensor_value_info("x", kind, ["N", FEATURES])]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = graph(nodes, [weight(values=WEIGHT.astype(dtype))], outputs, inputs)
    suspect = OnnxSuspect(save(model, tmp_path / "m.onnx"))
    answers = ask(suspect)
    assert answers.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_allclose(answers, SCORES, atol=0.02)
    assert said(suspect) == [f"inputs were cast to {np.dtype(dtype).name}"]


def test_bfloat16_goes_in_and_comes_out(tmp_path):
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["N", None])] for name in "xy")
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["s"]),
        helper.make_node("Cast", ["s"], ["y"], to=TensorProto.BFLOAT16),
    ]
    suspect = OnnxSuspect(save(graph(nodes, [weight()], outputs, inputs), tmp_path / "m.onnx"))
    rounded = torch.from_numpy(INPUTS).bfloat16()
    expected = (rounded.float() @ torch.from_numpy(WEIGHT)).bfloat16().float()
    np.testing.assert_allclose(ask(suspect), expected, rtol=2**-7)
    assert said(suspect) == ["inputs were cast to bfloat16"]


def test_the_output_with_the_marks_classes_is_taken_among_several(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Softmax", ["y"], ["p"]),
        helper.make_node("MatMul", ["x", "v"], ["features"]),
        helper.make_node("Reshape", ["x", "shape"], ["map"]),
    ]
    extra = [weight("v", np.ones((FEATURES, 9), np.float32)), weight("shape", np.array([0, 2, 3]))]
    model = graph(nodes, [weight(), *extra], ("map", "features", "p", "y"))
    suspect = OnnxSuspect(save(model, tmp_path / "m.onnx"))
    answers = ask(suspect)
    assert np.array_equal(answers, np.stack([SCORES.argmax(axis=1)] * 2, axis=1))
    assert said(suspect) == ["2 of 4 outputs may be the answer, the first is 'p'"]
    assert ask(suspect, INPUTS, 9).shape == (len(INPUTS), 9)
    assert said(suspect) == ["answers were read from output 'features', one of 4"]


@pytest.mark.parametrize("keep", [0, 1])
def test_integer_labels_are_answers(tmp_path, keep):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("ArgMax", ["s"], ["y"], axis=1, keepdims=keep),
    ]
    model = graph(nodes, [weight()], [helper.make_tensor_value_info("y", TensorProto.INT64, None)])
    answers = ask(OnnxSuspect(save(model, tmp_path / "m.onnx")))
    assert answers.dtype == np.int64
    assert np.array_equal(answers, SCORES.argmax(axis=1))


def test_scores_may_carry_axes_of_length_one(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Reshape", ["s", "shape"], ["y"]),
    ]
    model = graph(nodes, [weight(), weight("shape", np.array([0, CLASSES, 1, 1]))])
    answers = ask(OnnxSuspect(save(model, tmp_path / "m.onnx")))
    np.testing.assert_allclose(answers, SCORES, rtol=1e-5, atol=1e-6)


def test_other_numbers_of_classes_are_refused_naming_both(tmp_path):
    suspect = OnnxSuspect(save(classifier(), tmp_path / "m.onnx"))
    words = complaint(ask, suspect, INPUTS, 10)
    assert f"{CLASSES} classes" in words
    assert "has 10" in words


def test_other_input_shapes_are_refused_naming_both(tmp_path):
    suspect = OnnxSuspect(save(classifier(), tmp_path / "m.onnx"))
    words = complaint(ask, suspect, np.zeros((3, 1, 8, 8), np.float32), CLASSES)
    assert "[N, 6]" in words
    assert "[N, 1, 8, 8]" in words
    assert "m.onnx" in words


def test_what_cannot_be_asked_is_refused(tmp_path):
    two = [helper.make_tensor_value_info(name, FLOAT, ["N", FEATURES]) for name in ("a", "z")]
    nodes = [helper.make_node("Add", ["a", "z"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    words = complaint(ask, OnnxSuspect(save(graph(nodes, [weight()], inputs=two), tmp_path / "2.onnx")))
    assert "needs 2 inputs (a, z), and the watermark has 1, which a, z could take" in words
    small = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", FEATURES])]
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=FLOAT), helper.make_node("MatMul", ["f", "w"], ["y"])]
    words = complaint(ask, OnnxSuspect(save(graph(nodes, [weight()], inputs=small), tmp_path / "8.onnx")))
    assert "tensor(uint8)" in words
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    model = graph(nodes, [weight("shape", np.array([0, 2, 3]))])
    words = complaint(ask, OnnxSuspect(save(model, tmp_path / "map.onnx")), INPUTS[:3])
    assert "y [3, 2, 3]" in words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_is_asked_in_its_own_dtype_and_left_as_it_was(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES)).to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    suspect = open_suspect(model)
    answers = ask(suspect)
    assert answers.dtype == (np.float64 if dtype is torch.float64 else np.float32)
    model_answers = model.eval()(torch.from_numpy(INPUTS).to(dtype)).detach().float().numpy()
    np.testing.assert_allclose(answers, model_answers, rtol=1e-2, atol=1e-2)
    model.train()
    ask(suspect)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == dtype
    (tensor,) = suspect.tensors({"x": InputSpec((FEATURES,), "float32")})
    assert tensor.values.dtype == np.float32
    assert np.array_equal(tensor.values, model[2].weight.detach().float().numpy())


def test_a_modules_tensors_come_in_order_of_execution_or_the_notes_say_otherwise():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(3, CLASSES), nn.Conv1d(2, 3, 1)

        def forward(self, x):
            return self.second(self.first(x).mean(2))

    suspect = open_suspect(Backwards())
    assert [tensor.source for tensor in suspect.tensors({"x": InputSpec((2, 5), "float32")})] == ["first", "second"]
    assert said(suspect) == []
    for signature in (None, {"x": InputSpec((7, 5), "float32")}):
        assert [tensor.source for tensor in suspect.tensors(signature)] == ["second", "first"]
        assert len(said(suspect)) == 1
        assert "order of registration" in said(suspect)[0]


def test_functions_may_answer_with_arrays_tensors_labels_or_several_of_them():
    answers = [
        lambda x: x @ WEIGHT,
        lambda x: torch.from_numpy(x @ WEIGHT).requires_grad_(),
        lambda x: (x @ WEIGHT).argmax(axis=1),
        lambda x: (x[:, :, None], x @ WEIGHT),
        lambda x: {"logits": x @ WEIGHT},
        lambda x: (x @ WEIGHT).tolist(),
        lambda x: list(x @ WEIGHT),
        lambda x: [x @ WEIGHT],  # as an ONNX Runtime session answers
        lambda x: [x[:, :, None], x @ WEIGHT],
        lambda x: [(x @ WEIGHT).argmax(axis=1)],
        lambda x: [f"class_{each}" for each in (x @ WEIGHT).argmax(axis=1)],
        lambda x: (x @ WEIGHT).argmax(axis=1).astype(str),
        lambda x: [(x @ WEIGHT).argmax(axis=1), [dict(enumerate(row)) for row in x @ WEIGHT]],  # as skl2onnx has them
    ]
    for function in answers:
        read = ask(open_suspect(function))
        best = read if read.ndim == 1 else read.argmax(axis=1)
        assert np.array_equal(best, SCORES.argmax(axis=1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_a_module_of_torchscript_answers_and_shows_no_layers():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    rows = torch.randn(5, 3)
    for suspect in map(open_suspect, (torch.jit.trace(model, rows), torch.jit.script(model))):
        assert np.array_equal(suspect.answer({"x": rows.numpy()}).values, model(rows).detach().numpy())
        assert "is TorchScript and shows no layers: torch.jit.save it" in complaint(suspect.tensors)


def test_names_of_classes_that_hold_no_numbers_are_said_to_be_text():
    suspect = open_suspect(lambda x: np.array(["no", "yes"])[(x @ WEIGHT).argmax(axis=1) % 2])
    assert "but output text [32]; verify a suspect that names one class for each input" in complaint(ask, suspect)


def test_a_model_of_scikit_learn_is_asked_by_its_function():
    class Forest:
        def predict_proba(self, rows):
            return rows

    with pytest.raises(TypeError, match="Forest is none of them: give its predict_proba"):
        open_suspect(Forest())


def test_functions_that_fail_or_lie_are_refused():
    def fails(x):
        raise RuntimeError("first line\nsecond line")

    def sometimes(x):
        return x @ WEIGHT if len(x) == CHUNK else x

    assert "first line second line" in complaint(ask, open_suspect(fails))
    assert "changes the shape" in complaint(ask, open_suspect(sometimes))
    assert "no weights" in complaint(open_suspect(fails).tensors)
    for wrong in (lambda x: None, lambda x: x[:-1] @ WEIGHT, lambda x: "yes", lambda x: [[1], [2, 3]]):
        assert "no scores" in complaint(ask, open_suspect(wrong))


@pytest.mark.parametrize(
    "scores",
    [
        lambda best: 1 + 1e-9 * np.eye(CLASSES)[best],
        lambda best: torch.from_numpy(1 + 1e-9 * np.eye(CLASSES)[best]),
        lambda best: 2**25 + np.eye(CLASSES, dtype=np.int64)[best],
    ],
)
def test_reading_scores_does_not_round_their_argmax_away(scores):
    best = SCORES.argmax(axis=1)
    read = ask(open_suspect(lambda x: scores((x @ WEIGHT).argmax(axis=1))))
    assert np.array_equal(read.argmax(axis=1), best)


def test_bfloat16_scores_are_read():
    assert ask(open_suspect(lambda x: torch.zeros(len(x), 4).bfloat16())).dtype == np.float32


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_what_turns_into_no_array_is_refused():
    class Raises:
        def __array__(self, *arguments, **named):
            raise RuntimeError("no array here")

    wrong = [
        lambda x: torch.from_numpy(x @ WEIGHT).to_sparse(),
        lambda x: torch.quantize_per_tensor(torch.from_numpy(x @ WEIGHT), 0.1, 0, torch.qint8),
        lambda x: torch.empty(len(x), CLASSES, device="meta"),
        lambda x: Raises(),
    ]
    for answer in wrong:
        assert "no scores" in complaint(ask, open_suspect(answer))


def test_a_function_cannot_change_our_inputs():
    def in_place(x):
        x *= 0
        return x @ WEIGHT

    kept = INPUTS.copy()
    ask(open_suspect(in_place))
    assert np.array_equal(INPUTS, kept)


@given(st.binary(max_size=60), st.binary(max_size=60), st.sampled_from([b"location", b"locatio", b"", b"\0location"]))
def test_whether_a_model_may_name_files_is_what_its_bytes_say(before, after, word):
    data = before + word + after
    assert onnx_engine.may_name_files(data) == (b"location" in data)


def test_a_c_library_without_a_search_costs_only_time(monkeypatch):
    monkeypatch.setattr(onnx_engine, "_memmem", None)
    assert onnx_engine.may_name_files(b"\0a location\0")
    assert not onnx_engine.may_name_files(b"\0a locatio\0n")
