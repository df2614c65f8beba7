"""The course of `WeightNoise`: mixed rows, and passes of some triggers through networks with noise on their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from wmengine.parts.base import Setting
from wmengine.parts.training.second_pass import ROWS, SecondPass, logits_of
from wmengine.suspects.computed import check_unsharded

if TYPE_CHECKING:
    from wmengine.parts.training.weight_noise import WeightNoise


class NoisyRows(SecondPass):
    def __init__(self, training: WeightNoise, setting: Setting) -> None:
        super().__init__(setting)
        check_unsharded(setting.model)
        self._training = training

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        inputs, labels = self.trigger_rows(self.some(ROWS), device)
        seed = int(torch.randint(1 << 62, (), generator=self._generator))
        generator, draws = torch.Generator(device).manual_seed(seed), self._training.draws
        losses = []
        for level in range(1, draws + 1):
            noisy = noisy_parameters(model, self._training.noise * level / draws, generator)
            rows = {name: values.clone() for name, values in inputs.items()}
            losses.append(functional.cross_entropy(logits_of(model, rows, noisy), labels))
        return torch.stack(losses).mean()


def noisy_parameters(model: torch.nn.Module, noise: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All parameters by name, each with Gaussian noise of `noise` times its root mean square; differentiable."""
    found = {}
    for name, values in model.named_parameters():
        drawn = torch.randn(values.shape, generator=generator, device=values.device, dtype=torch.float32)
        size = values.detach().float().square().mean().sqrt()
        found[name] = values + (noise * size * drawn).to(values.dtype)
    return found
