"""The course of a mark in weights: the fused embedding loss of its carriers as they are at this step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wmengine import ops
from wmengine.ops.reference import STDM_BETA, padded_buckets
from wmengine.parts.base import Parameters, Setting
from wmengine.parts.sources.weights import UNIT_CARRIERS, folded
from wmengine.suspects.weights import ModuleTensor, live_factors, live_filters, module_tensors

_MEAN_CARRIERS = ("filter_mean", "unit_filter_mean")


class WeightTerm:
    """See `Link`. Nothing is hooked into the model, and nothing of it is kept from one step to the next."""

    def __init__(self, link: str, strength: float, margin: float, setting: Setting) -> None:
        parameters = setting.mark.parameters
        self._carrier, self._projection = parameters["carrier"], parameters["projection"]
        self._link, self._strength, self._margin = link, strength, margin
        shapes = parameters["carriers"]
        _check_capacity(setting.preset_name, self._carrier, link, margin, shapes, parameters["bits"])
        if (link == "stdm") != ("beta" in parameters):
            raise ValueError(
                f"scheme {setting.preset_name!r} cannot be trained with the link {link!r}: where y has a period, and "
                "nowhere else, the link is 'stdm'"
            )
        self._carriers = carriers_in(setting.model, setting.example, setting.preset_name, parameters)
        self._keys = [int(key) for key in setting.mark.arrays["carrier_keys"]]
        bits = torch.from_numpy(setting.mark.arrays[setting.symbols.name].copy())
        # Where the weights are: to move it in a step would have torch.compile compile again.
        self._bits = bits.to(self._carriers[0].weight.device)
        self._scale = _standard_scale(self._carrier, self._projection, shapes, parameters["bits"])
        if link == "stdm":
            self._scale = parameters["beta"] / STDM_BETA  # the operator's own β is fixed
        self.projected: torch.Tensor | None = None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        weights = [live_filters(model, each) for each in self._carriers]
        factors, signs = [live_factors(model, each) for each in self._carriers], None
        device = weights[0].device
        if self._carrier not in UNIT_CARRIERS:
            weights = [folded(*each, self._carrier) for each in zip(weights, factors, strict=True)]
        elif any(factor is not None for factor in factors):
            ones = torch.ones(max(map(len, weights)), device=device)
            pairs = zip(weights, factors, strict=True)
            signs = torch.cat([ones[: len(w)] if f is None else f.detach().sign().float() for w, f in pairs])
        if self._bits.device != device:
            self._bits = self._bits.to(device)
        term, y = ops.embedding_loss(
            weights,
            self._keys,
            self._bits,
            carrier=self._carrier,
            projection=self._projection,
            link=self._link,
            margin=self._margin,
            scale=self._scale,
            signs=signs,
        )
        self.projected = torch.sin(STDM_BETA * y.detach()) if self._link == "stdm" else y.detach()
        result: torch.Tensor = self._strength * term
        return result

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


def carriers_in(
    model: torch.nn.Module, example: Mapping[str, torch.Tensor], name: str, parameters: Parameters
) -> list[ModuleTensor]:
    """The weights that a mark called `name` lies in. Raises ValueError where the model has others there."""
    every, places = module_tensors(model, example), parameters["carrier_indices"]
    found = [every[place] for place in places if place < len(every)]
    if [list(each.filters(each.weight).shape) for each in found] != parameters["carriers"]:
        raise ValueError(f"the mark {name!r} is of a model with other weights: go on with the model it is for")
    return found


def _check_capacity(
    name: str, carrier: str, link: str, margin: float, shapes: Sequence[Sequence[int]], bits: int
) -> None:
    """Raises ValueError where no weights could carry the bits.

    T projections of M values can all be set only if M >= T. For unit filters a bucket's y is at most √(M/T) standard
    deviations (all of its weights agreeing), so that a margin of m needs M >= m²·T; at equality nothing is left for
    the task.
    """
    values = sum(math.prod(shape[1:] if carrier in _MEAN_CARRIERS else shape) for shape in shapes)
    wide = max(1.0, margin) if carrier == "unit_filters" and link in ("hinge", "mse") else 1.0
    needed = math.ceil(bits * wide**2)
    if values < needed:
        raise ValueError(
            f"scheme {name!r} needs at least {needed} carrier values for {bits} bits, and the model's "
            f"{len(shapes)} carriers hold {values}; ask for fewer with wmengine.scheme({name!r}, bits=...)"
        )


def _standard_scale(carrier: str, projection: str, shapes: Sequence[Sequence[int]], bits: int) -> float:
    """What makes y of an unmarked model have standard deviation 1, so that the margin is in those units.

    A keyed sign (or standard normal) projection of v has variance Σv², spread over the P buckets of a sketch; Σv² is
    R for R unit filters and about Σ 1/O for their means. Weights that are not normalised keep their paper's y = X·w.
    """
    if carrier not in UNIT_CARRIERS:
        return 1.0
    energy = sum(shape[0] if carrier == "unit_filters" else 1.0 / shape[0] for shape in shapes)
    buckets = padded_buckets(bits) if projection == "sketch" else 1
    return math.sqrt(buckets / energy)
