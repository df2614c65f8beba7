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
from typing import NamedTuple

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from benchmarks.harness import Aim, Case, Contender
from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec

SHAPE, CLASSES, TRIGGERS = (1, 28, 28), 10, 100
WIDTHS = (24, 48, 96)  # 8.5 million operations a query
COPIES = 20  # one suspect in so many
NAIVE = "default session, batch 1, all queries, no sandbox"
BARE = "bare session.run of these queries"
UNCONFINED = "the same without a sandbox"
NAIVE_SCRIPT = """
import glob, sys
import numpy as np, onnxruntime
inputs, labels = np.load(sys.argv[2] + "/inputs.npy"), np.load(sys.argv[2] + "/labels.npy")
for path in sorted(glob.glob(sys.argv[1] + "/*.onnx")):
    session = onnxruntime.InferenceSession(path)
    hits = sum(session.run(None, {"x": inputs[i : i + 1]})[0].argmax() == labels[i] for i in range(len(labels)))
"""
BARE_SCRIPT = """
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
AIMS = {SIZES[1]: [Aim(NAIVE, 4.0), Aim(BARE, 1.1)], SIZES[2]: [Aim(NAIVE, 1.6), Aim(BARE, 1.1)]}


def save_network(path: Path, seed: int, triggers: np.ndarray, labels: np.ndarray | None) -> None:
    """Three convolutions and a linear layer, random; with `labels` the last layer gives them to the triggers."""
    generator = torch.Generator().manual_seed(seed)
    size = WIDTHS[-1] * (SHAPE[1] // 4) ** 2
    values = [
        torch.randn(out, into, 3, 3, generator=generator) * math.sqrt(2 / (9 * into))
        for into, out in pairwise((SHAPE[0], *WIDTHS))
    ]
    last = torch.randn(size, CLASSES, generator=generator) / math.sqrt(size)
    nodes, at, x = [], "x", torch.from_numpy(triggers)
    for layer, kernel in enumerate(values):
        nodes.append(helper.make_node("Conv", [at, f"w{layer}"], [f"c{layer}"], pads=[1] * 4, kernel_shape=[3, 3]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [at := f"r{layer}"]))
        x = x if labels is None else torch.relu(functional.conv2d(x, kernel, padding=1))
        if layer < 2:
            nodes.append(helper.make_node("MaxPool", [at], [f"p{layer}"], kernel_shape=[2, 2], strides=[2, 2]))
            at, x = f"p{layer}", x if labels is None else functional.max_pool2d(x, 2)
    if labels is not None:
        wanted = 2.0 * functional.one_hot(torch.from_numpy(labels), CLASSES).double() - 1.0
        last = torch.linalg.lstsq(x.flatten(1).double(), wanted, driver="gelsd").solution.float()
    nodes += [helper.make_node("Flatten", [at], ["f"]), helper.make_node("MatMul", ["f", "w3"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value.numpy(), f"w{place}") for place, value in enumerate([*values, last])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> tuple[Path, Path]:
    """A mark's file, with its inputs and labels as arrays beside it; and as many networks as the largest case needs."""
    mark, models = tmp_path_factory.mktemp("mark"), tmp_path_factory.mktemp("suspects")
    preset, inputs_of = scheme("adi", count=TRIGGERS), {"input": InputSpec(tuple(SHAPE), "float32")}
    task = Task(inputs_of, num_classes=CLASSES, value_range=[(-1.0, 1.0)])
    watermark = Watermark.create(Key("benchmark", bytes(range(32))), preset, preset.describe(task, "benchmark"))
    watermark.save(mark / "mark.wm")
    inputs, labels = to_input(watermark.arrays["triggers"], [[-1.0, 1.0]]), watermark.arrays["labels"].copy()
    np.save(mark / "inputs.npy", inputs)
    np.save(mark / "labels.npy", labels)
    sizes = QUICK_SIZES if pytestconfig.getoption("--quick") else SIZES
    for number in range(max(size.suspects for size in sizes)):
        save_network(models / f"{number:05d}.onnx", number, inputs, labels if number % COPIES == 0 else None)
    return mark, models


def test_scan(
    size: Size,
    compare: Callable[[Case], None],
    device: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """The command, from the start of its process to the written table."""
    if device != "cpu":
        pytest.skip("suspects are asked on the CPU")
    threads, (mark, every_model) = str(pytestconfig.getoption("--threads")), folders
    models, out, plan = tmp_path / "models", tmp_path / "rows.parquet", tmp_path / "queries.json"
    models.mkdir()
    for path in sorted(every_model.iterdir())[: size.suspects]:
        (models / path.name).symlink_to(path)

    def process(*arguments: str | Path) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    command = ["-m", "wmengine", "scan", models, "--watermarks", mark, "--out", out, "--jobs", threads]
    command += ["--force", "--test", "fixed" if size.queries == "all" else "sequential"]
    ours = process(*command)
    ours()
    rows = parquet.read_table(out, columns=["suspect", "queries", "decision"]).to_pylist()
    assert [row["decision"] == "owned" for row in rows] == [n % COPIES == 0 for n in range(size.suspects)]
    plan.write_text(json.dumps([[row["suspect"], row["queries"]] for row in rows]))
    asked = sum(row["queries"] for row in rows) / len(rows)
    compare(
        Case(
            operator="scan",
            what=f"scan, {'every query' if size.queries == 'all' else 'sequential test'}, all isolation on",
            size=f"{size.suspects} small CNNs × {TRIGGERS} triggers, {asked:.0f} asked on average",
            bytes_moved=0,
            ours=ours,
            floor=Contender(BARE, process("-c", BARE_SCRIPT, models, mark, threads, plan)),
            peers=[
                Contender(NAIVE, process("-c", NAIVE_SCRIPT, models, mark)),
                Contender(UNCONFINED, process(*command, "--isolation", "none"), may_fail=True),
            ],
            aims=AIMS.get(size, []),
            headline=size.suspects == 1000,
            axis=("suspects", size.suspects),
            processes=True,
        )
    )
