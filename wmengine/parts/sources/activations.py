"""Bits in what a network makes of keyed inputs: the mean activations of groups of them, projected (Rouhani et al.).

Rouhani, Chen, Koushanfar: "DeepSigns", ASPLOS 2019, equations 3 to 5: the centre of a class's activations μ is pulled
to σ(μA) = b. Theirs are centres of some of the task's classes over training data, chosen by the owner; here they are
those of groups of inputs that the key draws, so that nothing scoring reads is chosen. Of equation 3 the term that draws
a group together is kept, the one that drives centres apart has no lower bound and is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.facts import fact
from wmengine.identity.subkeys import philox_key
from wmengine.parts.base import Draw, Drawn, Layout, Need, Observation, Observations, Parameters, Setting, Task
from wmengine.parts.fields import MAX_DIMENSION, canonical_integer, integer, positive
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.suspects.adapters import AS_RECORDED
from wmengine.suspects.base import Suspect

if TYPE_CHECKING:
    import torch

_MOST = 4096  # groups, and inputs in each


@dataclass(frozen=True)
class MeanActivations:
    """What goes into the last matrix of the network, [F] for each input, averaged over the `members` inputs of each of
    `groups` groups; every group has a keyed Gaussian projection to its share of the bits."""

    groups: int = 8
    members: int = 4

    asked = AbstractTriggers()
    needs = Need.ACTIVATIONS
    fields = ("groups", "members", "place", "features", "value_range")

    def __post_init__(self) -> None:
        integer("groups", self.groups, 1, _MOST)
        integer("members", self.members, 1, _MOST)

    def describe(self, task: Task, total: int) -> Parameters:
        """place: the last weight in order of execution; features: F."""
        shapes, _ = task.weights()
        if not shapes or len(shapes[-1]) != 2:
            raise ValueError("it marks what goes into a linear layer at the network's end, and there is none")
        own = {"groups": int(self.groups), "members": int(self.members), "place": len(shapes) - 1}
        return own | {"features": shapes[-1][1], **self.asked.describe(task, self.groups * self.members)}

    def check(self, parameters: Parameters, total: int) -> None:
        groups = canonical_integer("groups", parameters["groups"], 1, _MOST)
        members = canonical_integer("members", parameters["members"], 1, _MOST)
        canonical_integer("place", parameters["place"], 0, MAX_DIMENSION)
        features = canonical_integer("features", parameters["features"], 1, MAX_DIMENSION)
        if total % groups or features < total // groups:
            raise ValueError(f"{groups} groups of {features} activations cannot hold {total} bits")
        self.asked.check(parameters, groups * members)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        count = parameters["groups"] * parameters["members"]
        return {"group_keys": ("uint64", (parameters["groups"],)), **self.asked.layout(parameters, count)}

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]:
        """ "triggers": the inputs, a group after the other; "group_keys" uint64: the Philox keys of projections."""
        keys = [philox_key(subkey("projection", str(group))) for group in range(parameters["groups"])]
        inputs = self.asked.draw(subkey, parameters, parameters["groups"] * parameters["members"])
        return {"group_keys": np.array(keys, np.uint64), **inputs}

    def examples(self, mark: Drawn) -> dict[str, NDArray[np.float32]]:
        return self.asked.examples(mark)

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations:
        way = self.asked.ways(mark, suspect, every=False)[0]
        found = suspect.activations(
            mark.parameters["place"], self.asked.inputs(mark, way, 0, len(mark.arrays["triggers"]))
        )
        facts = list(suspect.facts)
        if str(way) != str(AS_RECORDED):
            facts.append(fact("put_otherwise", adapter=str(way)))
        if found.shape[1] != mark.parameters["features"]:
            return Observations(facts=[*facts, fact("no_carrier")])
        return Observations([Observation(np.asarray(self.projected(found, mark, total), np.float64))], facts)

    def projected(self, activations: Any, mark: Drawn, total: int) -> Any:
        """y [T] of activations [N, F], arrays or tensors: each group's mean, read by keys of its own."""
        groups, members = mark.parameters["groups"], mark.parameters["members"]
        centres = activations.reshape(groups, members, -1).mean(1)
        parts = [self.extracted(centre, mark, group, total // groups) for group, centre in enumerate(centres)]
        if isinstance(activations, np.ndarray):
            return np.concatenate(parts)
        import torch

        return torch.cat(parts)

    def extracted(self, centre: Any, mark: Drawn, group: int, count: int) -> Any:
        """`count` numbers [count] of a group's mean [F]."""
        return ops.project(centre, int(mark.arrays["group_keys"][group]), count, "gaussian")


@dataclass(frozen=True)
class ActivationTerm:
    """strength · Σ BCE(σ(y), b) + pull · the mean squared distance to the centre of one's group (γ2 and γ1); pull may
    be 0."""

    strength: float = 0.01
    pull: float = 0.01

    def __post_init__(self) -> None:
        positive("strength", self.strength)
        if self.pull != 0:
            positive("pull", self.pull)

    def begin(self, setting: Setting) -> _Term:
        return _Term(self, setting)


class _Term:
    def __init__(self, training: ActivationTerm, setting: Setting) -> None:
        import torch

        from wmengine.suspects.weights import module_tensors

        self._training, self._mark, self._source = training, setting.mark, setting.source
        weights, parameters = module_tensors(setting.model, setting.example), setting.mark.parameters
        at = weights[parameters["place"]] if parameters["place"] < len(weights) else None
        if at is None or at.filters(at.weight)[0].numel() != parameters["features"]:
            raise ValueError(
                f"the mark {setting.preset_name!r} is of a model with other weights: go on with the model it is for"
            )
        if at.name != "weight":
            raise ValueError(
                "it marks what goes into a linear layer at the network's end, and there a recurrent one is"
            )
        self._path = at.path
        self._inputs = {name: torch.tensor(rows) for name, rows in setting.source.examples(setting.mark).items()}
        self._bits = torch.tensor(setting.mark.arrays[setting.symbols.name]).float()
        self.projected: torch.Tensor | None = None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        """Of the live model, as it will be judged: in eval mode."""
        import torch

        from wmengine.suspects.weights import going_into

        like = next(model.parameters())
        if self._bits.device != like.device:
            self._bits = self._bits.to(like.device)
            self._inputs = {name: rows.to(like.device) for name, rows in self._inputs.items()}
        # Copies: a model may write into its input.
        inputs = {name: rows.to(like.dtype, copy=True) for name, rows in self._inputs.items()}
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            found = going_into(model, self._path, inputs).float()
        finally:
            for module in training:
                module.training = True
        y = self._source.projected(found, self._mark, len(self._bits))
        self.projected = y.detach()
        grouped = found.reshape(self._mark.parameters["groups"], self._mark.parameters["members"], -1)
        spread = (grouped - grouped.mean(1, keepdim=True)).square().mean()
        link = torch.nn.functional.binary_cross_entropy_with_logits(y, self._bits, reduction="sum")
        return self._training.strength * link + self._training.pull * spread

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
