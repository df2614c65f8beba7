"""Token triggers: sequences of token numbers that the key draws, for models that read text.

The same idea as abstract pictures (Adi et al. 2018): inputs that belong to no task's data. Every further input of the
model, such as an attention mask, is 1 throughout: a trigger fills its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_labels
from wmengine.parts.base import Draw, Drawn, Layout, Need, Parameters, Task
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, canonical_shape, integer, signature_of
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.base import Inputs, Suspect


@dataclass(frozen=True)
class TokenTriggers:
    """special: the first so many token numbers stand for padding and the like, and no trigger holds them.

    Tokens are drawn from [special, vocabulary): value_range=(0, vocabulary - 1) says how many a model knows.
    """

    special: int = 0

    needs = Need.ANSWERS
    fields = ("special", "vocabulary")

    def __post_init__(self) -> None:
        integer("special", self.special, 0, MAX_DIMENSION)

    def describe(self, task: Task, total: int) -> Parameters:
        """The first of the inputs holds the tokens, integers [n, L]."""
        spec = next(iter(task.inputs.values()))
        if "int" not in spec.dtype or len(spec.shape) != 1 or task.value_range is None:
            raise ValueError(f"token triggers are for integers [n, L], and this model takes {spec.dtype} {spec.shape}")
        others = [name for name, each in task.inputs.items() if each.shape != spec.shape]
        if others:
            raise ValueError(f"its inputs must have one shape, and {others[0]!r} has another than the tokens")
        return {"special": int(self.special), "vocabulary": int(task.value_range[0][1]) + 1}

    def check(self, parameters: Parameters) -> None:
        least = canonical_integer("special", parameters["special"], 0, MAX_DIMENSION)
        canonical_integer("vocabulary", parameters["vocabulary"], least + 2, 1 << 31)
        for name, spec in signature_of(parameters).items():
            canonical_shape(f"inputs[{name!r}]", list(spec.shape), least=1)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"triggers": ("int64", (total, *parameters["inputs"][0]["shape"]))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "triggers" int64 [N, L], iid uniform over the tokens that are not special. Raises ValueError where these
        sequences are too few to be different."""
        (dtype_and_shape,) = self.layout(parameters, total).values()
        least, size = parameters["special"], int(np.prod(dtype_and_shape[1]))
        tokens = least + keyed_labels(subkey("triggers"), size, parameters["vocabulary"] - least)
        triggers = tokens.reshape(dtype_and_shape[1])
        if len(np.unique(triggers, axis=0)) < total:
            raise ValueError(f"sequences of shape {triggers.shape[1:]} are too few for {total} distinct triggers")
        return {"triggers": triggers}

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return [AS_RECORDED]

    def inputs(self, mark: Drawn, way: Adapter) -> Inputs:
        return self.examples(mark)

    def examples(self, mark: Drawn) -> dict[str, NDArray[Any]]:
        """All triggers by input, as the model's own training loop feeds them."""
        triggers = mark.arrays["triggers"]
        tokens, *others = signature_of(mark.parameters).items()
        found = {tokens[0]: triggers.astype(tokens[1].dtype)}
        return found | {name: np.ones(triggers.shape, spec.dtype) for name, spec in others}
