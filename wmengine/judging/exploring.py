"""A mark that is asked other inputs than those that it was made with. Whoever may choose inputs and controls once there
are bits can choose them to fit, so this explores and proves nothing to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools, inputs_of
from wmengine.suspects.answers import to_array


class Explored(Watermark):
    """A watermark whose pool is another one; the rest, its symbols among it, is its own."""

    def __post_init__(self) -> None:
        """Its material is not that of its parameters."""

    def save(self, *_: Any, **__: Any) -> None:
        raise ValueError("a mark with other probes is to explore with: save the one that it was made of")


def explored(mark: Watermark, probes: Any, controls: Sequence[Any]) -> Explored:
    """probes: inputs of the task, [n, ...] or several by name; controls: the networks that the mark was made with, its
    base first: torch modules, paths or functions. Raises ValueError or TypeError for what does not fit."""
    source = mark.preset.source
    if not isinstance(source, Pools):
        raise ValueError(f"probes= is for marks that ordinary inputs are asked for, and {mark.name} is {mark.scheme!r}")
    if not controls:
        raise ValueError("probes= needs controls=, the networks that the mark was made with, its base first")
    inputs = inputs_of(mark.parameters)
    given = dict(probes) if isinstance(probes, Mapping) else {next(iter(inputs)): probes}
    rows = {str(name): to_array(values) for name, values in given.items()}
    for name, spec in inputs.items():
        found = rows.get(name)
        if rows.keys() != inputs.keys() or found is None or found.shape[1:] != spec.shape:
            said = ", ".join(f"{name} [n, {', '.join(map(str, spec.shape))}]" for name, spec in inputs.items())
            raise ValueError(f"probes= must be {said}, as the mark's own are")
    parameters, arrays = source.explored(mark, cast(Any, rows), controls)
    own = {field.name: getattr(mark, field.name) for field in fields(Watermark)}
    return Explored(**(own | {"parameters": parameters, "arrays": arrays}))
