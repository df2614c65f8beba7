"""The pool of `response`: ordinary inputs, what unmarked networks make of them, and bits read from all answers at once.

Nothing on it is chosen by the key. Probes, their features and the controls' answers are material, whose digests enter
the derivation before there is a bit: who exchanges a control has another mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.canonical import canonical_digest
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_CLASSES, MAX_TRIGGERS, canonical_integer, integer
from wmengine.parts.responses.pattern import CLIP, keyed_normals
from wmengine.parts.responses.reading import projected, unexplained
from wmengine.parts.responses.views import MOST_VIEWS, viewed, views_of
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.suspects.adapters import Adapter, to_input, to_levels
from wmengine.suspects.base import Inputs

LEAST_BITS, LEAST_PROBES, LEAST_SAMPLES = 256, 256, 64
_MOST_BYTES = 192 << 20  # of material, which the mark's file holds whole


@dataclass(frozen=True)
class ResponsePool(AbstractTriggers):
    """probes: how many inputs are bound, as far as 192 MiB hold them: of the owner's samples and of mixtures of two of
    them those of which the base, the first control, is least sure. views: in how many each is asked, where they are
    pictures: as they are, mirrored, moved. features: D, how many principal components of the base's last activations
    directions are drawn over.
    """

    probes: int = 4096
    views: int = MOST_VIEWS
    features: int = 48

    fields: ClassVar[tuple[str, ...]] = ("value_range", "num_classes", "pool", "views", "dimensions", "raw", "controls")
    takes: ClassVar[tuple[str, ...]] = ("samples",)

    def __post_init__(self) -> None:
        integer("probes", self.probes, LEAST_PROBES, MAX_TRIGGERS)
        integer("views", self.views, 1, MOST_VIEWS)
        integer("features", self.features, 2, 1024)

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "probes" uint8 [P, *shape], the least decided first; of all of them in the first view, then of all in the
        second …, N in all: "features" float32 [N, D] and "answers" float32 [K, N, C], the controls' centred
        log-probabilities; "centre" [F] and "whitening" [F, D] of the base's activations.

        Raises ValueError for too few samples and for networks that do not fit.
        """
        import torch

        from wmengine.parts.responses.gathering import (
            answers_of,
            base_of,
            mixtures,
            raw_features,
            undecided_first,
            whitening_of,
        )

        if len(task.inputs) != 1:
            raise ValueError(f"it is for models of one input, and this one takes {', '.join(task.inputs)}")
        if task.model is None or len(task.samples) != 1:
            raise ValueError("it needs samples=, inputs of the task that the model is not trained on, no labels needed")
        if task.num_classes is None:
            raise ValueError("it needs num_classes, the width of the model's logits")
        ((name, rows),) = task.samples.items()
        if rows.dtype.kind != "f":
            raise ValueError(f"its probes are floating inputs as the model takes them, and these are {rows.dtype}")
        if not np.isfinite(rows).all():
            raise ValueError("its probes hold NaN or Inf")
        if len(rows) < LEAST_SAMPLES:
            raise ValueError(f"it needs {LEAST_SAMPLES} samples or more to make probes of, and there are {len(rows)}")
        rows = rows.astype(np.float32)
        controls, classes = list(task.controls) or [task.model], task.num_classes
        views = views_of(rows.shape[1:], self.views)
        size = rows[0].size + 4 * views * (len(controls) * classes + self.features)
        count = min(self.probes, _MOST_BYTES // size)
        levels = to_levels(np.concatenate([rows, mixtures(rows, max(count, len(rows)))]), task.value_range or ())
        every = to_input(levels, task.value_range or ())
        order = undecided_first(answers_of(controls[:1], name, every, classes)[0])[:count]
        probes, base = levels[order], base_of(controls[0], torch.from_numpy(every[:1]))
        seen = [to_input(viewed(probes, view), task.value_range or ()) for view in range(views)]
        whitening = whitening_of(raw_features(base, seen[0]), self.features)
        return {
            "probes": probes,
            "features": np.concatenate([whitening(raw_features(base, each)) for each in seen]),
            "answers": np.concatenate([answers_of(controls, name, each, classes) for each in seen], axis=1),
            "centre": whitening.centre,
            "whitening": whitening.matrix,
        }

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        given = material or {}
        return {
            **super().describe(task, total),
            "num_classes": integer("num_classes", task.num_classes or 0, 2, MAX_CLASSES),
            "pool": len(given["probes"]),
            "views": len(given["features"]) // len(given["probes"]),
            "dimensions": given["features"].shape[1],
            "raw": len(given["centre"]),
            "controls": len(given["answers"]),
        }

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        canonical_integer("num_classes", parameters["num_classes"], 2, MAX_CLASSES)
        canonical_integer("dimensions", parameters["dimensions"], 1, 1024)
        canonical_integer("raw", parameters["raw"], 1, MAX_TRIGGERS)
        canonical_integer("controls", parameters["controls"], 1, 1024)
        canonical_integer("views", parameters["views"], 1, MOST_VIEWS)
        pool = canonical_integer("pool", parameters["pool"], 0, MAX_TRIGGERS)
        if pool < LEAST_PROBES:
            raise ValueError(f"it needs {LEAST_PROBES} probes, and the pool has {pool}: give more samples=")
        if total < LEAST_BITS:
            raise ValueError(f"it needs {LEAST_BITS} bits, and this mark has {total}")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        ((_, given),) = inputs_of(parameters).items()
        pool, dimensions, classes = (parameters[name] for name in ("pool", "dimensions", "num_classes"))
        size = pool * parameters["views"]
        return {
            "probes": ("uint8", (pool, *given.shape)),
            "features": ("float32", (size, dimensions)),
            "answers": ("float32", (parameters["controls"], size, classes)),
            "centre": ("float32", (parameters["raw"],)),
            "whitening": ("float32", (parameters["raw"], dimensions)),
            "directions": ("uint8", (total, dimensions)),
            "contrasts": ("uint8", (total, classes)),
        }

    def draw(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """ "directions" uint8 [T, D] and "contrasts" uint8 [T, C], as `keyed_normals` gives them."""
        return {
            "directions": keyed_normals(subkey("directions"), total, parameters["dimensions"]),
            "contrasts": keyed_normals(subkey("contrasts"), total, parameters["num_classes"]),
        }

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        (name,) = inputs_of(mark.parameters)
        probes, parts = mark.arrays["probes"], []
        for view in range(mark.parameters["views"]):
            first = view * len(probes)
            part = probes[max(start - first, 0) : max(stop - first, 0)]
            if len(part):
                parts.append(viewed(part, view))
        return {name: way.inputs(np.concatenate(parts or [probes[:0]]), mark.parameters["value_range"])}

    def examples(self, mark: Drawn, count: int | None = None) -> dict[str, NDArray[np.float32]]:
        (name,) = inputs_of(mark.parameters)
        return {name: to_input(mark.arrays["probes"][:count], mark.parameters["value_range"])}

    def fits(self, mark: Drawn, raw: NDArray[np.float32]) -> bool:
        """Whether raw features of the first probes are the base's, as the mark holds them."""
        centre, matrix = mark.arrays["centre"], mark.arrays["whitening"]
        if raw.shape[1:] != centre.shape:
            return False
        kept = mark.arrays["features"][: len(raw)]
        return float(np.abs(((raw - centre) @ matrix).clip(-CLIP, CLIP) - kept).mean()) < 0.1

    def pool(self, mark: Drawn) -> str:
        """64 hex digits: probes, how they are put, how many classes are asked for, and the controls' answers. By these
        the classes' order is chosen: a mark made later, with other answers, must not choose it for this one."""
        own, material = ("inputs", "value_range", "num_classes"), ("probes", "answers")
        return canonical_digest(
            {name: mark.parameters[name] for name in own}
            | {name: mark.parameters["material"][name] for name in material}
        )

    def size(self, mark: Drawn) -> int:
        """How many there are of probes in all views."""
        return int(mark.parameters["pool"] * mark.parameters["views"])

    def known(self, mark: Drawn) -> NDArray[np.float32]:
        """The base's answers [N, C]."""
        answers: NDArray[np.float32] = mark.arrays["answers"][0]
        return answers

    def likely(self, mark: Drawn) -> NDArray[np.int64]:
        """The classes [N] that the base names."""
        return np.asarray(self.known(mark).argmax(axis=1), np.int64)

    def observed(self, mark: Drawn, asked: NDArray[np.int64], said: NDArray[np.float64]) -> NDArray[np.float64]:
        """y [T] of what a suspect said [n, C] to the probes at these places [n]."""
        if not len(asked):
            return np.zeros(len(mark.arrays["directions"]))
        rest = unexplained(said, mark.arrays["answers"][:, asked])
        return projected(rest, mark.arrays["features"][asked], mark.arrays)
