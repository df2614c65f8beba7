"""Pairs of a sample that the network was trained on and one that it was not: a copy is surer of the first, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_bits
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task
from wmengine.parts.statistics.rank import NULL_ANSWERS
from wmengine.parts.triggers.abstract import floating_input
from wmengine.parts.triggers.families import of_whole_families
from wmengine.parts.triggers.fingerprints import LABELLED, POOLED, OwnAnswers
from wmengine.parts.triggers.groups import OwnBits
from wmengine.parts.triggers.samples import keyed_picks
from wmengine.suspects.adapters import Adapter, to_input, to_levels
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers, Inputs


@dataclass(frozen=True)
class MemberPairs(OwnBits):
    """Two samples of one class, of which the network was trained on one: the first half of the samples are such, the
    second half not. The bit says where of the two, as the key orders them, the trained one is; read is of which the
    suspect is surer, by the score of the right class above the highest other one, or of which alone it is right.

    Maini, Yaghini, Papernot: "Dataset inference: ownership resolution in machine learning", ICLR 2021, whose measure is
    the distance to the boundary, asked for with many questions each ("Blind Walk"), in a test of two samples. Private
    and public ones are alike to a stranger only where both were drawn alike, which nobody can check: so the suspect
    ranks among networks that saw neither.
    """

    takes: ClassVar[tuple[str, ...]] = LABELLED

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "samples" uint8 [2P, ...], "truth" int64 [2P]: pairs, of each the trained one first; "pool_answers" int64
        [m, P]: 1 where a control is surer of the other one. Raises ValueError where no pair has a class in common."""
        from wmengine.parts.triggers.crafting import answers_of

        assert task.sample_labels is not None
        floating_input(task.inputs)
        (rows,) = task.samples.values()
        trained, other = np.split(task.sample_labels[: len(rows) // 2 * 2], 2)
        pairs = [
            pair
            for label in np.unique(trained)
            for pair in zip(
                np.flatnonzero(trained == label), len(trained) + np.flatnonzero(other == label), strict=False
            )
        ]
        if not pairs:
            raise ValueError("the first half of its samples, trained on, and the second have no class in common")
        chosen = np.array(sorted(pairs)[: self.pool // 2]).reshape(-1)
        levels, truth = to_levels(rows[chosen].astype(np.float32), task.value_range or ()), task.sample_labels[chosen]
        put = to_input(levels, task.value_range or ())
        surer = [_margins(answers_of(each, put), truth).reshape(-1, 2).argmax(axis=1) for each in task.controls]
        return {"samples": levels, "truth": truth.astype(np.int64), POOLED: np.stack(surer).astype(np.int64)}

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        found = super().describe(task, total, material)
        return {**found, "pool": found["pool"] // 2}

    def layout(self, parameters: Parameters, total: int) -> Layout:
        held = super().layout(parameters, total)
        for name in ("triggers", "samples", "truth"):
            dtype, (count, *sizes) = held[name]
            held[name] = dtype, (2 * count, *sizes)
        return {**held, "classes": ("int64", (2 * total,))}

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "triggers" uint8 [2N, ...] and their "classes" int64 [2N], pair after pair: which, and in what order."""
        assert material is not None
        truth = material["truth"]
        if not 0 <= truth.min() <= truth.max() < parameters["num_classes"]:
            raise ValueError(f"what its samples are must be classes from 0 to {parameters['num_classes'] - 1}")
        picked = keyed_picks(subkey("samples"), total, parameters["pool"])
        place = keyed_bits(subkey("order"), total)
        places = (2 * picked[:, None] + (np.arange(2) ^ place[:, None])).reshape(-1)
        return {
            "triggers": material["samples"][places],
            "classes": truth[places],
            "own_labels": place,
            NULL_ANSWERS: material[POOLED][:, picked] ^ place,
        }

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        return OwnAnswers.inputs(self, mark, way, 2 * start, 2 * stop)

    def members(self, parameters: Parameters) -> int:
        return 2

    def interpret(self, mark: Drawn, symbols: NDArray[np.int64], answers: Answers) -> Answers:
        classes = mark.arrays["classes"].reshape(-1, 2)[symbols]
        if answers.kind == "scores":
            values: NDArray[Any] = _margins(answers.values, classes.reshape(-1)).reshape(-1, 2).astype(np.float32)
        else:
            named = answers.values.reshape(len(symbols), 2, -1)
            right = named == classes[:, :, None]
            silent = (named == ABSTAINED).any(axis=1) | (right[:, 0] == right[:, 1])
            values = np.where(silent, ABSTAINED, right.argmax(axis=1))
            values = values[:, 0] if answers.kind == "labels" else values
        unasked, refused = (of_whole_families(each, 2) for each in (answers.unasked, answers.refused))
        return Answers(answers.kind, values, unasked, refused)


def _margins(scores: NDArray[Any], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far above the highest other one the score [n, C] of each row's class is, [n]."""
    others, own = scores.astype(np.float64), (np.arange(len(scores)), classes)
    found = others[own]
    others[own] = -np.inf
    with np.errstate(invalid="ignore"):
        return np.asarray(found - others.max(axis=1))
