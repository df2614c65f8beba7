"""WRK: a few perturbed rows with wrong labels, and a last layer drawn anew, shift the boundaries a mark lives on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wmengine.attacks.data import Data, Inputs
from wmengine.attacks.training import (
    checked,
    cross_entropy,
    floating,
    joined,
    last_layer,
    logits,
    placed,
    replaced,
    rows_of,
    train,
)
from wmengine.parts.fields import positive

if TYPE_CHECKING:
    import numpy as np
    import torch


def wrk(
    model: torch.nn.Module,
    data: Data,
    random: np.random.Generator,
    *,
    share: float,
    step: float,
    shift: float,
    epochs: int,
    rate: float,
    batch: int,
) -> torch.nn.Module:
    """Watermark removal (Xiao et al. 2025), of the copy that an extraction made.

    A share of the rows takes one step of the gradient's sign, `step` times the range of its batch and within that, to
    where the score of one random class rises, and is labelled with a random class that is not its own. Then the last
    layer W is drawn anew and all is trained on the data with that share mixed in, on cross entropy plus shift · Σ W∘W₀
    of the weights W₀ that it had.

    As in the authors' code: 10 epochs, rate, batch and shift, 128 perturbed of 2,500 rows (share), and a step of 2 in
    units of normalised CIFAR-10, whose range is about 4. Settled here: Adam in place of SGD with momentum and a cosine,
    whose few steps on a small data set remove less; class 0 is a wrong label too. Raises ValueError for inputs that are
    integers only.
    """
    import torch

    share, step, shift = positive("share", share), positive("step", step), positive("shift", shift)
    if share > 1.0:
        raise ValueError(f"share must be above 0 and at most 1, and it is {share}")
    generator = torch.Generator().manual_seed(int(random.integers(1 << 63)))
    model.eval()
    parts, wrong = [], []
    for inputs, labels in data.batches(batch, generator):
        count = _part(share, rows_of(inputs))
        rows, classes = _across(model, placed(model, _at(inputs, slice(count))), random, step)
        labels = checked(labels, rows_of(inputs), classes)
        parts.append(rows)
        wrong.append((labels[:count].cpu() + torch.from_numpy(random.integers(1, classes, count))) % classes)
    perturbed, others = joined(*parts), torch.cat(wrong)
    last = last_layer(model, data)
    before = last.weight.detach().clone()
    last.reset_parameters()

    def loss(inputs: Inputs, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        chosen = torch.from_numpy(random.integers(len(others), size=_part(share, len(labels))))
        mixed = joined(inputs, _at(perturbed, chosen))
        term: torch.Tensor = (last.weight * before).sum()
        return cross_entropy(logits(model, mixed), torch.cat([labels, others[chosen].to(labels)])) + shift * term

    return train(model, data, loss, random, epochs=epochs, rate=rate, batch=batch)


def _part(share: float, rows: int) -> int:
    return min(rows, max(1, round(share * rows)))


def _across(model: torch.nn.Module, inputs: Inputs, random: np.random.Generator, step: float) -> tuple[Inputs, int]:
    """The inputs after their step, and the number of classes."""
    import torch

    floats, moved = {name: rows.requires_grad_() for name, rows in floating("wrk", inputs).items()}, {}
    with torch.enable_grad():
        scores = logits(model, inputs)
        classes = scores.shape[1]
        gradients = torch.autograd.grad(scores[:, random.integers(classes)].sum(), list(floats.values()))
    for (name, rows), gradient in zip(floats.items(), gradients, strict=True):
        low, high = rows.detach().aminmax()
        moved[name] = (rows.detach() + step * (high - low) * gradient.sign()).clamp(low, high)
    return replaced(inputs, moved), classes


def _at(inputs: Inputs, place: slice | torch.Tensor) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: rows[place] for name, rows in inputs.items()}
    return inputs[place]
