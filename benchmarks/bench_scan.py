"""`scan`: a thousand small networks, one in twenty a copy, as whole processes beside the loop that one writes first; on
a GPU sixty ResNet-18, beside the same scan on every core of the CPU.

Everything counts: starting Python, importing, the sandbox, reading files, the table. The floor is a process that knows
beforehand how many queries each suspect will need, and runs exactly these in ONNX Runtime on as many threads.
"""

from __future__ import annotations

import json
import math
import os
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
from torch.nn import functional

from benchmarks.harness import Aim, Case, Contender
from benchmarks.robustness.cifar10 import resnet
from wmengine.identity.key import Key
from wmengine.marking.export import export_onnx
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec
from wmengine.suspects.devices import check_device, session_providers

SHAPE, PICTURES, CLASSES, TRIGGERS = (1, 28, 28), (3, 32, 32), 10, 100
WIDTHS = (24, 48, 96)  # 8.5 million operations a query
COPIES = 20  # one suspect in so many
NAIVE = "default session, batch 1, all queries, no sandbox"
BARE = "bare session.run of these queries"
UNCONFINED, ON_THE_CPU = "the same without a sandbox", "the same on the CPU"
RESNETS, AT_A_TIME = 60, 4  # suspects on a GPU, and how many it judges at a time
NAIVE_SCRIPT = """
import glob, sys
import numpy as np, onnxruntime
inputs, labels = np.load(sys.argv[2] + "/inputs.npy"), np.load(sys.argv[2] + "/labels.npy")
for path in sorted(glob.glob(sys.argv[1] + "/*.onnx")):
    session = onnxruntime.InferenceSession(path)
    x = session.get_inputs()[0].name
    hits = sum(session.run(None, {x: inputs[i : i + 1]})[0].argmax() == labels[i] for i in range(len(labels)))
"""
BARE_SCRIPT = """
import json, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
name, settings = json.loads(sys.argv[3])
from concurrent.futures import ThreadPoolExecutor
import numpy as np, onnxruntime
inputs = np.load(sys.argv[2] + "/inputs.npy")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
def judge(item):
    path, queries = item
    session = onnxruntime.InferenceSession(path, options, providers=[(name, settings)])
    assert session.get_providers()[0] == name
    x = session.get_inputs()[0].name
    for start in range(0, queries, 32):
        session.run(None, {x: inputs[start : min(start + 32, queries)]})
with ThreadPoolExecutor(int(sys.argv[4])) as pool:
    list(pool.map(judge, json.load(open(sys.argv[5]))))
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


def save_mark(folder: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A mark's file, with its inputs and labels as arrays beside it; both."""
    preset, inputs_of = scheme("adi", count=TRIGGERS), {"input": InputSpec(shape, "float32")}
    task = Task(inputs_of, num_classes=CLASSES, value_range=[(-1.0, 1.0)] * shape[0])
    watermark = Watermark.create(Key("benchmark", bytes(range(32))), preset, preset.describe(task, "benchmark"))
    watermark.save(folder / "mark.wm")
    ranges = [[-1.0, 1.0]] * shape[0]
    inputs, labels = to_input(watermark.arrays["triggers"], ranges), watermark.arrays["labels"].copy()
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)
    return inputs, labels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> tuple[Path, Path]:
    """A mark; and as many networks as the largest case needs."""
    mark, models = tmp_path_factory.mktemp("mark"), tmp_path_factory.mktemp("suspects")
    inputs, labels = save_mark(mark, SHAPE)
    sizes = QUICK_SIZES if pytestconfig.getoption("--quick") else SIZES
    for number in range(max(size.suspects for size in sizes)):
        save_network(models / f"{number:05d}.onnx", number, inputs, labels if number % COPIES == 0 else None)
    return mark, models


def save_resnets(models: Path, count: int, inputs: np.ndarray, labels: np.ndarray, device: str) -> None:
    """ResNet-18, one in twenty with small noise on weights that learned the mark, the others random."""
    model = resnet(1, (64, 128, 256, 512), blocks=2).to(device).train()
    x, y = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    made = onnx.load(export_onnx(model.cpu(), x[:1].cpu(), models / "made.onnx"))
    (models / "made.onnx").unlink()
    learned = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    for number in range(count):
        random = np.random.default_rng(number)
        for tensor in made.graph.initializer:
            values = learned[tensor.name]
            if values.dtype == np.float32 and values.ndim > 1:
                size = 1e-3 * values.std() if number % COPIES == 0 else math.sqrt(2 / values[0].size)
                drawn = size * random.standard_normal(values.shape, np.float32)
                values = (values if number % COPIES == 0 else 0.0) + drawn
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(made, models / f"{number:05d}.onnx")


def compare_scans(
    compare: Callable[[Case], None], models: Path, mark: Path, folder: Path, test: str, where: str, jobs: int,
    cores: int, **told: Any,
) -> None:  # fmt: skip
    """The command, from the start of its process to the written table, on `where`, a suspect at a time for each job."""
    out, plan, count = folder / "rows.parquet", folder / "queries.json", len(list(models.iterdir()))
    (provider,) = session_providers(where, None)

    def process(*arguments: str | Path) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    command = ["-m", "wmengine", "scan", models, "--watermarks", mark, "--out", out, "--force", "--test", test]
    here = ["--jobs", str(jobs), "--device", where]
    ours = process(*command, *here)
    ours()
    rows = parquet.read_table(out, columns=["suspect", "queries", "decision"]).to_pylist()
    assert [row["decision"] == "owned" for row in rows] == [n % COPIES == 0 for n in range(count)]
    plan.write_text(json.dumps([[row["suspect"], row["queries"]] for row in rows]))
    asked = sum(row["queries"] for row in rows) / len(rows)
    if where == "cpu":
        rivals = [
            Contender(NAIVE, process("-c", NAIVE_SCRIPT, models, mark)),
            Contender(UNCONFINED, process(*command, *here, "--isolation", "none"), may_fail=True),
        ]
    else:
        rivals = [Contender(ON_THE_CPU, process(*command, "--jobs", str(cores)))]
    asked_for = json.dumps([provider, {}] if isinstance(provider, str) else provider)
    compare(
        Case(
            operator="scan",
            what=f"scan, {'every query' if test == 'fixed' else 'sequential test'}, all isolation on",
            size=f"{count} {told.pop('networks')} × {TRIGGERS} triggers, {asked:.0f} asked on average",
            bytes_moved=0,
            ours=ours,
            floor=Contender(BARE, process("-c", BARE_SCRIPT, models, mark, asked_for, str(jobs), plan)),
            peers=rivals,
            processes=True,
            **told,
        )
    )


def test_scan(
    size: Size,
    compare: Callable[[Case], None],
    device: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    if device != "cpu":
        pytest.skip("a GPU is asked for larger networks")
    mark, every_model = request.getfixturevalue("folders")
    threads, models = pytestconfig.getoption("--threads"), tmp_path / "models"
    models.mkdir()
    for path in sorted(every_model.iterdir())[: size.suspects]:
        (models / path.name).symlink_to(path)
    test, told = "fixed" if size.queries == "all" else "sequential", {"networks": "small CNNs"}
    told |= {"aims": AIMS.get(size, []), "headline": size.suspects == 1000, "axis": ("suspects", size.suspects)}
    compare_scans(compare, models, mark, tmp_path, test, "cpu", threads, threads, **told)


def test_scan_on_a_gpu(compare: Callable[[Case], None], device: str, quick: bool, tmp_path: Path) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    try:
        check_device("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    models, mark = tmp_path / "models", tmp_path / "mark"
    models.mkdir()
    mark.mkdir()
    save_resnets(models, 3 if quick else RESNETS, *save_mark(mark, PICTURES), device)
    cores = len(os.sched_getaffinity(0))
    told = {"networks": "ResNet-18", "headline": True}
    compare_scans(compare, models, mark, tmp_path, "sequential", "cuda", AT_A_TIME, cores, **told)
