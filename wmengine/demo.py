"""The demo: mark a small network that reads digits, make the copies a thief would make, and prove whose they are.

Everything is real and small: the 1,797 handwritten digits that scikit-learn ships, one network with a white-box and a
black-box mark, one without, and every copy an ONNX file that `wmengine.verify` judges as it would judge a stranger's.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmengine import attacks
from wmengine._optional import require
from wmengine.attacks import run
from wmengine.identity.key import Key
from wmengine.judging.verification import verify_all
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.tails import paired_difference_interval
from wmengine.report import html
from wmengine.report.demo import DemoResult, Kind, Row, page, print_table
from wmengine.suspects import open_suspect

if TYPE_CHECKING:
    import torch

    from wmengine.marking.embedder import Embedder
else:
    torch = require("torch", extra="demo")

__all__ = ["DemoResult", "load_digits", "print_table", "run_demo", "train"]

OWNER = "ACME Vision"
NAME = "digit-reader"
CLASSES = 10
ALPHA = 1e-9
TRAINING, ELSEWHERE = 897, 300  # what the owner trains on, and what only the thief has; the other 600 test everybody

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much of everything: epochs of training and of the thief's fine-tuning, and other keys to compare with."""

    epochs: int
    thief_epochs: int
    other_keys: int


FULL = Effort(epochs=30, thief_epochs=10, other_keys=100)
QUICK = Effort(epochs=15, thief_epochs=3, other_keys=10)


class Data(NamedTuple):
    """Images float32 [n, 1, 8, 8] in [0, 1] and labels int64 [n]: the owner's, the thief's own, and the test's."""

    owner: tuple[torch.Tensor, torch.Tensor]
    thief: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def to_terminal(message: str) -> None:
    """Progress goes to stderr, and only to a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def run_demo(
    out_dir: str | os.PathLike[str] = "wmengine-demo", quick: bool = False, progress: Progress = to_terminal
) -> DemoResult:
    """Run the demo and write report.html, table.json, the marks, the key and the models into `out_dir`.

    quick: fewer epochs and fewer other keys, with the same proofs. A demo.key that is already there is used again,
    and then the whole demo repeats itself; otherwise one is made. Raises ImportError naming the extra where a package
    is missing.
    """
    started = time.perf_counter()
    effort = QUICK if quick else FULL
    out = Path(out_dir)
    models = out / "models"
    models.mkdir(parents=True, exist_ok=True)
    key = _demo_key(out / "demo.key")
    data = load_digits()
    with torch.random.fork_rng(devices=[]), _one_thread():
        progress(f"training a marked network and an independent one on {TRAINING} digits, {effort.epochs} epochs each")
        marked, marks = _train_marked(data, key, effort)
        independent = train(build_network(seed=2), data.owner, effort.epochs, seed=2)
        progress("making the copies that a thief would make")
        suspects = list(_make_suspects(marked, independent, data, effort, models))
    for mark in marks:
        mark.save(out / f"{mark.scheme}.wm", overwrite=True)
    rows, predictions = [], []
    for suspect in suspects:
        progress(f"verifying {suspect.path.name}")
        predictions.append(_predictions(suspect.path, data.test[0].numpy()))
        rows.append(_judge(suspect, predictions[-1], data.test[1].numpy(), marks, key))
    progress(f"scoring the marked network with {effort.other_keys} other keys")
    others = tuple(_matches_of_other_keys(suspects[0].path, marks, effort.other_keys))
    progress("writing the report")
    result = DemoResult(
        rows=tuple(rows),
        accuracy_cost=_accuracy_cost(predictions[1], predictions[0], data.test[1].numpy()),
        others=others,
        training_images=TRAINING,
        thief_images=ELSEWHERE,
        test_images=len(data.test[1]),
        seconds=time.perf_counter() - started,
        report=out / "report.html",
        table=out / "table.json",
    )
    digits, digit_labels = (values[:20].numpy() for values in data.owner)
    html.write(result.report, page(result, marks, digits, digit_labels))
    html.write(result.table, json.dumps(result.to_json(), indent=1) + "\n")
    return result


def load_digits() -> Data:
    """scikit-learn's 1,797 scans of handwritten digits, shuffled the same way every time and split in three."""
    images, labels = require("sklearn.datasets", extra="demo").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy((images[order] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
    y = torch.from_numpy(labels[order].astype(np.int64))
    ends = [0, TRAINING, TRAINING + ELSEWHERE, len(labels)]
    return Data(*((x[start:end], y[start:end]) for start, end in pairwise(ends)))


def build_network(seed: int) -> torch.nn.Sequential:
    """Three convolutions with BatchNorm and two linear layers: 159,264 weights that can carry a mark."""
    nn = torch.nn
    torch.manual_seed(seed)

    def block(channels_in: int, channels: int) -> list[torch.nn.Module]:
        return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def train(
    model: torch.nn.Sequential,
    data: tuple[torch.Tensor, torch.Tensor],
    epochs: int,
    seed: int,
    embedder: Embedder | None = None,
) -> torch.nn.Sequential:
    """An ordinary training loop, Adam with a one-cycle schedule; with an embedder, two of its lines are different."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, epochs=epochs, steps_per_epoch=-(-len(data[1]) // 64)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data[1]), generator=generator)
        for start in range(0, len(order), 64):
            x, y = (values[order[start : start + 64]] for values in data)
            if embedder is None:
                loss = torch.nn.functional.cross_entropy(model(x), y)
            else:
                x, y = embedder.mix(x, y)
                loss = embedder.loss(model(x), y, inputs=x)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """On one thread, so that a busy machine costs little and the number of its cores changes no result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Suspect(NamedTuple):
    model: str
    made: str
    path: Path
    kind: Kind = "copy"


def _demo_key(path: Path) -> Key:
    if path.exists():
        return Key.load(path)
    key = Key.generate(OWNER)
    key.save(path)
    return key


def _train_marked(data: Data, key: Key, effort: Effort) -> tuple[torch.nn.Sequential, list[Watermark]]:
    from wmengine.marking.embedder import Embedder

    model = build_network(seed=1)
    sample = data.owner[0][:64]
    embedder = Embedder(
        model, key, ["sketch", "adi"], num_classes=CLASSES, sample=sample, name=NAME, value_range=(0.0, 1.0)
    )
    train(model, data.owner, effort.epochs, seed=1, embedder=embedder)
    return model, embedder.watermarks()


def _make_suspects(
    marked: torch.nn.Sequential, independent: torch.nn.Sequential, data: Data, effort: Effort, folder: Path
) -> Iterator[_Suspect]:
    """Every model as an ONNX file: the marked one, the independent one, then the copies."""
    from wmengine.marking.export import export_onnx

    example = data.owner[0][:1]

    def export(model: torch.nn.Sequential, name: str, fold_batchnorm: bool = False) -> Path:
        path = folder / f"{name}.onnx"
        export_onnx(model, example, path, fold_batchnorm=fold_batchnorm)
        return path

    original = export(marked, "marked")
    yield _Suspect("marked network", "the owner's, as trained with both marks", original)
    made = "the same recipe and data with another seed, and no marks"
    yield _Suspect("independent network", made, export(independent, "independent"), "stranger")
    tuned = attacks.run("ftal", marked, data.thief, epochs=effort.thief_epochs, seed=3)
    made = f"all layers trained for {effort.thief_epochs} epochs on {ELSEWHERE} digits that the owner never used"
    yield _Suspect("fine-tuned", made, export(tuned, "fine-tuned"))
    made = "the smaller half of all weights set to zero"
    yield _Suspect("pruned 50 %", made, export(run("prune", marked, share=0.5), "pruned"))
    halved = run("fp16", original, out=folder / "float16.onnx", overwrite=True)
    yield _Suspect("float16", "ONNX Runtime's float16 tool", halved)
    folded = export(marked, "folded", fold_batchnorm=True)
    quantised = run("int8", folded, data.owner[0][:128], out=folder / "int8.onnx", overwrite=True)
    yield _Suspect("int8 QDQ", "folded, then ONNX Runtime's static quantizer, calibrated on 128 digits", quantised)
    yield _Suspect("BatchNorm folded", "the exporter folds each BatchNorm into the convolution before it", folded)
    made = "every tensor, node, input and output of the file has a new name"
    yield _Suspect("tensors renamed", made, run("rename", original, out=folder / "renamed.onnx", overwrite=True))
    taught = attacks.run("distil", marked, data.thief, epochs=effort.epochs, seed=4)
    made = f"a new network, trained on the scores that the marked one gives to those {ELSEWHERE} digits"
    yield _Suspect("distilled", made, export(taught, "distilled"), "student")
    taught = attacks.run("extract", marked, data.thief[0], epochs=effort.epochs, seed=4)
    made = "the same, from its labels alone"
    yield _Suspect("extracted by labels", made, export(taught, "extracted"), "student")


def _predictions(path: Path, images: NDArray[np.float32]) -> NDArray[np.int64]:
    answers = open_suspect(path).answer({"input": images}, CLASSES)
    return np.asarray(answers.values.argmax(axis=1), dtype=np.int64)


def _judge(
    suspect: _Suspect, predicted: NDArray[np.int64], labels: NDArray[np.int64], marks: list[Watermark], key: Key
) -> Row:
    white_box, black_box = verify_all(suspect.path, marks, key=key, alpha=ALPHA)
    return Row(
        model=suspect.model,
        made=suspect.made,
        file=f"models/{suspect.path.name}",
        kind=suspect.kind,
        accuracy=float((predicted == labels).mean()),
        white_box=white_box,
        black_box=black_box,
    )


def _matches_of_other_keys(path: Path, marks: list[Watermark], count: int) -> Iterator[tuple[int, int]]:
    """What marks made alike with other people's keys find in the marked network: chance, and nothing else."""
    keys = [
        Key(f"somebody else {number}", hashlib.sha256(f"wmengine demo {number}".encode()).digest())
        for number in range(count)
    ]
    found = [
        verify_all(path, [Watermark.create(other, mark.preset, mark.parameters) for other in keys], alpha=ALPHA)
        for mark in marks
    ]
    for bits, hits in zip(*found, strict=True):
        yield bits.matched, hits.matched


def _accuracy_cost(
    without: NDArray[np.int64], marked: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    only_without = int(((without == labels) & (marked != labels)).sum())
    only_marked = int(((marked == labels) & (without != labels)).sum())
    return paired_difference_interval(only_without, only_marked, len(labels))
