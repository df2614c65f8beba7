"""Networks that were made without a mark, to tell it from what all networks of a task have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wmengine._optional import require

if TYPE_CHECKING:
    import torch


def controls(
    base: torch.nn.Module,
    inputs: Any,
    *,
    students: Sequence[torch.nn.Module | None] = (None,),
    epochs: int = 10,
    seed: int = 0,
) -> list[torch.nn.Module]:
    """The base and students of its labels: controls that `response` is read well against, as its copies are students.

        known = wmengine.controls(base, x, students=[None, small_network])
        emb = wmengine.Embedder(model, key, ["response"], controls=known, samples=probes, …)

    base: an unmarked network of the owner's, such as the finished one that is marked next; inputs: those that it was
    trained on, a tensor [n, ...], or batches of them, no labels; students: networks that begin as they are, of which
    copies are trained, None for the base's architecture drawn anew; one of another architecture tells more of copies
    that are of another one. Each is trained for `epochs` on the base's answers. Raises ValueError for what cannot be.
    """
    require("torch", extra="train")
    from wmengine.attacks import run

    taught = (run("extract", base, inputs, seed=seed, student=each, epochs=epochs) for each in students)
    return [base, *taught]
