"""A training step of a ResNet-18 for pictures of 32 × 32 with both marks, compiled and not, against plain steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.bench_training_step import CLASSES, SAME_ROWS, case_of
from benchmarks.harness import Aim, Case, Contender, compiled
from benchmarks.robustness.cifar10 import resnet


@pytest.mark.parametrize("whole", [False, True], ids=["eager", "compiled"])
def test_step_of_a_resnet(whole: bool, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(4 if quick else 32, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (len(inputs),), generator=generator).to(device)
    made = partial(resnet_18, device, (8, 16) if quick else (64, 128, 256, 512))
    what, given = "training step of a ResNet-18 with both marks", (made, ["sketch", "adi"], (inputs, labels))
    case = case_of("resnet_step", what, *given, aims=[Aim(SAME_ROWS, 1.03)])
    if whole and not quick:
        eager = Contender("not compiled", case.ours)
        case = replace(case_of("resnet_step", f"{what}, compiled", *given, compiled, aims=case.aims), peers=[eager])
    compare(replace(case, seconds=60.0))


def resnet_18(device: str, widths: Sequence[int]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """With the optimizer of He et al. 2016."""
    model = resnet(1, widths, blocks=2).to(device).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
