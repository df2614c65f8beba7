"""Inputs that a network makes: moved by its gradients within the value range, for candidates of fingerprints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine.suspects.outputs import logits_of
from wmengine.suspects.weights import evaluating

Rows = NDArray[np.float32]


def answers_of(model: torch.nn.Module, rows: Rows) -> NDArray[np.float32]:
    """The logits [n, C] of rows [n, ...], in eval mode. Raises ValueError where the model answers otherwise."""
    like = next(model.parameters())
    with evaluating(model):
        chunks = [torch.tensor(part).to(like) for part in np.array_split(rows, max(1, len(rows) // 256))]
        parts = [logits_of(model(chunk)) for chunk in chunks]
    if not isinstance(parts[0], torch.Tensor) or parts[0].ndim != 2:
        what = list(parts[0].shape) if isinstance(parts[0], torch.Tensor) else type(parts[0]).__name__
        raise ValueError(f"it needs a model that answers logits [n, C], and this one answers {what}")
    return np.asarray(torch.cat(parts).float().cpu().numpy())


def moved(
    models: Sequence[torch.nn.Module],
    rows: Rows,
    loss: Callable[[list[torch.Tensor]], torch.Tensor],
    ends: tuple[Rows, Rows],
    *,
    steps: int,
    rate: float,
    most: float = 1.0,
) -> Rows:
    """Rows [n, ...] moved by Adam to lower the loss of the models' logits, each [n, C], summed over rows.

    ends: lo and hi, broadcast to the rows; rate and most, the largest change, are shares of the range between.
    """
    like = next(models[0].parameters())
    low, high, start = (torch.from_numpy(np.broadcast_to(each, rows.shape).copy()).to(like) for each in (*ends, rows))
    span = high - low
    change = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([change], rate)
    training = [(model, model.training) for model in models]
    needed = [(each, each.requires_grad) for model in models for each in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        with torch.enable_grad():
            for _ in range(steps):
                held = torch.clamp(start + span * change, low, high)
                value = loss([logits_of(model(held)).float() for model in models])
                (change.grad,) = torch.autograd.grad(value, [change])
                optimizer.step()
                with torch.no_grad():
                    change.clamp_(-most, most)
    finally:
        for model, was in training:
            model.train(was)
        for each, need in needed:
            each.requires_grad_(need)
    return np.asarray(torch.clamp(start + span * change.detach(), low, high).float().cpu().numpy())


def students(model: torch.nn.Module, rows: Rows, count: int, steps: int) -> list[torch.nn.Module]:
    """Networks of the model's architecture that learned its answers to the rows, from weights of their own."""
    like = next(model.parameters())
    inputs, taught = torch.from_numpy(rows).to(like), torch.from_numpy(answers_of(model, rows)).to(like).softmax(1)
    found = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for _ in range(count):
            student = copy.deepcopy(model).train().requires_grad_(True)
            for module in student.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            optimizer = torch.optim.Adam(student.parameters(), 2e-3)
            for _ in range(steps):
                chosen = torch.randint(len(inputs), (min(64, len(inputs)),))
                answered = logits_of(student(inputs[chosen])).float()
                lost = torch.nn.functional.cross_entropy(answered, taught[chosen].float())
                optimizer.zero_grad()
                lost.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            found.append(student.eval())
    return found


def neighbours(model: torch.nn.Module, count: int, share: float) -> list[torch.nn.Module]:
    """Copies of the model with Gaussian noise on every weight, `share` of its tensor's standard deviation."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        near = copy.deepcopy(model).eval()
        with torch.no_grad():
            for weight in near.parameters():
                if weight.numel() > 1:
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.add_(noise * (share * weight.std()))
        found.append(near)
    return found
