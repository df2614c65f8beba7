"""A training step of a ResNet-18 for pictures of 32 × 32 with both marks, compiled and not, against plain steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.bench_training_step import CLASSES, SAME_ROWS, case_of
from benchmarks.harness import Aim, Case, Contender, compiled
from benchmarks.robustness.cifar10 import resnet

BOUND = 1.03  # of the plain step


@pytest.mark.parametrize("whole", [False, True], ids=["eager", "compiled"])
def test_step_of_a_resnet(whole: bool, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    """On a GPU as one trains there: 512 pictures, bfloat16 by autocast, channels last."""
    on_gpu = device != "cpu"
    inputs = torch.rand(4 if quick else 512 if on_gpu else 32, 3, 32, 32).to(device)
    if on_gpu:
        inputs = inputs.to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (len(inputs),)).to(device)
    made = partial(resnet_18, device, (8, 16) if quick else (64, 128, 256, 512))
    what, given = "training step of a ResNet-18 with both marks", (made, ["sketch", "adi"], (inputs, labels))

    def eager(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.autocast("cuda", torch.bfloat16)(function) if on_gpu else function  # type: ignore[no-any-return]

    case = case_of("resnet_step", what, *given, eager, aims=[Aim(SAME_ROWS, BOUND)])
    if whole and not quick:
        slower = Contender("not compiled", case.ours)
        case = case_of("resnet_step", f"{what}, compiled", *given, lambda f: compiled(eager(f)), aims=case.aims)
        case = replace(case, peers=[*case.peers, slower] if on_gpu else [slower])
    compare(replace(case, seconds=18.0 if on_gpu else 60.0, gpu_bound=BOUND, headline=on_gpu and whole))


def resnet_18(device: str, widths: Sequence[int]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """With the optimizer of He et al. 2016."""
    model = resnet(1, widths, blocks=2).to(device).train()
    if device != "cpu":
        model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
