"""One label for a whole family of triggers: a pseudo-class, which a network can learn, and a copy of it too, as it does
any class of the task.

Many members of each family are asked, and their answers are read as one. Families are drawn from the key before any
label, so the null is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task, inputs_of
from wmengine.parts.fields import canonical_integer, integer
from wmengine.parts.triggers.pictures import abstract_images
from wmengine.parts.triggers.samples import SampleTriggers, keyed_picks
from wmengine.suspects.adapters import Adapter, to_input
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers, Inputs

_MOST = 1024  # members of a family


@dataclass(frozen=True)
class Families(SampleTriggers):
    """A family is a picture drawn from the key, with a texture, palette and shapes of its own, over each of `family` of
    the owner's samples, which are a quarter of what is seen.

    Xiao, Ye, Liang, Li, Li, Zheng, Hu: "Class-feature watermark", arXiv 2511.07947, 2025. Theirs is one class of
    samples from elsewhere with one label, whose chance for a stranger nobody knows; here each family has its own label.
    """

    family: int = 20

    fields: ClassVar[tuple[str, ...]] = (*SampleTriggers.fields, "family")

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("family", self.family, 1, _MOST)

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {**super().describe(task, total, material), "family": int(self.family)}

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, canonical_integer("family", parameters["family"], 1, _MOST))

    def layout(self, parameters: Parameters, total: int) -> Layout:
        held = super().layout(parameters, total)
        pictures = held.pop("triggers")  # which are made when they are put
        return {**held, "pictures": pictures, "parts": ("int64", (total * parameters["family"],))}

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "pictures" uint8 [N, *shape], one of each family; "parts" int64 [N · family]: where in the pool the members'
        samples are, a family after the other, in each every sample once."""
        order = keyed_picks(subkey("samples"), parameters["pool"], parameters["pool"])
        (sizes,) = (each["shape"] for each in parameters["inputs"])
        return {
            "pictures": abstract_images(philox_key(subkey("pictures")), total, sizes),
            "parts": order[np.arange(total * parameters["family"]) % len(order)],
        }

    def triggers(self, mark: Drawn, start: int, stop: int) -> NDArray[np.uint8]:
        """The members from start to stop, uint8 [n, *shape]."""
        arrays, rows = mark.arrays, np.arange(start, stop)
        pictures = arrays["pictures"][rows // mark.parameters["family"]].astype(np.uint16)
        return np.asarray((arrays["samples"][arrays["parts"][rows]] + 3 * pictures) // 4, np.uint8)

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        (name,), family = inputs_of(mark.parameters), mark.parameters["family"]
        rows = self.triggers(mark, start * family, stop * family)
        return {name: way.inputs(rows, mark.parameters["value_range"])}

    def examples(self, mark: Drawn) -> dict[str, NDArray[np.float32]]:
        (name,) = inputs_of(mark.parameters)
        return {name: to_input(self.triggers(mark, 0, len(mark.arrays["parts"])), mark.parameters["value_range"])}

    def members(self, parameters: Parameters) -> int:
        return int(parameters["family"])

    def width(self, parameters: Parameters) -> int:
        return int(parameters["num_classes"])

    def interpret(self, mark: Drawn, symbols: NDArray[np.int64], answers: Answers) -> Answers:
        """Of scores the mean of the members' standardised rows, of labels the one that most members have, and none
        where two have as many."""
        members = mark.parameters["family"]
        values = answers.values.reshape(len(symbols), members, -1)
        if answers.kind == "scores":
            read = _mean_of_rows(values.astype(np.float64))
        else:
            read = np.stack([_majority(values[:, :, output]) for output in range(values.shape[2])], axis=1)
            if answers.kind == "labels":
                read = read[:, 0]
        unasked, refused = (of_whole_families(each, members) for each in (answers.unasked, answers.refused))
        return Answers(answers.kind, read, unasked, refused)


def _mean_of_rows(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 [n, C] of [n, members, C], so that equal ones stay equal however they were summed. A row that is not
    finite, or whose scores are all equal, says nothing."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        centred = scores - scores.mean(axis=2, keepdims=True)
        rows = centred / np.sqrt(np.square(centred).mean(axis=2, keepdims=True))
        said = np.isfinite(rows).all(axis=2, keepdims=True)
        mean = np.where(said, rows, 0.0).sum(axis=1) / said.sum(axis=1)  # 0 / 0 where none says anything
    return np.asarray(mean, np.float32)


def _majority(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] of [n, members]."""
    found = np.full(len(labels), ABSTAINED, np.int64)
    for place, row in enumerate(labels):
        named, counts = np.unique(row[row != ABSTAINED], return_counts=True)
        if (counts == counts.max(initial=1)).sum() == 1:
            found[place] = named[counts.argmax()]
    return found


def of_whole_families(reasons: Mapping[int, str], members: int) -> dict[int, str]:
    """The families of which no member was answered, and why."""
    counted = Counter(row // members for row in reasons)
    return {row // members: why for row, why in reasons.items() if counted[row // members] == members}
