"""The training loop of every attack that trains: Adam on a loss of the thief's batches, whole or one layer only."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wmengine.attacks.data import Data, Inputs
from wmengine.parts.fields import integer, positive
from wmengine.suspects.outputs import logits_of
from wmengine.suspects.weights import call, module_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

MOST_EPOCHS = MOST_ROWS = 1 << 20
WARMING = 10  # steps until the rate is reached

Loss = Callable[[Inputs, "torch.Tensor | None"], "torch.Tensor"]


def train(
    model: torch.nn.Module,
    data: Data,
    loss: Loss,
    random: np.random.Generator,
    *,
    epochs: int,
    rate: float,
    batch: int,
    layer: torch.nn.Module | None = None,
) -> torch.nn.Module:
    """Train a model in place, in train mode, and return it.

    loss: of a batch's inputs and labels (int64 [n], or None), both on the model's device. layer: train this one alone,
    with all else, the statistics of normalisations too, as it is. Raises ValueError for settings that cannot work, and
    where the loss is no longer finite.
    """
    import torch

    epochs = integer("epochs", epochs, 1, MOST_EPOCHS)
    batch, rate = integer("batch", batch, 1, MOST_ROWS), positive("rate", rate)
    chosen = [each for each in (layer or model).parameters() if each.is_floating_point()]
    needed = {each: each.requires_grad for each in model.parameters()}
    generator = torch.Generator().manual_seed(int(random.integers(1 << 63)))
    optimizer = torch.optim.Adam(chosen, rate)
    # Adam's first steps move every weight by the whole rate, whatever its gradient, which costs a trained model points.
    warming = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMING, total_iters=WARMING - 1)
    model.requires_grad_(False).train(layer is None)
    for each in chosen:
        each.requires_grad_()
    with torch.enable_grad():
        for epoch in range(1, epochs + 1):
            most = 0
            for inputs, labels in data.batches(batch, generator):
                inputs, most = placed(model, inputs), max(most, rows_of(inputs))
                if rows_of(inputs) == 1 < most:  # no normalisation can be trained on the one row that is left over
                    continue
                if labels is not None:
                    labels = labels.to(_device(model), None if labels.is_floating_point() else torch.int64)
                torch.clear_autocast_cache()  # inside a caller's autocast it would hold the weights of the first step
                value = loss(inputs, labels)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                warming.step()
            if not math.isfinite(value.item()):
                raise ValueError(
                    f"the loss is no longer finite at rate={rate:g}: choose a lower one, or give the model in float32"
                )
            to_terminal(f"\repoch {epoch} of {epochs}, loss {value.item():.4f}\033[K")
    to_terminal("\r\033[K")
    optimizer.zero_grad()
    for each, need in needed.items():
        each.requires_grad_(need)
    return model


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The mean over rows, in float32."""
    from torch.nn import functional

    return functional.cross_entropy(logits.float(), checked(labels, *logits.shape))


def checked(labels: torch.Tensor | None, rows: int, classes: int) -> torch.Tensor:
    """Raises ValueError for labels that are not one class for each row."""
    assert labels is not None
    kind, wrong = f"{labels.dtype} {list(labels.shape)}", (labels < 0) | (labels >= classes)
    if labels.is_floating_point() or tuple(labels.shape) != (rows,):
        raise ValueError(f"labels must be one class number for each input, integers [{rows}], and they are {kind}")
    if bool(wrong.any()):
        known = f"from 0 to {classes - 1}, the classes that the model has"
        raise ValueError(f"labels must be {known}, and one is {labels[wrong][0].item()}")
    return labels


def logits(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """[n, C], what a model answers, of several outputs the logits (see `logits_of`). A dict of inputs is given by name.
    Raises ValueError where the answer has another shape."""
    answer = logits_of(call(model, inputs) if isinstance(inputs, Mapping) else model(inputs))
    shape = list(getattr(answer, "shape", ()))
    if len(shape) != 2 or shape[0] != rows_of(inputs):
        raise ValueError(f"an attacked model must answer logits [{rows_of(inputs)}, C], and this one answers {shape}")
    found: torch.Tensor = answer
    return found


def placed(model: torch.nn.Module, inputs: Inputs) -> Inputs:
    """Inputs on the model's device, floats in its own type."""
    device, dtype = _device(model), next((each.dtype for each in model.parameters() if each.is_floating_point()), None)

    def put(rows: torch.Tensor) -> torch.Tensor:
        return rows.to(device, dtype if rows.is_floating_point() else None, copy=True)

    return {name: put(rows) for name, rows in inputs.items()} if isinstance(inputs, Mapping) else put(inputs)


def last_layer(model: torch.nn.Module, data: Data) -> Any:
    """The convolution or linear layer that runs last. Raises ValueError for a model without one."""
    example = placed(model, data.example())
    every = module_tensors(model, example if isinstance(example, Mapping) else {"": example})
    found = [each for each in every if each.name == "weight"]
    if not found:
        raise ValueError("the model runs through no convolution and no linear layer, so it has no last layer")
    return model.get_submodule(found[-1].path)


def rows_of(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def floating(name: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Those inputs by name ("" without one) that an attack of this name can move a little. Raises ValueError where all
    are integers."""
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    found = {each: rows for each, rows in named.items() if rows.is_floating_point()}
    if not found:
        raise ValueError(f"{name} moves inputs a little, so at least one of them must be of floating-point numbers")
    return found


def replaced(inputs: Inputs, moved: Mapping[str, torch.Tensor]) -> Inputs:
    """The inputs with some of them, by name, in place of what they were."""
    return {**inputs, **moved} if isinstance(inputs, Mapping) else moved[""]


def joined(*parts: Inputs) -> Inputs:
    """The rows of all parts, one part after another."""
    import torch

    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)


def _device(model: torch.nn.Module) -> Any:
    return next((each.device for each in model.parameters()), None)


def to_terminal(message: str) -> None:
    """Progress goes to stderr, and only to a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(message, end="", file=sys.stderr, flush=True)
