"""Training steps with marks, against plain steps with as many extra rows, and without: the demo's network with each
scheme of the robustness tables' digits, a ResNet-18, and what entangling costs of its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import wmengine
from benchmarks.harness import Aim, Case, Contender, compiled, differentiate
from benchmarks.results import step_name
from benchmarks.robustness.cifar10 import resnet
from benchmarks.robustness.problems import DIGITS
from wmengine import ops
from wmengine.demo import build_network
from wmengine.marks.preset import Preset
from wmengine.parts.training.second_pass import ROWS

CLASSES = 10
SAME_ROWS, FEWER_ROWS = "plain step with as many extra rows", "plain step without extra rows"
ENTANGLED, WHOLE_STEP = "ewe_keyed", "its whole step"
FEATURES = (1024, 512, 128)  # that go into the last three layers of the demo's network


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
            "training step of the demo's network with both marks",
            partial(demo_network, device),
            ["sketch", "adi"],
            (inputs, labels),
            aims=[Aim(SAME_ROWS, 1.10)] if size.batch >= 64 else [],
            headline=size.batch == 64,
            axis=("rows", size.batch),
        )
    )


@pytest.mark.parametrize("scheme", DIGITS.presets)
def test_step_of_a_scheme(scheme: str, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    if quick and scheme != ENTANGLED:
        pytest.skip("a quick run measures one scheme")
    compare(digits_case(scheme, device))


def test_share_of_entangling(compare: Callable[[Case], None], device: str) -> None:
    step = digits_case(ENTANGLED, device)
    features = [torch.rand(2 * ROWS, width, device=device, requires_grad=True) for width in FEATURES]
    kinds, one = torch.arange(2 * ROWS, device=device) < ROWS, torch.ones((), device=device)

    def entangle() -> None:
        each = [ops.soft_nearest_neighbor(layer, kinds, one, distance="cosine") for layer in features]
        differentiate(features, torch.stack(each).mean())

    compare(
        Case(
            operator="training_step",
            what=f"loss of {ENTANGLED} over three layers, forward and backward",
            size=f"{2 * ROWS} rows",
            bytes_moved=0,
            ours=entangle,
            floor=Contender(WHOLE_STEP, step.ours),
            peers=step.peers,
            aims=[Aim(WHOLE_STEP, 0.15)],
        )
    )


@pytest.mark.parametrize("whole", [False, True], ids=["eager", "compiled"])
def test_step_of_a_resnet(whole: bool, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(4 if quick else 64, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (len(inputs),), generator=generator).to(device)
    made = partial(resnet_18, device, (8, 16) if quick else (64, 128, 256, 512))
    what = f"training step of a ResNet-18 with both marks{', compiled' * whole}"
    aims = [Aim(SAME_ROWS, 1.03)]
    together = compiled if whole and not quick else lambda function: function
    compare(case_of(what, made, ["sketch", "adi"], (inputs, labels), together, aims=aims, headline=True))


def case_of(
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
    loss_of = together(lambda x, y: embedder.loss(model(x), y))

    def marked_step() -> None:
        loss = loss_of(*embedder.mix(inputs, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    longer, raised = embedder.mix(inputs, labels)
    return Case(
        operator="training_step",
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


def digits_case(scheme: str, device: str) -> Case:
    """The demo's network with one scheme, on the first digits."""
    x, y = (rows.to(device) for rows in DIGITS.load(None).owner)
    made, presets = partial(demo_network, device), [DIGITS.preset(scheme)]
    return case_of(step_name(scheme), made, presets, (x[:64], y[:64]), samples=(x, y), value_range=DIGITS.value_range)


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


def resnet_18(device: str, widths: Sequence[int]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """For pictures of 32 × 32, with the optimizer of He et al. 2016."""
    model = resnet(1, widths, blocks=2).to(device).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
