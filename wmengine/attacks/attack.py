"""What an attack is: an entry of the page `wmengine/attacks/page.py`, or of another package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

TAKES = ("module", "weights", "graph", "file")
KINDS: Mapping[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
}  # by that of an option's default


@dataclass(frozen=True)
class Attack:
    """One attack of the literature, carried out by a small function.

    name, family: as the literature calls them. run: the function; takes says what of a model it is given, always a
    copy of the caller's, so that nothing of that is changed:

    * "module": run(module, data, random, **options) -> the attacked torch module, for what trains;
    * "weights": run(weights, random, **options), which changes the float arrays of two axes and more in that dict, by
      name, in place: of a torch module, an ONNX file or a safetensors file;
    * "graph": run(model, random, **options), which changes the values of an onnx.ModelProto's initializers, and nothing
      else of it: of a torch module or an ONNX file;
    * "file": run(source, target, data, **options), which writes the file `target` for the ONNX file `source`.

    data is a :class:`wmengine.attacks.data.Data`, random a seeded numpy.random.Generator. needs: what of data it cannot
    do without: nothing, "inputs" or "labels" (and inputs). unless: options with which it can. defaults: every option
    with its value, the reference one where there is one. promise: what holds of the result, one sentence. paper: where
    it comes from.
    """

    name: str
    family: str
    run: Callable[..., Any]
    takes: str
    needs: str = ""
    unless: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    promise: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if self.takes not in TAKES:
            raise ValueError(f"an attack takes one of {', '.join(TAKES)}, and {self.name!r} takes {self.takes!r}")
        if self.needs not in ("", "inputs", "labels"):
            raise ValueError(f"an attack needs nothing, inputs or labels, and {self.name!r} needs {self.needs!r}")

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults with what is given in their place. Raises ValueError for an option that does not exist, and for
        a value that is no number, integer or bool where the default is one."""
        for name, value in given.items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ValueError(f"the attack {self.name!r} has no option {name!r}; it has {known}")
            wanted, said = KINDS.get(type(self.defaults[name]), (object, ""))
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (Integral, Real)):
                raise ValueError(f"{name} must be {said}, and it is {value!r}")
        return {**self.defaults, **given}
