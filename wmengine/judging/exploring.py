"""Marks that are asked other inputs than those that they were made with. Whoever may choose inputs and controls once
there are bits can choose them to fit, so this explores and proves nothing to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wmengine.marks.preset import array_digest
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools, inputs_of
from wmengine.suspects.answers import to_array


class Explored(Watermark):
    """A watermark whose pool is another one; the rest, its symbols among it, is its own."""

    def __post_init__(self) -> None:
        """Its material is not what its symbols were drawn after."""

    def save(self, *_: Any, **__: Any) -> None:
        raise ValueError("a mark with other probes is to explore with: save the one that it was made of")


def explored(marks: Sequence[Watermark], probes: Any, controls: Sequence[Any]) -> list[Explored]:
    """probes: inputs of the task, [n, ...] or several by name; controls: the networks that the marks were made with,
    their base first: torch modules, paths or functions. Raises ValueError or TypeError for what does not fit."""
    if not isinstance(controls, list | tuple) or not controls:
        raise ValueError("probes= needs controls=, a list of the networks that the mark was made with, its base first")
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for mark in marks:
        if mark.geometry not in found:  # which marks of several customers share
            found[mark.geometry] = _explored(mark, probes, controls)
    symbols = [{mark.preset.symbols.name: mark.symbols} for mark in marks]
    return [
        Explored(**_fields(mark) | {"parameters": parameters, "arrays": {**arrays, **own}})
        for mark, own, (parameters, arrays) in zip(
            marks, symbols, (found[mark.geometry] for mark in marks), strict=True
        )
    ]


def _explored(mark: Watermark, probes: Any, controls: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    source, inputs = mark.preset.source, inputs_of(mark.parameters)
    if not isinstance(source, Pools):
        raise ValueError(f"probes= is for marks that ordinary inputs are asked for, and {mark.name} is {mark.scheme!r}")
    given = dict(probes) if isinstance(probes, Mapping) else {next(iter(inputs)): probes}
    rows = {}
    for name, spec in inputs.items():
        found = to_array(given.get(name))
        if given.keys() != inputs.keys() or found is None or found.shape[1:] != spec.shape:
            said = ", ".join(f"{name} [n, {', '.join(map(str, spec.shape))}]" for name, spec in inputs.items())
            raise ValueError(f"probes= must be {said}, as the probes of {mark.name} are")
        rows[name] = found
    parameters, arrays = source.explored(mark, rows, controls)
    material = {name: array_digest(arrays[name]) for name in mark.parameters["material"]}
    return {**parameters, "material": material}, dict(arrays)


def _fields(mark: Watermark) -> dict[str, Any]:
    return {field.name: getattr(mark, field.name) for field in fields(Watermark)}
