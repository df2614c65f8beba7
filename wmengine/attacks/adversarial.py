"""Adversarial training: on the thief's own inputs, each moved a little to where the model errs most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wmengine.attacks.data import Data, Inputs
from wmengine.attacks.training import cross_entropy, floating, logits, placed, replaced, train
from wmengine.parts.fields import integer, positive

if TYPE_CHECKING:
    import numpy as np
    import torch

MOST_STEPS = 1 << 16
OVERSHOOT = 2.5  # of a radius that all steps together could go, so that its edge can be reached from any start

Range = tuple[float, float]


def adversarial(
    model: torch.nn.Module,
    data: Data,
    random: np.random.Generator,
    *,
    eps: float,
    steps: int,
    epochs: int,
    rate: float,
    batch: int,
) -> torch.nn.Module:
    """Train on the worst inputs within eps (Madry et al. 2018, equation 2.1): min E[max_δ L(x + δ, y)], |δ| ≤ eps.

    eps: of the range of the data, which no input leaves. δ is found by `steps` steps of projected gradient ascent, each
    2.5 · eps / steps along the gradient's sign, from a random start, the model in eval mode. Inputs that are integers
    stay as they are. Raises ValueError where all are.
    """
    import torch

    eps, steps = positive("eps", eps), integer("steps", steps, 1, MOST_STEPS)
    ranges: dict[str, Range] = {}
    for inputs, _ in data.batches(batch, torch.Generator().manual_seed(0)):
        for name, rows in floating("adversarial", placed(model, inputs)).items():
            low, high = ranges.get(name, (torch.inf, -torch.inf))
            ranges[name] = min(low, rows.min().item()), max(high, rows.max().item())

    def loss(inputs: Inputs, labels: torch.Tensor | None) -> torch.Tensor:
        worst = _worst(model, inputs, labels, ranges, eps, steps)
        return cross_entropy(logits(model, worst), labels)

    return train(model, data, loss, random, epochs=epochs, rate=rate, batch=batch)


def _worst(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | None,
    ranges: Mapping[str, Range],
    eps: float,
    steps: int,
) -> Inputs:
    import torch

    from wmengine.parts.training.second_pass import in_eval_mode

    radii = {name: eps * (high - low) for name, (low, high) in ranges.items()}
    ends = {  # of what each input may become
        name: ((rows - radii[name]).clamp(*ranges[name]), (rows + radii[name]).clamp(*ranges[name]))
        for name, rows in floating("adversarial", inputs).items()
    }
    moved = {name: torch.lerp(least, most, torch.rand_like(least)) for name, (least, most) in ends.items()}
    with in_eval_mode(model):
        for _ in range(steps):
            asked = {name: rows.detach().requires_grad_() for name, rows in moved.items()}
            value = cross_entropy(logits(model, replaced(inputs, asked)), labels)
            gradients = torch.autograd.grad(value, list(asked.values()), allow_unused=True, materialize_grads=True)
            for (name, rows), gradient in zip(asked.items(), gradients, strict=True):
                step = OVERSHOOT * radii[name] / steps
                moved[name] = (rows.detach() + step * gradient.sign()).clamp(*ends[name])
    return replaced(inputs, moved)
