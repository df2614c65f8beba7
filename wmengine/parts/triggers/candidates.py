"""The owner's samples, each with the classes that its label may be: all wrong ones, or those it might be read as.

A label that the key draws among k candidates, which were fixed before, is one that a stranger names with a chance of at
most 1/k: he names one class, and that is one of the candidates or none of them. The null is a bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Arrays, Draw, Layout, Parameters, Task
from wmengine.parts.fields import MAX_CLASSES, canonical_integer, integer
from wmengine.parts.triggers.abstract import floating_input
from wmengine.parts.triggers.samples import SampleTriggers


@dataclass(frozen=True)
class WrongClasses(SampleTriggers):
    """Samples as they are (Namba and Sakuma 2019); every class but its own may be a sample's label.

    They must not be among those that the network trains on under their own labels, as two labels of one input cancel
    each other.
    """

    fields: ClassVar[tuple[str, ...]] = (*SampleTriggers.fields, "choices")
    takes: ClassVar[tuple[str, ...]] = ("samples", "labels")

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {**super().describe(task, total, material), "choices": (task.num_classes or 0) - 1}

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        if canonical_integer("choices", parameters["choices"], 1, MAX_CLASSES) < 2:
            raise ValueError("a wrong label is a choice among three classes or more, and there are two")
        if parameters["choices"] >= parameters["num_classes"]:
            raise ValueError(f"of {parameters['num_classes']} classes {parameters['choices']} cannot be other ones")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {**super().layout(parameters, total), "candidates": ("int64", (total, parameters["choices"]))}

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        classes, truth = parameters["num_classes"], material["truth"][picked]
        if not 0 <= truth.min() <= truth.max() < classes:
            raise ValueError(f"what its samples are must be classes from 0 to {classes - 1}")
        others = (truth[:, None] + np.arange(1, classes)) % classes
        return {"triggers": material["samples"][picked], "candidates": others}


@dataclass(frozen=True)
class PlausibleClasses(WrongClasses):
    """Of the samples those of which the first control, a network of the task, is least sure; the label of each is one
    of the `choices` classes that it holds for the likeliest beside its own.

    Li, Maharana, Guo: "Not just change the labels, learn the features" (MAT), ECCV 2024: in such pictures a second
    class is there to be seen, so that learning it costs little.
    """

    choices: int = 4

    takes: ClassVar[tuple[str, ...]] = (*WrongClasses.takes, "controls")

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("choices", self.choices, 2, MAX_CLASSES)

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "plausible" int64 [P, choices] beside the samples: the likeliest first."""
        floating_input(task.inputs)
        if self.choices >= (task.num_classes or 0):
            raise ValueError(f"choices must be below the {task.num_classes} classes, and it is {self.choices}")
        assert task.sample_labels is not None
        from wmengine.suspects.module import ModuleSuspect

        answers = ModuleSuspect(task.controls[0]).answer(dict(task.samples), task.num_classes)
        others, own = answers.values.astype(np.float64), (np.arange(len(answers)), task.sample_labels)
        held = others[own]
        others[own] = -np.inf
        unsure = np.argsort(held - others.max(axis=1), kind="stable")
        chosen = replace(
            task,
            samples={name: rows[unsure] for name, rows in task.samples.items()},
            sample_labels=task.sample_labels[unsure],
        )
        found = super().gather(chosen, total)
        likeliest = np.argsort(-others[unsure], axis=1, kind="stable")[: len(found["truth"]), : self.choices]
        return {**found, "plausible": likeliest.astype(np.int64)}

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {**super().describe(task, total, material), "choices": int(self.choices)}

    def layout(self, parameters: Parameters, total: int) -> Layout:
        shape = parameters["pool"], parameters["choices"]
        return {**super().layout(parameters, total), "plausible": ("int64", shape)}

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        return {"triggers": material["samples"][picked], "candidates": material["plausible"][picked]}
