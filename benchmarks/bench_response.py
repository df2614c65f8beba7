"""What `response` costs: a training step over a plain one, a served batch over the model's own, and a reading of 4,096
probes over the model's own answers to them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import wmengine
from benchmarks.harness import Aim, Case, Contender
from benchmarks.robustness.cifar10 import resnet
from wmengine.parts.responses.pattern import contrasts, directions
from wmengine.parts.responses.reading import told, unexplained
from wmengine.suspects import open_suspect

CLASSES, BATCH, PROBES = 10, 128, 4096
KEY = wmengine.Key("benchmark", bytes(32))
PLAIN, MODEL, ANSWERS = "plain step", "the model itself", "the model's answers"


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_step(compare: Callable[[Case], None], device: str, quick: bool) -> None:
    x = pictures(8 if quick else BATCH).to(device)
    y = torch.arange(len(x), device=device) % CLASSES
    model, base = resnet(1).to(device).train(), resnet(2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    embedder = wmengine.Embedder(
        model,
        KEY,
        [wmengine.scheme("response", probes=256)],
        num_classes=CLASSES,
        sample=x,
        name="benchmark",
        samples=pictures(256),
        controls=[base],
    )
    kept = embedder.features(x)

    def step(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss = loss_of(model(x))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return run

    compare(
        Case(
            operator="response",
            what="training step with response, features kept",
            size=f"{len(x)} pictures",
            bytes_moved=0,
            ours=step(lambda logits: embedder.loss(logits, y, features=kept)),
            floor=Contender(PLAIN, step(lambda logits: torch.nn.functional.cross_entropy(logits, y))),
            peers=[Contender("features anew", step(lambda logits: embedder.loss(logits, y, inputs=x)))],
            aims=[Aim(PLAIN, 1.02)],
            seconds=10.0,
        )
    )


def service(model: torch.nn.Module, probes: int) -> Any:
    return wmengine.response(
        model,
        KEY,
        num_classes=CLASSES,
        sample=pictures(8),
        name="benchmark",
        probes=pictures(256),
        scheme=wmengine.scheme("response", probes=probes, views=1),
    )


@pytest.mark.parametrize("batch", [1, BATCH])
def test_service(batch: int, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    if quick and batch == BATCH:
        pytest.skip("a quick run serves one picture at a time")
    model, x = resnet(1).to(device).eval(), pictures(batch).to(device)
    served = service(model, 256)

    def plain() -> None:
        with torch.no_grad():
            model(x)

    compare(
        Case(
            operator="response",
            what="a served batch",
            size=f"{batch} pictures",
            bytes_moved=0,
            ours=lambda: served(x),
            floor=Contender(MODEL, plain),
            peers=[Contender("features by a pass of their own", lambda: (plain(), plain()))],
            seconds=4.0,
        )
    )


def test_reading(compare: Callable[[Case], None], device: str, quick: bool) -> None:
    if device != "cpu":
        pytest.skip("answers are read on the CPU")
    count, model = 256 if quick else PROBES, resnet(1).eval()
    mark = service(model, count).watermark()
    rows = np.array(next(iter(mark.preset.source.examples(mark).values())))

    def one_by_one() -> None:
        with torch.no_grad():
            for row in torch.from_numpy(rows).split(1):
                model(row)

    compare(
        Case(
            operator="response",
            what="verify, everything included",
            size=f"{count} probes",
            bytes_moved=0,
            ours=lambda: wmengine.verify(model, mark),
            floor=Contender(ANSWERS, lambda: open_suspect(model).answer({"input": rows}, CLASSES)),
            peers=[Contender("the model asked one by one", one_by_one)],
            seconds=10.0,
        )
    )


def test_reading_of_answers(compare: Callable[[Case], None], device: str, quick: bool) -> None:
    """What `verify` adds to a model's own answers: 10,000 probes in six views, three controls."""
    if device != "cpu":
        pytest.skip("answers are read on the CPU")
    count, random = (512 if quick else 60_000), np.random.default_rng(0)
    preset = wmengine.scheme("response")
    bits, features = preset.options["bits"], preset.options["features"]
    arrays = {
        "features": random.standard_normal((count, features)).clip(-3, 3).astype(np.float32),
        "answers": random.standard_normal((3, count, CLASSES)).astype(np.float32),
        "directions": random.integers(0, 17, (bits, features), np.uint8),
        "contrasts": random.integers(0, 17, (bits, CLASSES), np.uint8),
    }
    mark: Any = SimpleNamespace(arrays=arrays)
    every, said = np.arange(count), told(random.standard_normal((count, CLASSES)))
    ways = directions(arrays["directions"]).T

    def bent() -> None:
        for start in range(0, count, 2048):
            np.tanh(arrays["features"][start : start + 2048].astype(np.float64) @ ways)

    def at_once() -> None:
        phi = np.tanh(arrays["features"].astype(np.float64) @ ways)
        rest = unexplained(said, arrays["answers"])
        ((phi - phi.mean(axis=0)).T @ rest * contrasts(arrays["contrasts"])).sum(axis=1)

    compare(
        Case(
            operator="response",
            what="reading of answers that are there",
            size=f"{count:,} answers",
            bytes_moved=0,
            ours=lambda: preset.source.observed(mark, every, said),
            floor=Contender("tanh of every probe along every direction", bent),
            peers=[Contender("all inputs at once", at_once)],
            seconds=10.0,
        )
    )
