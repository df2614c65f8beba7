"""Networks that were made without a mark, to tell it from what all networks of a task have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wmengine._optional import require

if TYPE_CHECKING:
    import torch


def controls(
    base: torch.nn.Module,
    inputs: Any,
    *,
    student: torch.nn.Module | None = None,
    epochs: int = 10,
    seed: int = 0,
) -> list[torch.nn.Module]:
    """[base, a student of its labels]: the controls that `response` is read best against, as its copies are students.

        marks = Embedder(model, key, ["response"], controls=wmengine.controls(base, x), samples=probes, …)

    base: an unmarked network of the owner's, such as the finished one that is marked next; inputs: those that it was
    trained on, a tensor [n, ...], no labels; student: a smaller network that begins as it is, of which a copy is
    trained; None for the base's architecture drawn anew. It takes `epochs` of training on the base's answers.
    Raises ValueError for what cannot be trained.
    """
    require("torch", extra="train")
    from wmengine.attacks import run

    return [base, run("extract", base, inputs, seed=seed, student=student, epochs=epochs)]
