"""Extraction: a student is trained on what the model answers, its scores or its labels alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from wmengine.attacks.data import Data, Inputs
from wmengine.attacks.training import cross_entropy, logits, placed, train
from wmengine.parts.fields import positive
from wmengine.suspects.weights import evaluating, unwrap

if TYPE_CHECKING:
    import numpy as np
    import torch


def distil(
    model: torch.nn.Module, data: Data, random: np.random.Generator, *, temperature: float, **options: Any
) -> torch.nn.Module:
    """A student of the model's scores: T² · KL(softmax(teacher / T) ‖ softmax(student / T)), T = temperature."""
    from torch.nn import functional

    warmth = positive("temperature", temperature)

    def loss(asked: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
        teacher, student = ((each.float() / warmth).log_softmax(dim=1) for each in (asked, answered))
        return warmth**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    return _taught(model, data, random, loss, **options)


def extract(model: torch.nn.Module, data: Data, random: np.random.Generator, **options: Any) -> torch.nn.Module:
    """A student of the model's labels, the classes of its highest scores."""
    return _taught(model, data, random, lambda asked, answered: cross_entropy(answered, asked.argmax(dim=1)), **options)


def _taught(
    model: torch.nn.Module,
    data: Data,
    random: np.random.Generator,
    loss: Any,
    *,
    epochs: int,
    rate: float,
    batch: int,
    student: torch.nn.Module | None,
) -> torch.nn.Module:
    """student: a torch module that begins as it is, of which a copy is trained; None for the model's architecture with
    every layer drawn anew. The model answers in eval mode."""
    import torch

    model.eval()
    if student is not None and not isinstance(student, torch.nn.Module):
        raise ValueError(f"student must be a torch module, and it is {type(student).__name__}")
    learner = copy.deepcopy(model if student is None else unwrap(student))
    if student is None:
        _draw_anew(learner)
    learner.to(next(model.parameters()).device)
    example = data.example()
    classes = []
    for each in (model, learner):
        with evaluating(each):
            classes.append(logits(each, placed(each, example)).shape[1])
    if classes[0] != classes[1]:
        raise ValueError(f"the model has {classes[0]} classes and student has {classes[1]}; give one of as many")

    def imitation(inputs: Inputs, _: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            asked = logits(model, placed(model, inputs))
        found: torch.Tensor = loss(asked, logits(learner, inputs))
        return found

    return train(learner, data, imitation, random, epochs=epochs, rate=rate, batch=batch)


def _draw_anew(model: torch.nn.Module) -> None:
    """Every layer as its own constructor draws it. Raises ValueError for parameters that no layer knows how to draw."""
    for path, module in model.named_modules():
        draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if draw is not None:
            draw()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{path or 'the model itself'} ({type(module).__name__}) has parameters and no reset_parameters(), so "
                "it cannot be drawn anew: give student=, a torch module of another start"
            )
