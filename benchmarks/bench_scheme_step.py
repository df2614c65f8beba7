"""A training step with each scheme of the robustness tables' digits, against plain steps, and what entangling costs of
its step. Measured with one thread, as the tables' networks are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.bench_training_step import case_of, demo_network
from benchmarks.harness import Aim, Case, Contender, differentiate
from benchmarks.results import step_name
from benchmarks.robustness.problems import DIGITS
from wmengine import ops
from wmengine.parts.training.second_pass import ROWS

ENTANGLED, WHOLE_STEP = "ewe_keyed", "its whole step"
FEATURES = (1024, 512, 128)  # that go into the last three layers of the demo's network


@pytest.mark.parametrize("scheme", DIGITS.presets)
def test_step_of_a_scheme(scheme: str, compare: Callable[[Case], None], device: str, quick: bool) -> None:
    if quick and scheme != ENTANGLED:
        pytest.skip("a quick run measures one scheme")
    compare(replace(digits_case(scheme, device), seconds=6.0))  # some differ by a few per cent only


def test_share_of_entangling(compare: Callable[[Case], None], device: str) -> None:
    step = digits_case(ENTANGLED, device)
    features = [torch.rand(2 * ROWS, width, device=device, requires_grad=True) for width in FEATURES]
    kinds, one = torch.arange(2 * ROWS, device=device) < ROWS, torch.ones((), device=device)

    def entangle() -> None:
        each = [ops.soft_nearest_neighbor(layer, kinds, one, distance="cosine") for layer in features]
        differentiate(features, torch.stack(each).mean())

    compare(
        Case(
            operator="scheme_step",
            what=f"loss of {ENTANGLED} over three layers, forward and backward",
            size=f"{2 * ROWS} rows",
            bytes_moved=0,
            ours=entangle,
            floor=Contender(WHOLE_STEP, step.ours),
            peers=step.peers,
            aims=[Aim(WHOLE_STEP, 0.15)],
        )
    )


def digits_case(scheme: str, device: str) -> Case:
    """The demo's network with one scheme, on the first digits."""
    x, y = (rows.to(device) for rows in DIGITS.load(None).owner)
    made, preset = partial(demo_network, device), DIGITS.preset(scheme)
    return case_of(
        "scheme_step",
        step_name(scheme),
        made,
        [preset],
        (x[:64], y[:64]),
        samples=(x, y),
        controls=[made()[0]] if "controls" in preset.needs else [],
        value_range=DIGITS.value_range,
    )
