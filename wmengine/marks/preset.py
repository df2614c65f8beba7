"""A published scheme is a preset, not a program: one short entry that names its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.canonical import check_name
from wmengine.identity.key import Key
from wmengine.identity.subkeys import Subkeys
from wmengine.parts.base import (
    Arrays,
    Asks,
    Drawn,
    Gathers,
    Layout,
    Need,
    Parameters,
    Reads,
    Source,
    Symbols,
    Task,
    Training,
    described_inputs,
    options_of,
)
from wmengine.parts.fields import check_digests, check_inputs, one_of
from wmengine.parts.statistics.base import Statistic, Test
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.rank import Rank, null_matches

NULLS = ("exact", "bound", "exchangeable", "rank")
_OWN_FIELDS = ("name", "inputs", "statistic")
_GIVEN: dict[str, tuple[Callable[[Task], bool], str]] = {
    "samples": (lambda task: bool(task.samples), "samples=, inputs of the task, best with labels: (inputs, labels)"),
    "labels": (lambda task: task.sample_labels is not None, "to know what its samples are: samples=(inputs, labels)"),
    "controls": (lambda task: bool(task.controls), "controls=, networks of the task made without this one"),
}


@dataclass(frozen=True)
class Preset:
    """source × symbols × statistic × training. null: what a p-value of this scheme is; "exact" and "bound" may prove.

    The parameters of a mark are all that scoring needs beside the key: integers, strings, lists and dicts of them, each
    owned by one part, and part of every derivation, so that nobody can change one after the fact. What only steers
    training stays out of them.
    """

    name: str
    version: int
    source: Source | Gathers
    symbols: Symbols
    statistic: Statistic | Rank
    training: Training
    null: str
    paper: str

    def __post_init__(self) -> None:
        one_of("null", self.null, NULLS)
        if self.null != "rank" and isinstance(self.statistic, Rank):
            raise ValueError(f"preset {self.name!r} has the statistic rank, so its null is 'rank', not {self.null!r}")
        if self.null not in self.symbols.nulls:
            raise ValueError(f"preset {self.name!r} has symbols for the nulls {', '.join(self.symbols.nulls)} only")
        if "exact" not in self.symbols.nulls and not isinstance(self.statistic, Rank | Matches):
            raise ValueError(f"preset {self.name!r} has symbols that only matches, or a rank, can be counted of")
        names = [name for name, _ in options_of(self._parts)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"preset {self.name!r} has two parts with an option {twice[0]!r}")

    @property
    def kind(self) -> str:
        """ "black-box" where the suspect only has to answer, else "white-box"."""
        return "black-box" if self.source.needs == Need.ANSWERS else "white-box"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes of an owner beside `mix` and `loss`: "samples" of the task, their "labels" or "targets",
        "controls" made without the network, a "passport" in it, the batch's "inputs" for `loss` too, "regulariser"
        beside a loss of his own, or, in place of a loop, a quantised "file"."""
        return tuple(dict.fromkeys(need for part in self._parts for need in getattr(part, "takes", ())))

    @property
    def asks(self) -> Asks:
        """The source of a black-box preset."""
        return cast(Asks, self.source)

    @property
    def reads(self) -> Reads:
        """The source of a white-box preset."""
        return cast(Reads, self.source)

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the parts with its value here."""
        return {name: getattr(part, name) for name, part in options_of(self._parts)}

    @property
    def full_name(self) -> str:
        """Name and version, as they enter derivations."""
        return f"{self.name}/{self.version}"

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.source, self.symbols, self.training

    def with_options(self, **options: Any) -> Preset:
        """The preset with some options of its parts replaced; ValueError for one that does not exist."""
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options)
                raise ValueError(f"scheme {self.name!r} has no option {name!r}; its options are {known}")

        def replaced(part: Any) -> Any:
            own = {name: options[name] for name, owner in options_of([part]) if name in options}
            return replace(part, **own) if own else part

        source, symbols, training = map(replaced, self._parts)
        return replace(self, source=source, symbols=symbols, training=training)

    def gather(self, task: Task) -> dict[str, NDArray[Any]]:
        """The material of a mark, none for most: what the owner gives and the key does not draw. ValueError where the
        task has not what the preset needs."""
        missing = [said for need, (has, said) in _GIVEN.items() if need in self.needs and not has(task)]
        if missing:
            raise ValueError(f"scheme {self.name!r}: it needs {', and it needs '.join(missing)}")
        if not isinstance(self.source, Gathers):
            return {}
        try:
            return self.source.gather(task, self.symbols.total(self.symbols.describe(task)))
        except ValueError as error:
            raise ValueError(f"scheme {self.name!r}: {error}") from None

    def describe(self, task: Task, name: str, material: Arrays | None = None) -> Parameters:
        """The canonical parameters of a mark in a model called `name`; material: what `gather` gave. ValueError where
        the task does not fit."""
        parameters: Parameters = {
            "inputs": described_inputs(task.inputs),
            "name": check_name("name", name),
            "statistic": self.statistic.identifier,
        }
        try:
            parameters |= self.symbols.describe(task)
            total = self.symbols.total(parameters)
            if isinstance(self.source, Gathers):
                material = {} if material is None else material
                parameters |= self.source.describe(task, total, material)
                parameters["material"] = {name: array_digest(array) for name, array in material.items()}
            else:
                parameters |= self.source.describe(task, total)
            self.check(parameters)
        except ValueError as error:
            raise ValueError(f"scheme {self.name!r}: {error}") from None
        return parameters

    def check(self, parameters: Parameters) -> None:
        """Raises ValueError unless these are complete, in range and in canonical form."""
        material = ("material",) if isinstance(self.source, Gathers) else ()
        expected = (*_OWN_FIELDS, *self.symbols.fields, *self.source.fields, *material)
        for field in expected:
            if field not in parameters:
                raise ValueError(f"the parameters of {self.name!r} lack {field!r}")
        for field in parameters:
            if field not in expected:
                raise ValueError(f"the parameters of {self.name!r} hold an unknown field {field!r}")
        if check_name("name", parameters["name"]) != parameters["name"]:
            raise ValueError(f"the name {parameters['name']!r} is not in NFC")
        if parameters["statistic"] != self.statistic.identifier:
            raise ValueError(f"its statistic is {parameters['statistic']!r}, and {self.statistic.identifier!r} here")
        check_inputs(parameters["inputs"])
        self.symbols.check(parameters)
        self.source.check(parameters, self.symbols.total(parameters))
        if material:
            layout = self.source.layout(parameters, self.symbols.total(parameters))
            check_digests("material", parameters["material"], tuple(layout))

    def total(self, parameters: Parameters) -> int:
        """The number of symbols that a mark can test."""
        return self.symbols.total(parameters)

    def chance(self, parameters: Parameters) -> float:
        """The chance that a stranger matches one symbol: it comes from the key's alphabet, not from the suspect's."""
        return 1.0 / self.symbols.alphabet(parameters)

    def layout(self, parameters: Parameters) -> Layout:
        """Name → (dtype, shape) of a mark's arrays, without drawing them; material among them."""
        own = self.source.layout(parameters, self.total(parameters))
        return own | self.symbols.layout(parameters)

    def derive(
        self, key: Key, parameters: Parameters, message: str | None = None, material: Arrays | None = None
    ) -> dict[str, NDArray[Any]]:
        """Everything that scoring needs, from key, parameters, their material and message alone: marking and its check
        call this. ValueError for other material."""
        self.check(parameters)
        subkeys, total = self.subkeys(key, parameters, message), self.total(parameters)
        given = {} if material is None else dict(material)
        if {name: array_digest(array) for name, array in given.items()} != parameters.get("material", {}):
            raise ValueError(f"scheme {self.name!r}: this is not the material that the parameters were described with")
        if isinstance(self.source, Gathers):
            given |= self.source.draw(subkeys.geometry, parameters, total, given)
        else:
            given |= self.source.draw(subkeys.geometry, parameters, total)
        return given | {self.symbols.name: self.symbols.draw(subkeys.symbols, parameters, given)}

    def test(self, mark: Drawn, total: int, sequential: bool) -> Test:
        """A test of the first `total` symbols of a mark."""
        if isinstance(self.statistic, Rank):
            return self.statistic.begin_among(null_matches(mark.arrays, self.symbols.name, total), total)
        return self.statistic.begin(self.chance(mark.parameters), total, sequential)

    def subkeys(self, key: Key, parameters: Mapping[str, Any], message: str | None) -> Subkeys:
        return Subkeys(key, self.full_name, parameters, message)


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of the array's bytes, little endian; its type and shape follow from the parameters."""
    return hashlib.sha256(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data).hexdigest()
