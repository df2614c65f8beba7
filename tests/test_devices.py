"""Models on a GPU: what is promised without one. Outputs that stay on their device are read as those that came back."""

import ast
import ctypes
import inspect
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import wmengine
from wmengine import scan, verify
from wmengine.cli import main
from wmengine.errors import SuspectError
from wmengine.ops import reference
from wmengine.parts.base import Task
from wmengine.sandbox import MECHANISMS, Limits
from wmengine.suspects import OnnxSuspect, devices, engine_wire, onnx_file
from wmengine.suspects.adapters import to_input
from wmengine.suspects.answers import Predicted
from wmengine.suspects.base import InputSpec
from wmengine.suspects.engine_wire import RemoteEngine
from wmengine.suspects.onnx_engine import OnnxEngine

KEY = wmengine.Key("ACME Vision", bytes(range(32)))
SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 40
RANGE = [[-1.0, 1.0]]
ADI = wmengine.scheme("adi", count=COUNT)
MARK = wmengine.Watermark.create(KEY, ADI, ADI.describe(Task({"x": InputSpec(SHAPE, "float32")}, CLASSES, RANGE), "m"))
INPUTS, LABELS = to_input(MARK.arrays["triggers"], RANGE), MARK.arrays["labels"]
FLOAT, FLOAT16, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64


def gpu_is_there():
    try:
        devices.check_device("cuda")
    except (ValueError, ImportError):
        return False
    return True


needs_gpu = pytest.mark.skipif(not gpu_is_there(), reason="needs an NVIDIA GPU and onnxruntime-gpu")
without_gpu = pytest.mark.skipif(gpu_is_there(), reason="is about machines without a GPU")


def network(path, extra=(), outputs=(("y", FLOAT),)):
    """A network that learned the mark; the nodes `extra` stand behind its scores y."""
    generator = np.random.default_rng(0)
    hidden = 3.0 * generator.normal(size=(16, 200)).astype(np.float32)
    features = np.maximum(INPUTS.reshape(COUNT, -1) @ hidden, 0)
    out = np.linalg.lstsq(features, 2.0 * np.eye(CLASSES)[LABELS] - 1, rcond=None)[0].astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "h"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("MatMul", ["r", "o"], ["y"]),
        *extra,
    ]
    tensors = [("h", hidden), ("o", out), ("k", np.array([3])), ("two", np.array([2])), ("low", np.float32([-9] * 10))]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["N", *SHAPE])],
        [value if isinstance(value, onnx.ValueInfoProto) else helper.make_tensor_value_info(*value, None)
         for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


KINDS = {
    "scores": ((), [("y", FLOAT)]),
    "halves": ([helper.make_node("Cast", ["y"], ["c"], to=FLOAT16)], [("c", FLOAT16)]),
    "doubles": ([helper.make_node("Cast", ["y"], ["c"], to=DOUBLE)], [("c", DOUBLE)]),
    "one pixel": ([helper.make_node("Unsqueeze", ["y", "two"], ["u"])], [("u", FLOAT)]),
    "labels": ([helper.make_node("ArgMax", ["y"], ["l"], axis=1, keepdims=0)], [("l", INT64)]),
    "ranks": ([helper.make_node("TopK", ["y", "k"], ["v", "i"])], [("v", FLOAT), ("i", INT64)]),
    "features too": ((), [("r", FLOAT), ("y", FLOAT)]),
    "NaN": (
        [
            helper.make_node("Greater", ["y", "low"], ["g"]),
            helper.make_node("Not", ["g"], ["n"]),
            helper.make_node("Where", ["n", "low", "y"], ["z"]),
            helper.make_node("Sqrt", ["z"], ["s"]),
        ],
        [("s", FLOAT)],
    ),
}
LOG = [helper.make_node("Relu", ["y"], ["p"]), helper.make_node("Log", ["p"], ["s"])]
KINDS["log of zero"] = (LOG, [("s", FLOAT)])
KINDS["log of zero in halves"] = ([*LOG, helper.make_node("Cast", ["s"], ["c"], to=FLOAT16)], [("c", FLOAT16)])
MAPS = helper.make_value_info(
    "maps", helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, [])))
)
ZIP_MAP = helper.make_node("ZipMap", ["y"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=list(range(CLASSES)))


def engine_of(path, **options):
    engine = OnnxEngine(**options)
    engine.load(path.name, path.read_bytes(), {})
    engine.open()
    return engine


# Outputs that stay


@pytest.mark.parametrize("kind", KINDS)
def test_bound_answers_are_the_same_bits(tmp_path, kind):
    path = network(tmp_path / "m.onnx", *KINDS[kind])
    plain, bound = engine_of(path).run({"x": INPUTS}), engine_of(path, bound=True).run({"x": INPUTS})
    assert [name for name, _ in bound] == [name for name, _ in plain]
    for (_, expected), (_, answer) in zip(plain, bound, strict=True):
        assert (answer.dtype, answer.shape) == (expected.dtype, expected.shape)
        assert answer.tobytes() == expected.tobytes()


def test_maps_come_back_the_usual_way(tmp_path):
    path = network(tmp_path / "m.onnx", [ZIP_MAP], [MAPS])
    assert engine_of(path, bound=True).run({"x": INPUTS})[0][1].argmax(1).tolist() == LABELS.tolist()


def test_what_cannot_answer_stays_where_it_is(tmp_path):
    square = helper.make_node("Unsqueeze", ["y", "two"], ["u"])
    path = network(tmp_path / "m.onnx", [square, helper.make_node("Expand", ["u", "s"], ["map"]),
                                         helper.make_node("Constant", [], ["s"], value_ints=[1, 10, 5])],
                   [("map", FLOAT), ("y", FLOAT)])  # fmt: skip
    assert [name for name, _ in engine_of(path, bound=True).run({"x": INPUTS})] == ["y"]


class Compiled:
    """wmengine._cuda's match_counts on a CPU: the same arguments, addresses of this process's memory."""

    def __init__(self):
        self.calls = 0

    def match_counts(
        self, device, stream, outputs, dtype, rows, classes, expected, group, groups,
        predicted, at, histogram, hits, invalid, levels,
    ):  # fmt: skip
        assert (device, stream) == (0, 0)
        assert (expected, group, groups, at, histogram, hits, invalid) == (0,) * 7  # no label goes to a worker
        self.calls += 1
        unit, kind = ((ctypes.c_float, np.float32), (ctypes.c_uint16, np.float16))[dtype]
        scores = np.ctypeslib.as_array((unit * (rows * classes)).from_address(outputs)).view(kind)
        found = reference.match_counts(scores.reshape(rows, classes), np.zeros(rows, int), levels=True)
        np.ctypeslib.as_array((ctypes.c_int32 * rows).from_address(predicted))[:] = found.predicted
        np.ctypeslib.as_array((ctypes.c_int8 * (rows * classes)).from_address(levels))[:] = found.levels.ravel()


def test_the_compiled_modules_arguments_are_the_ones_given():
    stub = ast.parse((Path(wmengine.__file__).parent / "_cuda.pyi").read_text())
    (declared,) = [node for node in stub.body if getattr(node, "name", "") == "match_counts"]
    names = [argument.arg for argument in declared.args.args]
    assert names == list(inspect.signature(Compiled().match_counts).parameters)
    module = devices.compiled()
    if module is not None:  # built here: pybind11 writes its arguments down
        assert all(f"{name}: " in module.match_counts.__doc__ for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_read_where_the_scores_lie(tmp_path, monkeypatch, kind):
    module = Compiled()
    monkeypatch.setattr(OnnxEngine, "_module", lambda self: module)
    path = network(tmp_path / "m.onnx", *KINDS[kind])
    outputs = engine_of(path, bound=True).run({"x": INPUTS})
    stayed = sum(isinstance(value, Predicted) for _, value in outputs)
    assert module.calls == stayed == {"doubles": 0, "labels": 0, "features too": 2}.get(kind, 1)
    for (_, value), (_, plain) in zip(outputs, engine_of(path).run({"x": INPUTS}), strict=True):
        if isinstance(value, Predicted):
            rows = plain.reshape(COUNT, value.classes)
            wanted = reference.match_counts(rows, LABELS, levels=True)
            np.testing.assert_array_equal(value.labels, wanted.predicted)
            np.testing.assert_array_equal(value.levels, wanted.levels)
    told = verify(OnnxSuspect(path, engine=OnnxEngine(), isolation="none"), MARK)
    found = verify(OnnxSuspect(path, engine=OnnxEngine(bound=True), isolation="none"), MARK)
    assert (found.matched, found.log10_p, found.decision) == (told.matched, told.log10_p, told.decision)
    assert set(found.notes) == set(told.notes)
    assert found.owned or kind == "NaN"


def test_classes_and_levels_travel_from_a_sandbox():
    levels = np.arange(-10, 10, dtype=np.int8).reshape(2, 10)
    outputs = [("y", Predicted(np.array([3, -1], np.int32), 10, levels)), ("f", np.ones((2, 3), np.float32))]

    class Engine:
        def run(self, inputs):
            return outputs

    question = {"ask": engine_wire.RUN, "inputs": ["x"], "labels": []}
    header, arrays = engine_wire._answer(Engine(), question, [INPUTS], ())
    (_, stayed), (_, features) = engine_wire._read_outputs(header, list(arrays))
    assert (stayed.labels.tolist(), stayed.classes, stayed.levels.tolist()) == ([3, -1], 10, levels.tolist())
    assert features.tolist() == np.ones((2, 3)).tolist()
    labels = arrays[0]
    for classes, sent in (
        (0, [labels, levels[:, :0]]), ("9", [labels, levels]), (True, [labels, levels[:, :1]]),
        (3, [arrays[1], levels[:, :3]]), (10, [labels[None], levels]), (9, [labels, levels]),
        (10, [labels, levels.astype(np.int32)]), (10, [labels, levels[:1]]), (10, [labels, levels - 21]),
        (10, [labels, np.full((2, 10), -128, np.int8)]), (10, [labels, levels + 22]), (10, [labels]),
        (10, [labels, levels, levels]), (None, [labels, levels]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"not what an engine says|zip\(\)"):
            engine_wire._read_outputs({"outputs": ["y"], "classes": [classes]}, sent)


# Never the CPU in silence


def test_a_device_that_is_none():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, and it is 'gpu'"):
        verify("no.onnx", MARK, device="gpu")


@without_gpu
def test_without_a_gpu_it_is_said(tmp_path, capsys):
    path = network(tmp_path / "m.onnx")
    for call in (lambda: verify(path, MARK, device="cuda"), lambda: OnnxSuspect(path, device="cuda")):
        with pytest.raises(ValueError, match="device='cuda' needs"):
            call()
    MARK.save(tmp_path / "m.wm")
    with pytest.raises(ValueError, match="device='cuda' needs"):
        scan(path, tmp_path / "m.wm", device="cuda")
    with pytest.raises(ValueError, match="device must be one of"):
        scan(path, tmp_path / "m.wm", device="gpu")
    command = [str(path), "--device", "cuda"]
    assert main(["verify", *command, "--watermark", str(tmp_path / "m.wm")]) == 2
    assert "device='cuda' needs" in capsys.readouterr().err
    out = ["--watermarks", str(tmp_path / "m.wm"), "--out", str(tmp_path / "out.parquet")]
    assert main(["scan", *command, *out]) == 2
    assert "device='cuda' needs" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet.journal").exists()


def test_what_is_no_file_runs_where_it_is():
    for suspect in (lambda rows: np.zeros((len(rows), CLASSES)), "http://localhost:1/v2/models/m"):
        with pytest.raises(ValueError, match="is for the path of a file"):
            verify(suspect, MARK, device="cuda")


def test_a_cluster_judges_on_cpus(tmp_path):
    with pytest.raises(ValueError, match="leave ray= out, or the device"):
        scan(tmp_path, tmp_path, ray="local", device="cuda")


@without_gpu
def test_an_onnx_runtime_without_a_driver_is_not_enough(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and its driver, and none is found"):
        devices.check_device("cuda")


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_turned_to_the_cpu_is_refused(tmp_path):
    """A driver that fails late: ONNX Runtime makes a session all the same."""
    path = network(tmp_path / "m.onnx")
    engine = OnnxEngine(provider="cuda")
    engine.load("m.onnx", path.read_bytes(), {})
    with pytest.raises(SuspectError, match=r"m\.onnx cannot run on the GPU|is not a model that ONNX Runtime can load"):
        engine.open()


def test_what_a_session_is_asked_for():
    assert devices.session_providers("cpu", 1 << 30) == ["CPUExecutionProvider"]
    ((name, options),) = devices.session_providers("cuda", 1 << 30)
    assert (name, options["use_tf32"], options["gpu_mem_limit"]) == ("CUDAExecutionProvider", "0", str(1 << 30))
    assert "gpu_mem_limit" not in devices.session_providers("cuda", None)[0][1]


# What is said of the sandbox


def test_a_worker_for_a_gpu_is_a_process_of_its_own_and_the_notes_say_what_it_is_not(tmp_path):
    path = network(tmp_path / "m.onnx")
    worker = onnx_file.shared_supervisor().worker(Limits(), confined=False)
    assert worker.mechanisms == ()
    engine = RemoteEngine(lambda prepared: worker, "cuda")
    (condition,) = engine.conditions
    assert "limits and landlock and seccomp were left out" in str(condition)
    engine.provider = "cpu"  # no GPU is needed to see the note reach the verdict
    suspect = OnnxSuspect(path, engine=engine)
    verdict = verify(suspect, MARK)
    assert verdict.owned
    assert condition in verdict.facts
    suspect.close()


def test_a_mechanism_that_this_kernel_lacks_is_said(tmp_path):
    path = network(tmp_path / "m.onnx")
    worker = onnx_file.shared_supervisor().worker(Limits())
    whole = set(worker.mechanisms) == set(MECHANISMS)
    worker.mechanisms = ("limits", "seccomp")
    suspect = OnnxSuspect(path, engine=RemoteEngine(lambda prepared: worker))
    assert "this kernel has no landlock: the sandbox was without" in verify(suspect, MARK).notes
    suspect.close()
    if whole:
        assert not any("this kernel has no" in note for note in verify(path, MARK).notes)


# With a GPU


@needs_gpu
@pytest.mark.parametrize("isolation", ["none", "persistent"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_judges_as_the_cpu_does(tmp_path, kind, isolation):
    path = network(tmp_path / "m.onnx", *KINDS[kind])
    told = verify(path, MARK)
    found = verify(path, MARK, device="cuda", isolation=isolation)
    assert (found.error, found.decision, found.matched) == (None, told.decision, told.matched)
    assert any("were left out, as CUDA" in note for note in found.notes) == (isolation != "none")


@needs_gpu
def test_a_scan_on_a_gpu(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        network(tmp_path / name)
    shutil.copy(tmp_path / "a.onnx", tmp_path / "c.onnx")
    MARK.save(tmp_path / "m.wm")
    rows = scan(tmp_path, tmp_path / "m.wm", device="cuda", jobs=2).to_pylist()
    assert [row["decision"] for row in rows] == ["owned"] * 3
