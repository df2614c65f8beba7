"""The keyed symbols: bits, labels of the task's classes, or of choices, iid uniform and drawn by SHAKE-256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.canonical import check_name
from wmengine.identity.subkeys import keyed_bits, keyed_labels
from wmengine.parts.base import Arrays, Layout, Parameters, Task
from wmengine.parts.fields import MAX_BITS, MAX_CLASSES, MAX_TRIGGERS, canonical_integer, integer


@dataclass(frozen=True)
class Bits:
    """T bits, uint8 in {0, 1}."""

    bits: int = 256

    nulls: ClassVar[tuple[str, ...]] = ("exact", "bound", "exchangeable", "rank")
    name = "bits"
    fields = ("bits",)

    def __post_init__(self) -> None:
        integer("bits", self.bits, 1, MAX_BITS)

    def describe(self, task: Task) -> Parameters:
        return {"bits": int(self.bits)}

    def check(self, parameters: Parameters) -> None:
        canonical_integer("bits", parameters["bits"], 1, MAX_BITS)

    def total(self, parameters: Parameters) -> int:
        return int(parameters["bits"])

    def classes(self, parameters: Parameters) -> int:
        return 2

    def alphabet(self, parameters: Parameters) -> int:
        return 2

    def layout(self, parameters: Parameters) -> Layout:
        return {"bits": ("uint8", (parameters["bits"],))}

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]:
        return keyed_bits(subkey, parameters["bits"])


@dataclass(frozen=True)
class ChannelBits(Bits):
    """One bit for a channel of normalised weights: as many as there are channels, at most `bits`."""

    def describe(self, task: Task) -> Parameters:
        shapes, _ = task.weights()
        channels = sum(shapes[place][0] for place in task.normalised())
        if channels == 0:
            raise ValueError("it marks weights with a normalisation right behind them, and this network trains none")
        return {"bits": min(int(self.bits), channels)}


@dataclass(frozen=True)
class Labels:
    """N labels, int64 in [0, num_classes). Where the classes have names these are bound, and so is their order."""

    count: int = 100

    nulls: ClassVar[tuple[str, ...]] = ("exact", "bound", "exchangeable", "rank")
    name = "labels"
    fields: ClassVar[tuple[str, ...]] = ("count", "num_classes", "class_names")

    def __post_init__(self) -> None:
        integer("count", self.count, 1, MAX_TRIGGERS)

    def describe(self, task: Task) -> Parameters:
        if task.num_classes is None:
            raise ValueError("it needs num_classes, the width of the model's logits")
        names = [] if task.class_names is None else [check_name("a class name", name) for name in task.class_names]
        parameters = {
            "count": int(self.count),
            "num_classes": integer("num_classes", task.num_classes, 2, MAX_CLASSES),
            "class_names": names,
        }
        self.check(parameters)
        return parameters

    def check(self, parameters: Parameters) -> None:
        canonical_integer("count", parameters["count"], 1, MAX_TRIGGERS)
        classes = canonical_integer("num_classes", parameters["num_classes"], 2, MAX_CLASSES)
        names = parameters["class_names"]
        if type(names) is not list or (names and len(names) != classes) or len(set(names)) != len(names):
            raise ValueError(f"class_names must be none, or one name for each of the {classes} classes, all different")
        for name in names:
            if check_name("a class name", name) != name:
                raise ValueError(f"class_names must be in NFC, and {name!r} is not")

    def total(self, parameters: Parameters) -> int:
        return int(parameters["count"])

    def classes(self, parameters: Parameters) -> int:
        return int(parameters["num_classes"])

    def alphabet(self, parameters: Parameters) -> int:
        return self.classes(parameters)

    def layout(self, parameters: Parameters) -> Layout:
        return {"labels": ("int64", (parameters["count"],))}

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]:
        return keyed_labels(subkey, parameters["count"], self.classes(parameters))


@dataclass(frozen=True)
class OneOf(Labels):
    """N labels, each one of the `candidates` [N, k] that its trigger has, all different and as likely."""

    nulls = ("bound", "rank")

    def alphabet(self, parameters: Parameters) -> int:
        return int(parameters["choices"])

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]:
        candidates = np.sort(arrays["candidates"], axis=1)
        inside = (candidates >= 0) & (candidates < parameters["num_classes"])
        if not inside.all() or (candidates[:, 1:] == candidates[:, :-1]).any():  # the chance would be more than 1/k
            raise ValueError("the candidates of a label must be different classes of the task")
        chosen = keyed_labels(subkey, parameters["count"], parameters["choices"])
        return np.asarray(arrays["candidates"][np.arange(len(chosen)), chosen])


@dataclass(frozen=True)
class Given(Labels):
    """N labels that no key draws: what the owner's network answers. They can only rank."""

    nulls = ("rank",)

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]:
        return np.array(arrays["own_labels"])


@dataclass(frozen=True)
class GivenBits(Bits):
    """T bits that no key draws. They can only rank."""

    nulls = ("rank",)

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]:
        return np.array(arrays["own_labels"])


@dataclass(frozen=True)
class Choices(Labels):
    """N labels, int64 in [0, choices): as many as the source offers, whose parameter `choices` is."""

    fields = ("count",)

    def describe(self, task: Task) -> Parameters:
        return {"count": int(self.count)}

    def check(self, parameters: Parameters) -> None:
        canonical_integer("count", parameters["count"], 1, MAX_TRIGGERS)

    def classes(self, parameters: Parameters) -> int:
        return int(parameters["choices"])
