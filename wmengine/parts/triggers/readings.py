"""Triggers for models that answer with no class: what they answer is read as symbols, the same for any suspect.

Abstract inputs as `adi`'s (Adi et al. 2018). Nothing of a reading knows a symbol: it is fixed by the key's geometry and
the parameters, so that the null is as exact as for classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.identity.subkeys import keyed_bits, keyed_labels
from wmengine.parts.base import Asks, Draw, Drawn, Layout, Need, Parameters, Task
from wmengine.parts.fields import MAX_BITS, MAX_CLASSES, canonical_float32_hex, canonical_integer, float32_hex, integer
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.suspects.adapters import Adapter
from wmengine.suspects.base import Answers, Inputs, Suspect

_LEAST_TARGETS, _MOST_CHOICES = 20, 256


class ReadTriggers:
    """What the three below have in common; answers are scores [n, width].

    asked: what is put to the suspect; for other inputs a class that asks otherwise, such as
    `class TextAnchors(Anchors): asked = TokenTriggers()`. own: the parameters that the reading adds to those.
    """

    needs = Need.ANSWERS
    asked: ClassVar[Asks] = AbstractTriggers()
    own: ClassVar[tuple[str, ...]]

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.asked.fields, *self.own)

    def describe(self, task: Task, total: int) -> Parameters:
        return self.asked.describe(task, total)

    def check(self, parameters: Parameters, total: int) -> None:
        self.asked.check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return self.asked.layout(parameters, total)

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        return self.asked.draw(subkey, parameters, total)

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return self.asked.ways(mark, suspect, every)

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        return self.asked.inputs(mark, way, start, stop)

    def examples(self, mark: Drawn) -> Inputs:
        return self.asked.examples(mark)

    def members(self, parameters: Parameters) -> int:
        return 1

    def width(self, parameters: Parameters) -> int:
        raise NotImplementedError

    def scored(self, answers: Any, symbols: Any, parameters: Parameters, arrays: Any) -> Any:
        """Scores [n, classes of the symbols] of answers [n, width] to the questions `symbols` int64 [n]: arrays, or
        tensors, differentiable, where the mark's arrays are tensors too."""
        raise NotImplementedError

    def interpret(self, mark: Drawn, symbols: NDArray[np.int64], answers: Answers) -> Answers:
        if answers.kind != "scores":
            width = self.width(mark.parameters)
            raise SuspectError(
                f"the mark reads the numbers of one output [N, {width}], and the suspect has none, has several, or "
                "leaves them on its GPU"
            )
        with np.errstate(all="ignore"):  # what is not finite names no symbol
            scores = self.scored(answers.values, symbols, mark.parameters, mark.arrays)
        return Answers("scores", scores, answers.unasked, answers.refused)


class OutputBits(ReadTriggers):
    """A bit for each trigger, at one output of a multi-label model [N, L] that the key picks: 1 is above 0.5 where all
    answers at hand are from 0 to 1, else above 0."""

    own = ("num_outputs",)

    def describe(self, task: Task, total: int) -> Parameters:
        if task.num_classes is None:
            raise ValueError("it needs num_classes, how many labels the model answers with")
        outputs = integer("num_classes", task.num_classes, 2, MAX_CLASSES)
        return {**super().describe(task, total), "num_outputs": outputs}

    def check(self, parameters: Parameters, total: int) -> None:
        canonical_integer("num_outputs", parameters["num_outputs"], 2, MAX_CLASSES)
        super().check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {**super().layout(parameters, total), "outputs": ("int64", (total,))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        outputs = keyed_labels(subkey("outputs"), total, parameters["num_outputs"])
        return {**super().draw(subkey, parameters, total), "outputs": outputs}

    def width(self, parameters: Parameters) -> int:
        return int(parameters["num_outputs"])

    def scored(self, answers: Any, symbols: Any, parameters: Parameters, arrays: Any) -> Any:
        module = _module(answers)
        rows = module.arange(len(answers), device=answers.device)
        outside = (answers < 0.0) | (answers > 1.0)  # what is NaN says nothing
        above = answers[rows, arrays["outputs"][symbols]][:, None] - 0.5 * ~outside.any()
        return module.concatenate([-above, above], 1)


@dataclass(frozen=True)
class Levels(ReadTriggers):
    """A level for each trigger of a regression's [N] or [N, 1], the nearest of `choices` evenly spaced ones: from the
    value that 5 % of the owner's targets are below to the one that 5 % are above."""

    choices: int = 10

    own: ClassVar[tuple[str, ...]] = ("choices", "targets")
    takes = ("targets",)

    def __post_init__(self) -> None:
        integer("choices", self.choices, 2, _MOST_CHOICES)

    def describe(self, task: Task, total: int) -> Parameters:
        """targets: [lo, hi], the lowest and the highest level. Raises ValueError without targets that differ."""
        if task.targets is None or len(task.targets) < _LEAST_TARGETS:
            raise ValueError(f"it needs samples=(inputs, targets), at least {_LEAST_TARGETS} floats that it learns")
        ordered = np.sort(task.targets)
        ends = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        levels = {"choices": int(self.choices), "targets": [float32_hex("targets", end) for end in ends]}
        return {**super().describe(task, total), **levels}

    def check(self, parameters: Parameters, total: int) -> None:
        canonical_integer("choices", parameters["choices"], 2, _MOST_CHOICES)
        ends = parameters["targets"]
        if type(ends) is not list or len(ends) != 2:
            raise ValueError(f"targets must be [lo, hi], and it is {ends!r}")
        low, high = (canonical_float32_hex("targets", end) for end in ends)
        if not low < high:
            raise ValueError(f"targets must differ, and 90 % of them are from {low} to {high}")
        super().check(parameters, total)

    def wanted(self, mark: Drawn) -> NDArray[np.float64]:
        """The level [N] that each trigger is to be answered with."""
        low, high = (float.fromhex(end) for end in mark.parameters["targets"])
        return np.linspace(low, high, mark.parameters["choices"])[mark.arrays["labels"]]

    def width(self, parameters: Parameters) -> int:
        return 1

    def scored(self, answers: Any, symbols: Any, parameters: Parameters, arrays: Any) -> Any:
        low, high = (float.fromhex(end) for end in parameters["targets"])
        steps = parameters["choices"] - 1
        levels = _module(answers).arange(steps + 1, device=answers.device)
        return -0.5 * ((answers - low) * (steps / (high - low)) - levels) ** 2


@dataclass(frozen=True)
class Anchors(ReadTriggers):
    """An anchor for each trigger of a model of embeddings [N, D], of `choices` that the key draws the one with the
    highest cosine: each of an anchor's numbers is +1 or −1."""

    choices: int = 16

    own: ClassVar[tuple[str, ...]] = ("choices", "dimensions")

    def __post_init__(self) -> None:
        integer("choices", self.choices, 2, _MOST_CHOICES)

    def describe(self, task: Task, total: int) -> Parameters:
        if task.num_classes is None:
            raise ValueError("it needs num_classes, the width of the model's embeddings")
        own = {"choices": int(self.choices), "dimensions": integer("num_classes", task.num_classes, 2, MAX_BITS)}
        return {**super().describe(task, total), **own}

    def check(self, parameters: Parameters, total: int) -> None:
        choices = canonical_integer("choices", parameters["choices"], 2, _MOST_CHOICES)
        dimensions = canonical_integer("dimensions", parameters["dimensions"], 2, MAX_BITS)
        if 4 * choices > 2**dimensions:
            raise ValueError(f"{dimensions} dimensions are too few for {choices} anchors: ask for fewer with choices=")
        super().check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        sizes = parameters["choices"], parameters["dimensions"]
        return {**super().layout(parameters, total), "anchors": ("float32", sizes)}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "anchors" float32 [choices, D]: of eight times as many rows the first that differ."""
        choices, dimensions = parameters["choices"], parameters["dimensions"]
        rows = keyed_bits(subkey("anchors"), 8 * choices * dimensions).reshape(-1, dimensions)
        first = np.sort(np.unique(rows, axis=0, return_index=True)[1])[:choices]
        return {**super().draw(subkey, parameters, total), "anchors": 2 * rows[first].astype(np.float32) - 1}

    def width(self, parameters: Parameters) -> int:
        return int(parameters["dimensions"])

    def scored(self, answers: Any, symbols: Any, parameters: Parameters, arrays: Any) -> Any:
        """Cosines times √D, so that of what is unmarked they have standard deviation 1."""
        lengths = (answers * answers).sum(1)[:, None] ** 0.5
        return (answers / (lengths + 1e-12)) @ arrays["anchors"].T


def _module(answers: Any) -> Any:
    """NumPy, or torch, whose arrays these are."""
    if isinstance(answers, np.ndarray):
        return np
    import torch

    return torch
