"""What endpoints promise, against a server that others wrote: mlserver, over REST and gRPC.

Its pins and ours exclude each other, so it lives in an environment of its own, which `make mlserver` sets up.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from endpoint_stub import CLASSES, COUNT, INPUTS, MARK, SHAPE
from onnx import TensorProto, helper, numpy_helper

import wmengine as wm

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(os.environ.get("WMENGINE_MLSERVER", ROOT / ".mlserver" / "bin" / "python"))

pytestmark = [
    pytest.mark.mlserver,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no mlserver: `make mlserver` sets it up ({PYTHON} is not there)"),
]


def network(path, as_bytes):
    """The mark's own nearest neighbour: an image gets the label of the trigger that is closest to it."""
    size = int(np.prod(SHAPE))
    triggers = INPUTS.reshape(COUNT, size)
    constants = {
        "t": triggers.T,
        "b": -(triggers**2).sum(axis=1) / 2,
        "l": np.eye(CLASSES, dtype=np.float32)[MARK.arrays["labels"]],
        "s": np.float32(127.5),
        "o": np.float32(1),
    }
    first = [helper.make_node("Identity", ["pixels"], ["x"])]
    if as_bytes:
        first = [
            helper.make_node("Cast", ["pixels"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["f", "s"], ["d"]),
            helper.make_node("Sub", ["d", "o"], ["m"]),
            helper.make_node("Transpose", ["m"], ["x"], perm=[0, 3, 1, 2]),
        ]
    nodes = [
        *first,
        helper.make_node("Flatten", ["x"], ["v"]),
        helper.make_node("Gemm", ["v", "t", "b"], ["n"]),
        helper.make_node("Hardmax", ["n"], ["h"], axis=1),
        helper.make_node("MatMul", ["h", "l"], ["scores"]),
    ]
    kind, shape = (TensorProto.UINT8, [4, 4, 3]) if as_bytes else (TensorProto.FLOAT, list(SHAPE))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixels", kind, ["N", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("n", "scores")],
        [numpy_helper.from_array(np.asarray(values, np.float32), name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a model, by the protocol and the model's name."""
    folder = tmp_path_factory.mktemp("mlserver")
    http, grpc, metrics = free_ports(3)
    settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    (folder / "settings.json").write_text(json.dumps({**settings, "parallel_workers": 0, "debug": False}))
    shutil.copy(ROOT / "tests" / "mlserver_runtime.py", folder)
    for name in ("floats", "bytes"):
        (folder / name).mkdir()
        network(folder / f"{name}.onnx", name == "bytes")
        parameters = {"uri": str(folder / f"{name}.onnx")}
        model = {"name": name, "implementation": "mlserver_runtime.OnnxRuntime", "parameters": parameters}
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    with (folder / "log").open("wb") as log:
        command = [PYTHON, "-c", "from mlserver.cli import main; main()", "start", folder]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        running = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            for name in ("floats", "bytes"):
                wait_for(f"http://127.0.0.1:{http}/v2/models/{name}/ready", running, folder / "log")
            yield lambda protocol, name: {
                "rest": f"http://127.0.0.1:{http}/v2/models/{name}",
                "grpc": f"grpc://127.0.0.1:{grpc}/{name}",
            }[protocol]
        finally:
            running.terminate()
            running.wait(20)


def wait_for(url, running, log):
    end = time.monotonic() + 60
    while time.monotonic() < end and running.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"mlserver does not start: {log.read_text()[-2000:]}")


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_the_mark_is_found_behind_a_model_that_the_server_does_not_describe(server, protocol):
    suspect = wm.endpoint(server(protocol, "floats"), input="pixels")
    verdict = wm.verify(suspect, MARK)
    assert (verdict.decision, verdict.matched, verdict.total) == ("owned", COUNT, COUNT)
    assert verdict.notes[0] == "answers were read from output 'scores', one of 2"
    assert not [note for note in verdict.notes if "change" in note]
    assert wm.verify(suspect, MARK, test="sequential").queries == 16
    suspect.close()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_names_layout_and_type_are_as_the_options_say(server, protocol):
    options = {"input": "pixels", "output": "scores", "layout": "channels last", "datatype": "UINT8"}
    suspect = wm.endpoint(server(protocol, "bytes"), **options)
    verdict = wm.verify(suspect, MARK)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT)
    suspect.close()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_what_the_server_cannot_answer_is_an_error_in_one_line(server, protocol):
    for url, options in (
        (server(protocol, "none"), {}),
        (server(protocol, "floats"), {"input": "pixels", "layout": "flat", "tries": 1}),
        (server(protocol, "bytes"), {"input": "pixels", "tries": 1}),
    ):
        verdict = wm.verify(wm.endpoint(url, **options), MARK)
        assert verdict.decision == "error"
        assert url in verdict.error
        assert "\n" not in verdict.error
