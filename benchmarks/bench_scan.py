"""`scan`: a thousand small networks, one in twenty a copy, as whole processes beside the loop that one writes first.

Everything counts: starting Python, importing, the sandbox, reading files, the table. The floor is a process that knows
beforehand how many queries each suspect will need, and runs exactly these in ONNX Runtime on as many threads.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import Aim, Case, Contender
from wmengine import ops
from wmengine.carriers import Tensor
from wmengine.judge import score_suspect
from wmengine.key import Key
from wmengine.sandbox import Limits
from wmengine.schemes import black_box_parameters, scheme
from wmengine.suspects.adapters import Adapter, adapters
from wmengine.suspects.onnx_file import Engine, OnnxSuspect, open_engine
from wmengine.triggers import to_input
from wmengine.watermark import Watermark

SHAPE, CLASSES, TRIGGERS = (1, 28, 28), 10, 100
WIDTHS = (24, 48, 96)  # 8.5 million operations a query
COPIES = 20  # one suspect in so many
NAIVE = "default session, batch 1, all queries, no sandbox"
BARE = "bare session.run of these queries"
UNCONFINED = "in this process"
COPY = "a copy of all triggers a suspect"
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
AIMS = {
    Size(1000, "sequential"): [Aim(NAIVE, 4.0), Aim(BARE, 1.1)],
    Size(1000, "all"): [Aim(NAIVE, 1.6), Aim(BARE, 1.1)],
}


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


class Mark(NamedTuple):
    """A folder with a mark's file, and with its inputs [TRIGGERS, *SHAPE] and labels as arrays beside it."""

    folder: Path
    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]


@pytest.fixture(scope="module")
def watermark(tmp_path_factory: pytest.TempPathFactory) -> Mark:
    folder = tmp_path_factory.mktemp("mark")
    parameters = black_box_parameters(scheme("adi", count=TRIGGERS), SHAPE, CLASSES, [[-1.0, 1.0]], "benchmark")
    mark = Watermark.create(Key("benchmark", bytes(range(32))), "adi", parameters)
    mark.save(folder / "mark.wm")
    inputs, labels = to_input(mark.arrays["triggers"], [[-1.0, 1.0]]), mark.arrays["labels"].copy()
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)
    return Mark(folder, inputs, labels)


@pytest.fixture(scope="module")
def suspects(
    tmp_path_factory: pytest.TempPathFactory, watermark: Mark, pytestconfig: pytest.Config
) -> tuple[Path, ...]:
    """As many networks as the largest case needs, one in COPIES a copy."""
    folder = tmp_path_factory.mktemp("suspects")
    sizes = QUICK_SIZES if pytestconfig.getoption("--quick") else SIZES
    paths = tuple(folder / f"{number:05d}.onnx" for number in range(max(size.suspects for size in sizes)))
    for number, path in enumerate(paths):
        save_network(path, number, watermark.inputs, watermark.labels if number % COPIES == 0 else None)
    return paths


def test_scan(
    size: Size,
    compare: Callable[[Case], None],
    device: str,
    watermark: Mark,
    suspects: Sequence[Path],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """The command, from the start of its process to the written table."""
    if device != "cpu":
        pytest.skip("suspects are asked on the CPU")
    threads = str(pytestconfig.getoption("--threads"))
    models = tmp_path / "models"
    models.mkdir()
    for path in suspects[: size.suspects]:
        (models / path.name).symlink_to(path)
    out, plan, paths = tmp_path / "rows.parquet", tmp_path / "queries.json", (str(models), str(watermark.folder))

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    command = [
        "-m",
        "wmengine",
        "scan",
        paths[0],
        "--watermarks",
        paths[1],
        "--out",
        str(out),
        "--force",
        "--jobs",
        threads,
    ]

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
            floor=Contender(BARE, lambda: run("-c", BARE_SCRIPT, *paths, threads, str(plan))),
            peers=[Contender(NAIVE, lambda: run("-c", NAIVE_SCRIPT, *paths))],
            aims=AIMS.get(size, []),
            headline=size.suspects == 1000,
            axis=("suspects", size.suspects),
            processes=True,
        )
    )


def test_a_model_in_the_sandbox(compare: Callable[[Case], None], device: str, watermark: Mark, tmp_path: Path) -> None:
    """One model after the other: read, loaded, opened, asked; in this process, in a kept worker, in a fresh one."""
    if device != "cpu":
        pytest.skip("suspects are asked on the CPU")
    path = tmp_path / "model.onnx"
    save_network(path, 0, watermark.inputs, None)
    kept = open_engine("persistent", Limits())

    def judge(engine: Engine) -> None:
        suspect = OnnxSuspect(path, engine=engine)
        suspect.adapters(SHAPE, [[-1.0, 1.0]])
        suspect.query(watermark.inputs, CLASSES)

    def in_a_kept_worker() -> None:
        assert kept.begin()
        judge(kept)

    def in_a_new_engine(isolation: str) -> None:
        engine = open_engine(isolation, Limits())
        try:
            judge(engine)
        finally:
            engine.close()

    threads = ops.get_num_threads()
    ops.set_num_threads(1)  # what a worker has
    try:
        compare(
            Case(
                operator="scan",
                what="one model in a persistent sandbox",
                size=f"a small CNN × {TRIGGERS} triggers",
                bytes_moved=0,
                ours=in_a_kept_worker,
                floor=Contender(UNCONFINED, lambda: in_a_new_engine("none")),
                peers=[Contender("a fresh sandbox for the model", lambda: in_a_new_engine("per-model"))],
                aims=[Aim(UNCONFINED, 5.0, more_ms=True)],
            )
        )
    finally:
        ops.set_num_threads(threads)
        kept.close()


class Echo:
    """A suspect whose answers cost nothing, so that what is left is the scoring: class 0, whatever it is asked."""

    name, sha256 = "echo", None

    def __init__(self) -> None:
        self.notes: list[str] = []

    def adapters(self, trigger_shape: Sequence[int], value_range: Any, every: bool = True) -> list[Adapter]:
        return adapters(self.name, "tensor(float)", [None, *trigger_shape], trigger_shape, value_range, every)

    def query(self, inputs: NDArray[Any], num_classes: int | None = None) -> NDArray[Any]:
        return np.zeros(len(inputs), np.int64)

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        return []

    def close(self) -> None:
        pass


@pytest.mark.parametrize("queries", ["sequential", "all"])
def test_scores(compare: Callable[[Case], None], device: str, quick: bool, queries: str) -> None:
    """What `scan` does beside inference: choose the triggers, put them together, count and judge the answers."""
    if device != "cpu":
        pytest.skip("scores are made on the CPU")
    suspects, marks = (2, 5) if quick else (100, 100)
    parameters = black_box_parameters(scheme("adi", count=TRIGGERS), SHAPE, CLASSES, [[-1.0, 1.0]], "benchmark")
    every = [Watermark.create(Key("benchmark", bytes([n] * 32)), "adi", parameters) for n in range(marks)]
    triggers = np.concatenate([to_input(mark.arrays["triggers"], [[-1.0, 1.0]]) for mark in every])
    bar = math.log10(suspects * marks) + 9.0

    def score() -> None:
        for _ in range(suspects):
            score_suspect(Echo(), every, queries, bar, every_adapter=False)

    def copies() -> None:
        for _ in range(suspects):
            triggers.copy()

    compare(
        Case(
            operator="scan",
            what=f"scores beside inference, {'every query' if queries == 'all' else 'sequential test'}",
            size=f"{suspects} suspects × {marks} watermarks of {TRIGGERS} triggers",
            bytes_moved=0,
            ours=score,
            floor=Contender(COPY, copies),
            aims=[Aim(COPY, 1000.0, more_ms=True)],
        )
    )
