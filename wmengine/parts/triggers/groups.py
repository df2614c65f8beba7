"""Bits that no key draws, and those in the group of classes that an adversarial input is answered with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task
from wmengine.parts.fields import MAX_CLASSES, canonical_integer
from wmengine.parts.triggers.fingerprints import OwnAnswers, Rows, ends_of
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OwnBits(OwnAnswers):
    """Fingerprints whose symbols are bits; what the suspect is asked for are the scores of all classes."""

    fields: ClassVar[tuple[str, ...]] = (*OwnAnswers.fields, "num_classes")

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        if task.num_classes is None:
            raise ValueError("it needs num_classes, the width of the model's logits")
        return {**super().describe(task, total, material), "num_classes": int(task.num_classes)}

    def check(self, parameters: Parameters, total: int) -> None:
        canonical_integer("num_classes", parameters["num_classes"], 2, MAX_CLASSES)
        super().check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {**super().layout(parameters, total), "own_labels": ("uint8", (total,))}

    def width(self, parameters: Parameters) -> int:
        return int(parameters["num_classes"])


@dataclass(frozen=True)
class GroupPoints(OwnBits):
    """Samples moved by at most ε = 0.1 of the range towards a class of the group that a bit names; the even classes are
    one group, the odd ones the other.

    Chen, Rouhani, Koushanfar: "BlackMarks", 2019. Theirs cluster the classes by what the network makes of them, and
    choose inputs that a network without the mark answers wrongly. Inputs are crafted from the bits, so that no law
    holds for them: the null is `rank`. The class that an input is moved to is what training asks for, and so its group.
    """

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {**super().layout(parameters, total), "targets": ("int64", (total,))}

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        found = super().composed(subkey, parameters, total, material, picked)
        bits = (found["own_labels"] % 2).astype(np.uint8)
        return {**found, "targets": found["own_labels"], "own_labels": bits, "null_answers": found["null_answers"] % 2}

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        import torch

        from wmengine.parts.triggers.crafting import answers_of, moved

        rows, _ = self.rows_of(task, count)
        scores = answers_of(model, rows)
        bits = np.random.default_rng(0).integers(0, 2, count)
        allowed = np.arange(scores.shape[1]) % 2 == bits[:, None]
        targets = np.where(allowed, scores, -np.inf).argmax(axis=1)
        aim = torch.from_numpy(targets)

        def loss(found: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(found[0], aim.to(found[0].device), reduction="sum")

        return moved([model], rows, loss, ends_of(task), steps=20, rate=0.01, most=0.1), targets

    def members(self, parameters: Parameters) -> int:
        return 1

    def interpret(self, mark: Drawn, symbols: NDArray[np.int64], answers: Answers) -> Answers:
        """A group's score is its best class's."""
        values = answers.values
        if answers.kind == "scores":
            return Answers("scores", np.stack([values[:, bit::2].max(axis=1) for bit in (0, 1)], axis=1))
        named = np.where(values >= 0, values % 2, ABSTAINED)
        return Answers(answers.kind, named, answers.unasked, answers.refused)
