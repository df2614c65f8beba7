"""The pool of `response`: ordinary inputs, what unmarked networks make of them, and bits read from all answers at once.

Nothing on it is chosen by the key. Probes, their features and the controls' answers are material, whose digests enter
the derivation before there is a bit: who exchanges a control has another mark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.canonical import canonical_digest
from wmengine.parts.base import Arrays, Draw, Drawn, Layout, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_CLASSES, MAX_TRIGGERS, canonical_integer, integer
from wmengine.parts.responses.pattern import CLIP, keyed_normals
from wmengine.parts.responses.reading import projected, unexplained
from wmengine.parts.responses.tokens import apart, are_tokens, stacked
from wmengine.parts.responses.views import MOST_VIEWS, viewed, views_of
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.suspects.adapters import AS_RECORDED, Adapter, Range, ends_of, to_input, to_levels
from wmengine.suspects.base import Inputs, Signature, Suspect, part_of

LEAST_BITS, LEAST_PROBES, LEAST_SAMPLES = 256, 256, 64
# Of material, which is held in memory whole: all of it, and of that what is not probes.
_MOST_BYTES, _MOST_KNOWN = 720 << 20, 192 << 20
_SAME = 0.1  # how far apart, on average, the same network's numbers may be on two machines
_AT_ONCE = 256  # probes or more, as floats of them take eight times their room


@dataclass(frozen=True)
class ResponsePool(AbstractTriggers):
    """probes: how many inputs are bound, as far as 720 MiB hold them: of the owner's samples and of mixtures of two of
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
        """ "probes" uint8 [P, *shape], of tokens int32 [P, inputs, L], the least decided first; of all of them in the
        first view, then of all in the second …, N in all: "features" float32 [N, D] and "answers" float32 [K, N, C],
        the controls' centred log-probabilities; "centre" [F] and "whitening" [F, D] of the base's activations.

        Raises ValueError for too few samples and for networks that do not fit.
        """
        from wmengine.parts.responses.gathering import Candidates, answers_of, known_of, undecided_first

        tokens, ranges = are_tokens(task.inputs), task.value_range or ()
        if len(task.inputs) != 1 and not tokens:
            raise ValueError(f"it is for models of one input, and this one takes {', '.join(task.inputs)}")
        if task.model is None or task.samples.keys() != task.inputs.keys():
            raise ValueError("it needs samples=, inputs of the task that the model is not trained on, no labels needed")
        if task.num_classes is None:
            raise ValueError("it needs num_classes, the width of the model's logits")
        rows = _rows_of(task.samples, task.inputs, ranges)
        if len(rows) < LEAST_SAMPLES:
            raise ValueError(f"it needs {LEAST_SAMPLES} samples or more to make probes of, and there are {len(rows)}")
        controls, classes = list(task.controls) or [task.model], task.num_classes
        views = 1 if tokens else views_of(rows.shape[1:], self.views)
        count = min(self.probes, self._most(rows, views, len(controls), classes))
        if count < LEAST_PROBES:
            raise ValueError(
                f"it needs {LEAST_PROBES} probes, of which its {_MOST_BYTES >> 20} MiB, {_MOST_KNOWN >> 20} of them "
                f"for answers, hold {count}: give fewer views=, fewer controls or smaller inputs"
            )
        candidates = Candidates(rows, count, ranges)
        every = _in_parts(candidates, 0, task.inputs, ranges)
        order = undecided_first(answers_of(controls[:1], every, classes)[0])[:count]
        probes = np.concatenate([candidates[order[at : at + _AT_ONCE]] for at in range(0, count, _AT_ONCE)])

        def put(view: int) -> Iterator[Inputs]:
            return _in_parts(probes, view, task.inputs, ranges)

        return {"probes": probes, **known_of(controls, put, views, classes, self.features)}

    def explored(self, mark: Drawn, samples: Arrays, controls: Sequence[Any]) -> tuple[Parameters, Arrays]:
        """The mark's parameters and arrays with another pool: these samples, inputs of the task by name, as they come,
        and what these networks make of them, the mark's base first. Raises ValueError for what does not fit.
        """
        from wmengine.parts.responses.bases import base_of, features_of, tensors
        from wmengine.parts.responses.gathering import Whitening, answers_of, known_of

        inputs, parameters = inputs_of(mark.parameters), mark.parameters
        ranges, views, classes = (parameters[name] for name in ("value_range", "views", "num_classes"))
        rows = _rows_of(samples, inputs, ranges)
        most = self._most(rows, views, len(controls), classes)
        if not LEAST_SAMPLES <= len(rows) <= most:
            raise ValueError(f"probes= must be {LEAST_SAMPLES} to {most:,}, and there are {len(rows):,}")
        probes = rows
        if not are_tokens(inputs):
            starts = range(0, len(rows), _AT_ONCE)
            probes = np.concatenate([to_levels(rows[at : at + _AT_ONCE], ranges) for at in starts])

        def put(view: int) -> Iterator[Inputs]:
            return _in_parts(probes, view, inputs, ranges)

        examples = self.examples(mark, _AT_ONCE)
        base = base_of(controls[0], tensors(part_of(examples, 0, 1)))
        said = answers_of(controls[:1], [examples], classes)[0]
        same = np.abs(said - self.known(mark)[: len(said)]).mean() < _SAME
        if not same or not self.fits(mark, features_of(base, [examples])):
            name = parameters["name"]
            raise ValueError(f"the first of controls= is not the base of {name}: give the networks it was made with")
        whitening = Whitening(mark.arrays["centre"], mark.arrays["whitening"])
        known = known_of(controls, put, views, classes, whitening)
        changed = {"pool": len(probes), "controls": len(controls)}
        return {**parameters, **changed}, {**mark.arrays, "probes": probes, **known}

    def _most(self, rows: NDArray[Any], views: int, controls: int, classes: int) -> int:
        """How many probes such as these rows there is room for."""
        size = rows[0].nbytes if rows.dtype.kind == "i" else rows[0].size
        known = 4 * views * (controls * classes + self.features)
        return int(min(_MOST_BYTES // (size + known), _MOST_KNOWN // known, MAX_TRIGGERS))

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        given = material or {}
        return {
            **({"value_range": []} if are_tokens(task.inputs) else super().describe(task, total)),
            "num_classes": integer("num_classes", task.num_classes or 0, 2, MAX_CLASSES),
            "pool": len(given["probes"]),
            "views": len(given["features"]) // len(given["probes"]),
            "dimensions": given["features"].shape[1],
            "raw": len(given["centre"]),
            "controls": len(given["answers"]),
        }

    def check(self, parameters: Parameters, total: int) -> None:
        if not are_tokens(inputs_of(parameters)):
            super().check(parameters, total)
        elif parameters["value_range"] != []:
            raise ValueError("value_range must be empty, as its probes are tokens")
        canonical_integer("num_classes", parameters["num_classes"], 2, MAX_CLASSES)
        canonical_integer("dimensions", parameters["dimensions"], 1, 1024)
        canonical_integer("raw", parameters["raw"], 1, MAX_TRIGGERS)
        canonical_integer("controls", parameters["controls"], 1, 1024)
        shape = next(iter(inputs_of(parameters).values())).shape
        canonical_integer("views", parameters["views"], 1, views_of(shape, MOST_VIEWS))
        pool = canonical_integer("pool", parameters["pool"], 0, MAX_TRIGGERS)
        if pool < LEAST_PROBES:
            raise ValueError(f"it needs {LEAST_PROBES} probes, and the pool has {pool}")
        if total < LEAST_BITS:
            raise ValueError(f"it needs {LEAST_BITS} bits, and this mark has {total}")

    def layout(self, parameters: Parameters, total: int) -> Layout:
        inputs = inputs_of(parameters)
        shape, tokens = next(iter(inputs.values())).shape, are_tokens(inputs)
        pool, dimensions, classes = (parameters[name] for name in ("pool", "dimensions", "num_classes"))
        size = pool * parameters["views"]
        return {
            "probes": ("int32", (pool, len(inputs), *shape)) if tokens else ("uint8", (pool, *shape)),
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

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return [AS_RECORDED] if are_tokens(inputs_of(mark.parameters)) else super().ways(mark, suspect, every)

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        probes, parts = mark.arrays["probes"], []
        for view in range(mark.parameters["views"]):
            first = view * len(probes)
            part = probes[max(start - first, 0) : max(stop - first, 0)]
            if len(part):
                parts.append(viewed(part, view))
        asked = np.concatenate(parts or [probes[:0]])
        return _put(asked, inputs_of(mark.parameters), mark.parameters["value_range"], way)

    def examples(self, mark: Drawn, count: int | None = None) -> dict[str, NDArray[Any]]:
        return _put(mark.arrays["probes"][:count], inputs_of(mark.parameters), mark.parameters["value_range"])

    def fits(self, mark: Drawn, raw: NDArray[np.float32]) -> bool:
        """Whether raw features of the first probes are the base's, as the mark holds them."""
        centre, matrix = mark.arrays["centre"], mark.arrays["whitening"]
        if raw.shape[1:] != centre.shape:
            return False
        kept = mark.arrays["features"][: len(raw)]
        return float(np.abs(((raw - centre) @ matrix).clip(-CLIP, CLIP) - kept).mean()) < _SAME

    def pool(self, mark: Drawn) -> str:
        """64 hex digits: probes, in how many views, how they are put, how many classes are asked for, and whose answers
        the controls' are. By these the classes' order is chosen: a mark made later, with other answers or with the same
        numbers for those of more controls in fewer views, must not choose it for this one."""
        own, material = ("inputs", "value_range", "num_classes", "views", "controls"), ("probes", "answers")
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


def _rows_of(samples: Arrays, inputs: Signature, ranges: Range) -> NDArray[Any]:
    """Inputs by name as one array: of tokens int32 [n, inputs, L], of one floating input float32 [n, ...]."""
    if are_tokens(inputs):
        found = stacked([samples[name] for name in inputs])
        for place, (name, spec) in enumerate(inputs.items()):
            if (found[:, place] != found[:, place].astype(spec.dtype)).any():
                raise ValueError(f"its probes are put as {spec.dtype} to {name!r}, which some tokens of samples exceed")
        return found
    (rows,) = samples.values()
    if rows.dtype.kind != "f":
        raise ValueError(
            "its probes are floating inputs as the model takes them, or tokens, integers [n, L], and these are "
            f"{rows.dtype} {list(rows.shape)}"
        )
    if not np.isfinite(rows).all():
        raise ValueError("its probes hold NaN or Inf")
    put = to_input(to_levels(rows[:_AT_ONCE], ranges), ranges)
    low, high = ends_of(ranges)
    beyond = np.abs(put - rows[:_AT_ONCE]) > (high - low).reshape(1, -1, *[1] * (rows.ndim - 2)) / 20
    if beyond.mean() > 0.25:  # of normal numbers some always lie beyond
        raise ValueError(
            f"{beyond.mean():.0%} of its probes' values lie outside value_range=: is it that of the inputs?"
        )
    return rows.astype(np.float32, copy=False)


def _in_parts(levels: Any, view: int, inputs: Signature, ranges: Range) -> Iterator[Inputs]:
    for start, stop in pairwise((0, *range(_AT_ONCE, len(levels) - _AT_ONCE + 1, _AT_ONCE), len(levels))):
        yield _put(viewed(levels[start:stop], view), inputs, ranges)


def _put(probes: NDArray[Any], inputs: Signature, ranges: Range, way: Adapter | None = None) -> dict[str, NDArray[Any]]:
    """Probes as the model's own loop feeds them, or as a suspect takes them."""
    if are_tokens(inputs):
        return apart(probes, inputs)
    (name,) = inputs
    return {name: way.inputs(probes, ranges) if way else to_input(probes, ranges)}
