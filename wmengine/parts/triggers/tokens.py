"""Token triggers: sequences of token numbers that the key draws, for models that read text.

The same idea as abstract pictures (Adi et al. 2018): inputs that belong to no task's data. Every further input of the
model, such as an attention mask, is 1 throughout: a trigger fills its sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.subkeys import keyed_labels
from wmengine.parts.base import Draw, Drawn, Layout, Need, Parameters, Task, inputs_of
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, integer, shape
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.base import Inputs, Signature, Suspect, part_of

MAX_TOKEN = (1 << 31) - 1
_INTEGERS = ("uint8", "int16", "int32", "int64")
_MASKS = (*_INTEGERS, "bool", "float16", "float32")


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
        check_tokens(task.inputs)
        if task.value_range is None:
            raise ValueError("it needs value_range=(0, vocabulary - 1), the token numbers that the model knows")
        vocabulary, first = int(task.value_range[0][1]) + 1, next(iter(task.inputs))
        if len(task.inputs) > 1 and vocabulary <= 2:
            raise ValueError(f"its tokens are the first of several inputs, and {first!r} holds a mask: put it behind")
        return {"special": int(self.special), "vocabulary": vocabulary}

    def check(self, parameters: Parameters, total: int) -> None:
        inputs = inputs_of(parameters)
        tokens = check_tokens(inputs)
        least = canonical_integer("special", parameters["special"], 0, MAX_DIMENSION)
        canonical_integer("vocabulary", parameters["vocabulary"], least + 2, 1 + min(np.iinfo(tokens).max, MAX_TOKEN))

    def layout(self, parameters: Parameters, total: int) -> Layout:
        return {"triggers": ("int64", (total, *next(iter(inputs_of(parameters).values())).shape))}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "triggers" int64 [N, L], iid uniform over the tokens that are not special. Raises ValueError where these
        sequences are too few to be different."""
        ((_, sizes),) = self.layout(parameters, total).values()
        least = parameters["special"]
        tokens = least + keyed_labels(subkey("triggers"), math.prod(sizes), parameters["vocabulary"] - least)
        triggers = tokens.reshape(sizes)
        if len(np.unique(triggers, axis=0)) < total:
            raise ValueError(f"sequences of shape {triggers.shape[1:]} are too few for {total} distinct triggers")
        return {"triggers": triggers}

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]:
        return [AS_RECORDED]

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs:
        return part_of(self.examples(mark), start, stop)

    def examples(self, mark: Drawn) -> dict[str, NDArray[Any]]:
        """All triggers by input, as the model's own training loop feeds them."""
        triggers = mark.arrays["triggers"]
        (tokens, spec), *others = inputs_of(mark.parameters).items()
        ones = {name: np.ones(triggers.shape, other.dtype) for name, other in others}
        return {tokens: triggers.astype(spec.dtype), **ones}


def check_tokens(inputs: Signature) -> np.dtype[Any]:
    """The type of the tokens, the first of these inputs, if all can be what a text model takes; else ValueError."""
    (_, spec), *others = inputs.items()
    if spec.dtype not in _INTEGERS or len(spec.shape) != 1:
        raise ValueError(f"token triggers are for integers [n, L], and this model takes {spec.dtype} {spec.shape}")
    for name, other in others:
        if other.shape != spec.shape or other.dtype not in _MASKS:
            raise ValueError(
                f"its inputs must have the tokens' shape and be integers, bool or float32, and {name!r} is "
                f"{other.dtype} {other.shape}"
            )
    shape("shape", spec.shape, least=1)
    return np.dtype(spec.dtype)
