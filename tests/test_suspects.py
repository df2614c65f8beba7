"""What suspects promise: whatever answers is asked the same way, and no file makes us read what it must not."""

import hashlib
import os

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from wmengine.errors import SuspectError
from wmengine.suspects import OnnxSuspect, onnx_engine, open_suspect
from wmengine.suspects.base import CHUNK, InputSpec
from wmengine.suspects.graph_limits import REFUSED, check_operators

FEATURES, CLASSES = 6, 4
FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
# More rows than two chunks, and not a multiple of one.
INPUTS = np.random.default_rng(1).normal(size=(2 * CHUNK + 7, FEATURES)).astype(np.float32)
SCORES = INPUTS @ WEIGHT


def graph(nodes, initializers, outputs=("y",), inputs=None, opset=17):
    """An ONNX model; inputs and outputs default to float32 x [N, 6] and outputs of any type."""
    inputs = inputs or [helper.make_tensor_value_info("x", FLOAT, ["N", FEATURES])]
    outputs = [
        output if isinstance(output, onnx.ValueInfoProto) else helper.make_tensor_value_info(output, FLOAT, None)
        for output in outputs
    ]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=9)


def weight(name="w", values=WEIGHT):
    return numpy_helper.from_array(np.asarray(values), name)


def classifier(**options):
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight()], **options)


def external(location, values=WEIGHT, name="w", **entries):
    tensor = TensorProto(name=name, data_type=FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_external(location, **entries):
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [external(location, **entries)])


def save(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def ask(suspect, inputs=INPUTS, classes=CLASSES):
    """What it answers, as values: scores, labels, or the classes of several outputs."""
    return suspect.answer({"x": inputs}, classes).values


def said(suspect):
    return [str(fact) for fact in suspect.facts]


def complaint(call, *arguments):
    """The one sentence of the SuspectError that a call raises."""
    with pytest.raises(SuspectError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- asking -----------------------------------------------------------------------------------------------------------


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


# --- files ------------------------------------------------------------------------------------------------------------


def broken_files(directory):
    whole = classifier().SerializeToString()
    contents = {
        "empty.onnx": b"",
        "garbage.onnx": bytes(range(256)) * 8,
        "text.onnx": b"not a model, and location is only a word in it\n" * 20,
        "truncated.onnx": whole[: len(whole) // 2],
        "cut.onnx": whole[:-1],
        "no graph.onnx": onnx.ModelProto(ir_version=9).SerializeToString(),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "folder.onnx").mkdir()
    os.mkfifo(directory / "pipe.onnx")
    return sorted(path for path in directory.iterdir())


def test_what_is_not_a_model_is_refused_for_either_kind_of_mark(tmp_path):
    paths = broken_files(tmp_path)
    assert len(paths) == 8
    for path in paths:
        for method in (lambda suspect: ask(suspect), lambda suspect: suspect.tensors()):
            words = complaint(lambda path, method: method(open_suspect(path)), path, method)
            assert str(path) in words
            assert len(words) < 400


def test_onnx_runtimes_own_format_is_called_by_its_name(tmp_path):
    (tmp_path / "m.ort").write_bytes(b"\x18\0\0\0ORTM" + bytes(64))
    assert "is in ONNX Runtime's own format" in complaint(open_suspect, tmp_path / "m.ort")


def test_an_operator_that_nobody_runs_does_not_keep_weights_from_being_read(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Run", ["s"], ["y"], domain="theirs")]
    suspect = open_suspect(save(graph(nodes, [weight()]), tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    assert "uses the operator 'Run' of domain 'theirs'" in complaint(ask, suspect)


def test_what_onnx_runtime_registers_as_its_own_may_run_and_what_runs_whole_graphs_may_not():
    check_operators("m", [("com.microsoft", name) for name in ("CDist", "GatherBlockQuantized", "MatMulBnb4", "QMoE")])
    for name in (*REFUSED, "PyOp"):
        assert name in complaint(check_operators, "m", [("com.microsoft", name)])


def test_weights_are_read_whatever_type_an_output_has(tmp_path):
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, None))
    outputs = [helper.make_value_info("p", helper.make_sequence_type_proto(maps))]
    zipped = helper.make_node("ZipMap", ["y"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[*range(CLASSES)])
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"]), zipped], [weight()], outputs)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    suspect = open_suspect(save(model, tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)


def test_a_path_that_does_not_exist_is_the_callers_mistake(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx does not exist"):
        open_suspect(tmp_path / "gone.onnx")
    with pytest.raises(TypeError, match="a suspect is a path"):
        open_suspect(3)


def test_the_hash_of_a_single_file_is_its_sha256(tmp_path):
    path = save(classifier(), tmp_path / "m.onnx")
    assert open_suspect(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_beside_the_model_are_read_hashed_and_used(tmp_path):
    (tmp_path / "sub").mkdir()
    data = np.zeros(8, np.uint8).tobytes() + WEIGHT.tobytes()
    hashes = set()
    for location in ("w.bin", "./w.bin", "sub/w.bin"):
        (tmp_path / location).write_bytes(data)
        path = save(with_external(location, offset=8, length=WEIGHT.nbytes), tmp_path / "m.onnx")
        suspect = open_suspect(path)
        np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
        (read,) = suspect.tensors()
        assert np.array_equal(read.values, WEIGHT.T)
        hashes.add(suspect.sha256)
    (tmp_path / "sub" / "w.bin").write_bytes(data[::-1])
    hashes.add(open_suspect(path).sha256)
    assert len(hashes) == 4


def test_weights_in_constants_may_be_external_too(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    nodes = [
        helper.make_node("Constant", [], ["w"], value=external("w.bin")),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    suspect = open_suspect(save(graph(nodes, []), tmp_path / "m.onnx"))
    np.testing.assert_allclose(ask(suspect), SCORES, rtol=1e-5, atol=1e-6)
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)


def test_weights_anywhere_else_are_never_read(tmp_path, monkeypatch):
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    secret = outside / "secret.bin"
    secret.write_bytes(WEIGHT.tobytes())
    (home / "symbolic.bin").symlink_to(secret)
    (home / "hard.bin").hardlink_to(secret)
    (home / "linked").symlink_to(outside)
    (home / "folder").mkdir()
    os.mkfifo(home / "pipe.bin")
    monkeypatch.chdir(outside)  # where ONNX Runtime itself would look
    locations = [str(secret), "../outside/secret.bin", "linked/secret.bin", "folder/../../outside/secret.bin"]
    locations += [
        "symbolic.bin",
        "hard.bin",
        "pipe.bin",
        "folder",
        "secret.bin",
        "",
        ".",
        "*/_ORT_MEM_ADDR_/*",
        "hard.bin/x",
    ]
    for location in locations:
        path = save(with_external(location), home / "m.onnx")
        words = complaint(open_suspect, path)
        assert str(home) in words, location


def test_weights_in_a_cache_of_hugging_faces_are_read_from_its_blobs_and_nowhere_else(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    weights, model = "a" * 64, "b" * 40
    (blobs / weights).write_bytes(WEIGHT.tobytes())
    save(with_external("m.onnx_data"), blobs / model)
    (snapshot / "m.onnx").symlink_to(f"../../../blobs/{model}")
    data = snapshot / "m.onnx_data"
    data.symlink_to(f"../../../blobs/{weights}")
    np.testing.assert_allclose(ask(open_suspect(snapshot / "m.onnx")), SCORES, rtol=1e-5, atol=1e-6)
    (tmp_path / weights).write_bytes(WEIGHT.tobytes())
    (blobs / "short").write_bytes(WEIGHT.tobytes())
    (blobs / ("c" * 64)).symlink_to(tmp_path / weights)
    for elsewhere in (f"../../../../{weights}", "../../../blobs/short", f"../../../blobs/{'c' * 64}", blobs / weights):
        data.unlink()
        data.symlink_to(elsewhere)
        assert "must be a regular file and no link" in complaint(open_suspect, snapshot / "m.onnx"), elsewhere


def test_weights_in_a_subgraph_cannot_reach_a_file_either(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    monkeypatch.chdir(tmp_path)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["x", "v"], ["o"])],
            name,
            [],
            [helper.make_tensor_value_info("o", FLOAT, None)],
            [external("w.bin", name="v")],
        )
        for name in ("then", "else")
    }
    model = graph([helper.make_node("If", ["c"], ["y"], **branches)], [weight("c", np.array(True))])
    (tmp_path / "sub").mkdir()
    assert "missing" in complaint(open_suspect, save(model, tmp_path / "sub" / "m.onnx"))
    suspect = open_suspect(save(model, tmp_path / "m.onnx"))
    assert np.array_equal(suspect.tensors()[0].values, WEIGHT.T)
    assert "ONNX Runtime" in complaint(ask, suspect)  # which takes no external data in subgraphs


def test_weights_that_end_too_early_are_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-4])
    for entries in ({}, {"length": WEIGHT.nbytes}, {"offset": -4}, {"offset": 10**30}, {"offset": "many"}):
        suspect = open_suspect(save(with_external("w.bin", **entries), tmp_path / "m.onnx"))
        for call in (ask, lambda suspect: [each.read() for each in suspect.tensors()]):
            assert "m.onnx" in complaint(call, suspect)


def test_a_model_and_its_weights_together_have_a_size_limit(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = save(with_external("w.bin"), tmp_path / "m.onnx")
    size = path.stat().st_size + WEIGHT.nbytes
    assert OnnxSuspect(path, maximum_bytes=size).tensors()
    assert "'w.bin' beside" in complaint(lambda: OnnxSuspect(path, maximum_bytes=size - 1))
    assert "m.onnx is larger" in complaint(lambda: OnnxSuspect(path, maximum_bytes=10))


def test_a_location_that_is_no_utf8_is_refused(tmp_path):
    """Protobuf hands it over as bytes."""
    content = with_external("w.bin").SerializeToString().replace(b"w.bin", b"w\xff\xfein")
    (tmp_path / "m.onnx").write_bytes(content)
    assert "UTF-8" in complaint(open_suspect, tmp_path / "m.onnx")


def test_a_directory_that_may_not_be_opened_is_the_suspects_fault(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECTORY and "dir_fd" not in named:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest, **named)

    path = save(with_external("w.bin"), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in complaint(open_suspect, path)


# --- modules and functions --------------------------------------------------------------------------------------------


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
    ]
    for function in answers:
        read = ask(open_suspect(function))
        best = read if read.ndim == 1 else read.argmax(axis=1)
        assert np.array_equal(best, SCORES.argmax(axis=1))


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
