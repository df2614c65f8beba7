"""A training step of the demo's network with both marks, against a plain step with as many extra rows, and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import wmengine
from benchmarks.harness import Aim, Case, Contender
from wmengine.demo import build_network
from wmengine.marks.preset import Preset

CLASSES = 10
SAME_ROWS, FEWER_ROWS = "plain step with as many extra rows", "plain step without extra rows"


class Size(NamedTuple):
    """Task rows of a batch; the embedder adds its trigger rows to them."""

    batch: int


SIZES = [Size(16), Size(64), Size(256)]
QUICK_SIZES = [Size(16)]

Step = Callable[[], None]


def test_training_step(size: Size, compare: Callable[[Case], None], device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(size.batch, 1, 8, 8, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (size.batch,), generator=generator).to(device)
    compare(
        case_of(
            "training_step",
            "training step of the demo's network with both marks",
            partial(demo_network, device),
            ["sketch", "adi"],
            (inputs, labels),
            aims=[Aim(SAME_ROWS, 1.10)] if size.batch >= 64 else [],
            headline=size.batch == 64,
            axis=("rows", size.batch),
        )
    )


def case_of(
    operator: str,
    what: str,
    made: Callable[[], tuple[torch.nn.Module, torch.optim.Optimizer]],
    schemes: Sequence[str | Preset],
    batch: tuple[Tensor, Tensor],
    together: Callable[..., Any] = lambda function: function,
    *,
    aims: Sequence[Aim] = (),
    headline: bool = False,
    axis: tuple[str, int] | None = None,
    **given: Any,
) -> Case:
    """A marked step beside the two plain ones. together: what becomes of model and loss; given: to Embedder."""
    (inputs, labels), (model, optimizer) = batch, made()
    key = wmengine.Key("benchmark", bytes(32))
    embedder = wmengine.Embedder(model, key, schemes, num_classes=CLASSES, sample=inputs, name="benchmark", **given)
    loss_of = together(lambda x, y: embedder.loss(model(x), y, inputs=x))

    def marked_step() -> None:
        loss = loss_of(*embedder.mix(inputs, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    longer, raised = embedder.mix(inputs, labels)
    return Case(
        operator=operator,
        what=what,
        size=f"{len(inputs)} rows + {len(longer) - len(inputs)} trigger rows",
        bytes_moved=0,
        ours=marked_step,
        floor=Contender(SAME_ROWS, plain_step(made(), longer, raised % CLASSES, together)),
        peers=[Contender(FEWER_ROWS, plain_step(made(), inputs, labels, together))],
        aims=aims,
        headline=headline,
        axis=axis,
    )


def plain_step(
    made: tuple[torch.nn.Module, torch.optim.Optimizer],
    inputs: Tensor,
    labels: Tensor,
    together: Callable[..., Any] = lambda function: function,
) -> Step:
    """The step of somebody who marks nothing."""
    model, optimizer = made
    loss_of = together(lambda x, y: functional.cross_entropy(model(x), y))

    def step() -> None:
        loss = loss_of(inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def demo_network(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The demo's network as it is before training, and the demo's optimizer."""
    model = build_network(seed=1).to(device).train()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)
