"""A training loop for those without one: Adam, its rate in one cycle, each batch mixed, progress on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from wmengine.attacks.training import MOST_EPOCHS, placed, to_terminal
from wmengine.parts.fields import integer, positive
from wmengine.suspects.weights import call

Metrics = Mapping[str, Mapping[str, float]]


def fit(
    model: torch.nn.Module,
    loader: Iterable[Any],
    mix: Callable[[Any, torch.Tensor], tuple[Any, torch.Tensor]],
    loss: Callable[..., torch.Tensor],
    metrics: Callable[[], Metrics],
    epochs: int,
    optimizer: torch.optim.Optimizer | None,
    rate: float,
) -> None:
    """Train a model in place, in train mode; its training flags come back. See `Embedder.fit`."""
    epochs, rate = integer("epochs", epochs, 1, MOST_EPOCHS), positive("rate", rate)
    schedule = None
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be one of torch.optim over the model's parameters, and it is {optimizer!r}")
    if optimizer is None:
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:  # of a DataLoader too, where its dataset says none
            batches = 0
        if batches == 0:
            raise ValueError("the loader says no number of batches, which a cycle of rates needs: give optimizer=")
        optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    training = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        for epoch in range(1, epochs + 1):
            value, most = None, 0
            for batch in loader:
                inputs, labels = separated(batch)
                inputs = placed(model, inputs)
                rows = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
                labels = labels.to(rows.device, None if labels.is_floating_point() else torch.int64)
                inputs, labels = mix(inputs, labels)
                most = max(most, len(labels))
                if len(labels) == 1 < most:  # no normalisation can be trained on the one row that is left over
                    if schedule is not None:
                        schedule.step()
                    continue
                named = inputs if isinstance(inputs, Mapping) else {"input": inputs}
                answers = call(model, {name: each.clone() for name, each in named.items()})  # it may write into them
                value = loss(answers, labels, inputs=inputs)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            if value is None:
                raise ValueError(f"the loader gave no batch in epoch {epoch}: give one that begins anew each time")
            if not math.isfinite(value.item()):
                raise ValueError(f"the loss is no longer finite in epoch {epoch}: choose a lower rate")
            marks = "".join(f", {name} {found['matched']}/{found['total']}" for name, found in metrics().items())
            to_terminal(f"\repoch {epoch} of {epochs}, loss {value.item():.4f}{marks}\033[K")
    finally:
        to_terminal("\r\033[K")
        optimizer.zero_grad()
        for module, was in training:
            module.training = was


def separated(batch: Any) -> tuple[Any, torch.Tensor]:
    """The inputs and labels of a batch: a pair, or a dict that holds `labels` beside inputs. Raises TypeError."""
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs: Any = {name: rows for name, rows in batch.items() if name != "labels"}
        labels = batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise TypeError("a batch must be (inputs, labels), or a dict that holds labels beside inputs")
    for rows in (labels, *(inputs.values() if isinstance(inputs, Mapping) else (inputs,))):
        if not isinstance(rows, torch.Tensor):
            raise TypeError(
                f"a batch must hold torch tensors, and {type(rows).__name__} is none: torch.from_numpy(...)"
            )
    return inputs, labels
