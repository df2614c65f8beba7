"""Added to finished weights in closed form: a keyed code of signs for each bit, sized by the weights' own deviation.

Pagnotta, Hitaj, Hitaj, Pérez-Cruz, Mancini: "TATTOOED: a robust deep neural network watermarking scheme based on
spread-spectrum channel coding", ACSAC 2024, as in code-division multiple access: w + γ · Σ_t s_t c_t, with s_t = ±1 for
bit t and c_t its code over all weights, and bit t read back as the sign of c_t · w. Three things differ from the
authors' code. Their γ is one number for all models (0.0009); here it follows from the weights, and is what moves each
c_t · w by `margin` of its own standard deviations, which for keyed signs is √Σw². They mark the network after the first
epoch and train on; here it is marked when its training is over, and may be trained on. Their message is an LDPC code
word behind a preamble; here the symbols are the keyed bits themselves, and there is no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.parts.base import Setting
from wmengine.parts.fields import positive
from wmengine.parts.sources.weights import folded
from wmengine.suspects.computed import check_unsharded
from wmengine.suspects.weights import live_factors, live_filters

if TYPE_CHECKING:
    import torch

_MOST_CHANGE = 0.5  # of a weight's deviation; beyond it a network is another one


@dataclass(frozen=True)
class Spread:
    """margin: how far each bit is moved, in standard deviations of what an unmarked network shows. A larger one costs
    accuracy unless the network is trained on; whatever the margin, T · (2 · margin)² weights are needed."""

    margin: float = 4.0

    def __post_init__(self) -> None:
        positive("margin", self.margin)

    def begin(self, setting: Setting) -> _Addition:
        """Raises ValueError where the model's weights are too few, or are not those of the mark."""
        return _Addition(float(self.margin), setting)


class _Addition:
    """The course of `Spread`: no loss, but one change of the weights when their training is over."""

    projected: torch.Tensor | None = None

    def __init__(self, margin: float, setting: Setting) -> None:
        import torch

        from wmengine.parts.training.weight_term import carriers_in

        parameters = setting.mark.parameters
        values, bits = sum(math.prod(shape) for shape in parameters["carriers"]), parameters["bits"]
        needed = math.ceil(bits * (margin / _MOST_CHANGE) ** 2)
        if values < needed:
            raise ValueError(
                f"scheme {setting.preset_name!r} needs at least {needed} weights for {bits} bits, and the model has "
                f"{values}; ask for fewer with wmengine.scheme({setting.preset_name!r}, bits=...)"
            )
        self._margin, self._projection = margin, parameters["projection"]
        self._weights = carriers_in(setting.model, setting.example, setting.preset_name, parameters)
        check_unsharded(setting.model)
        for each in self._weights:
            if not isinstance(each.weight, torch.nn.Parameter):
                raise ValueError(f"the weight of {each.path} is computed from others: remove its parametrisation first")
        self._keys = [int(key) for key in setting.mark.arrays["carrier_keys"]]
        self._signs = 2.0 * setting.mark.arrays[setting.symbols.name].astype(np.float32) - 1.0

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> None:
        return None

    def finish(self, model: torch.nn.Module) -> None:
        """Add the bits, unless the weights show them already.

        What is added to a filter is as large as that filter's own weights, whatever the factor of the normalisation
        behind it, and has that factor's sign: filters are read as they stand after folding it.
        """
        import torch

        bits, energy, gain = len(self._signs), 0.0, 0.0
        y, steps = np.zeros(bits), []
        for each, key in zip(self._weights, self._keys, strict=True):
            with torch.no_grad():
                filters, factors = live_filters(model, each), live_factors(model, each)
                values = folded(filters.float(), factors, "flat").cpu().numpy()
            y += ops.carrier_projection(values, key, bits, "flat", self._projection)
            energy += float(np.square(values, dtype=np.float64).sum())
            gain += float(_deviation(values).sum(dtype=np.float64)) * values[0].size
            steps.append(_deviation(filters.detach().float().cpu().numpy()))
            if factors is not None:
                steps[-1] *= np.sign(factors.detach().float().cpu().numpy()).reshape(steps[-1].shape)
        if gain == 0.0 or np.mean(self._signs * y) > 0.25 * self._margin * math.sqrt(energy):
            return
        size = self._margin * math.sqrt(energy) / gain
        for each, key, step in zip(self._weights, self._keys, steps, strict=True):
            weight: Any = model.get_submodule(each.path).weight
            codes = math.sqrt(weight.numel()) * ops.project_adjoint(self._signs, key, weight.numel(), self._projection)
            with torch.enable_grad():
                stored = torch.zeros_like(weight, dtype=torch.float32, device="cpu", requires_grad=True)
                filters = each.filters(stored)
            added = torch.from_numpy(size * step * codes.reshape(filters.shape)).float()
            with torch.no_grad():  # the adjoint of an order of axes is that order undone
                weight += torch.autograd.grad(filters, stored, added)[0].to(weight.device, weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


def _deviation(filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """The root mean square of each filter's weights, [O, 1, ...]."""
    axes = tuple(range(1, filters.ndim))
    return np.asarray(np.sqrt(np.square(filters).mean(axis=axes, keepdims=True)))
