"""`scan`: a thousand small networks, one in twenty a copy, as whole processes beside the loop that one writes first.

Everything counts: starting Python, importing, the sandbox, reading files, the table. The floor is a process that knows
beforehand how many queries each suspect will need, and runs exactly these in ONNX Runtime on as many threads.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import Aim, Case, Contender
from wmengine.key import Key
from wmengine.schemes import black_box_parameters, scheme
from wmengine.triggers import to_input
from wmengine.watermark import Watermark

SHAPE, CLASSES, TRIGGERS = (1, 28, 28), 10, 100
WIDTHS = (24, 48, 96)  # 8.5 million operations a query
COPIES = 20  # one suspect in so many
NAIVE = "default session, batch 1, all queries, no sandbox"
LOOP = """
import glob, sys
import numpy as np, onnxruntime
inputs, labels = np.load(sys.argv[2] + "/inputs.npy"), np.load(sys.argv[2] + "/labels.npy")
for path in sorted(glob.glob(sys.argv[1] + "/*.onnx")):
    session = onnxruntime.InferenceSession(path)
    hits = sum(session.run(None, {"x": inputs[i : i + 1]})[0].argmax() == labels[i] for i in range(len(labels)))
"""
BARE = """
import json, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
from concurrent.futures import ThreadPoolExecutor
import numpy as np, onnxruntime
inputs = np.load(sys.argv[2] + "/inputs.npy")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
def judge(item):
    path, queries = item
    session = onnxruntime.InferenceSession(path, options)
    for start in range(0, queries, 32):
        session.run(None, {"x": inputs[start : min(start + 32, queries)]})
with ThreadPoolExecutor(int(sys.argv[3])) as pool:
    list(pool.map(judge, json.load(open(sys.argv[4]))))
"""


class Size(NamedTuple):
    """So many suspects, asked sequentially or every trigger ("all")."""

    suspects: int
    queries: str


SIZES = [Size(100, "sequential"), Size(1000, "sequential"), Size(1000, "all")]
QUICK_SIZES = [Size(20, "sequential")]
AIMS = {Size(1000, "sequential"): [Aim(NAIVE, 4.0)], Size(1000, "all"): [Aim(NAIVE, 1.6)]}


def save_network(path: Path, seed: int, triggers: np.ndarray, labels: np.ndarray | None) -> None:
    """Three convolutions and a linear layer, random; with `labels` the last layer gives them to the triggers."""
    generator = torch.Generator().manual_seed(seed)
    channels = (SHAPE[0], *WIDTHS)
    kernels = [
        torch.randn(out, into, 3, 3, generator=generator) * math.sqrt(2 / (9 * into))
        for into, out in pairwise(channels)
    ]
    size = WIDTHS[-1] * (SHAPE[1] // 4) ** 2
    last = torch.randn(size, CLASSES, generator=generator) / math.sqrt(size)
    if labels is not None:
        x = torch.from_numpy(triggers)
        for layer, kernel in enumerate(kernels):
            x = torch.relu(torch.nn.functional.conv2d(x, kernel, padding=1))
            x = torch.max_pool2d(x, 2) if layer < 2 else x
        wanted = 2.0 * torch.nn.functional.one_hot(torch.from_numpy(labels), CLASSES).double() - 1.0
        last = torch.linalg.lstsq(x.flatten(1).double(), wanted, driver="gelsd").solution.float()
    nodes, at = [], "x"
    for layer in range(3):
        nodes.append(helper.make_node("Conv", [at, f"w{layer}"], [f"c{layer}"], pads=[1] * 4, kernel_shape=[3, 3]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        at = f"r{layer}"
        if layer < 2:
            nodes.append(helper.make_node("MaxPool", [at], [f"p{layer}"], kernel_shape=[2, 2], strides=[2, 2]))
            at = f"p{layer}"
    nodes += [helper.make_node("Flatten", [at], ["f"]), helper.make_node("MatMul", ["f", "o"], ["y"])]
    values = [*((f"w{layer}", kernel) for layer, kernel in enumerate(kernels)), ("o", last)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in values],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def watermark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A mark's file, and its triggers and labels as arrays beside it."""
    folder = tmp_path_factory.mktemp("mark")
    parameters = black_box_parameters(scheme("adi", count=TRIGGERS), SHAPE, CLASSES, [[-1.0, 1.0]], "benchmark")
    mark = Watermark.create(Key("benchmark", bytes(range(32))), "adi", parameters)
    mark.save(folder / "mark.wm")
    inputs, labels = to_input(mark.arrays["triggers"], [[-1.0, 1.0]]), mark.arrays["labels"].copy()
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)
    return folder, inputs, labels


def test_scan(
    size: Size,
    compare: Callable[[Case], None],
    device: str,
    watermark: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    if device != "cpu":
        pytest.skip("suspects are asked on the CPU")
    threads = str(pytestconfig.getoption("--threads"))
    folder, inputs, labels = watermark
    models = tmp_path / "models"
    models.mkdir()
    for number in range(size.suspects):
        copy = number % COPIES == 0
        save_network(models / f"{number:05d}.onnx", number, inputs, labels if copy else None)
    out, plan, paths = tmp_path / "rows.parquet", tmp_path / "queries.json", (str(models), str(folder))

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    command = ["-m", "wmengine", "scan", str(models), "--watermarks", str(folder), "--out", str(out), "--jobs", threads]

    def ours() -> None:
        run(*command, *(["--all-queries"] if size.queries == "all" else []))

    ours()
    rows: list[dict[str, Any]] = parquet.read_table(out).to_pylist()
    assert [row["decision"] == "owned" for row in rows] == [n % COPIES == 0 for n in range(size.suspects)]
    plan.write_text(json.dumps([[row["suspect"], row["queries"]] for row in rows]))
    queries = sum(row["queries"] for row in rows)
    compare(
        Case(
            operator="scan",
            what=f"scan, {'every query' if size.queries == 'all' else 'sequential test'}, all isolation on",
            size=f"{size.suspects} small CNNs × {TRIGGERS} triggers, {queries / len(rows):.0f} asked on average",
            bytes_moved=0,
            ours=ours,
            floor=Contender("bare session.run of these queries", lambda: run("-c", BARE, *paths, threads, str(plan))),
            peers=[Contender(NAIVE, lambda: run("-c", LOOP, *paths))],
            aims=AIMS.get(size, []),
            headline=size.suspects == 1000,
            axis=("suspects", size.suspects),
        )
    )
