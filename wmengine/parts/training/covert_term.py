"""The course of `Covert`: beside the pull of the bits, a small critic that is trained in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils import skip_init

from wmengine.parts.base import Setting
from wmengine.parts.training.extracted_term import ExtractedTerm
from wmengine.suspects.weights import live_filters

LEVELS, HIDDEN, NOISY, NOISE, RATE = 128, 64, 16, 0.05, 1e-3


class CovertTerm(ExtractedTerm):
    """The critic judges how values are distributed: sorted, averaged in LEVELS equal parts, in units of the plain ones'
    size, with noise, so that it stays unsure of what is nearly alike."""

    def __init__(self, strength: float, critic: float, setting: Setting) -> None:
        super().__init__("bce", strength, 1.0, setting)
        self._critic_strength = critic
        self._plain = self._weight(setting.model).detach().clone()
        # Its own generator: the user's random numbers stay what they would be without the mark.
        self._generator = torch.Generator().manual_seed(setting.seed)
        self._levels = min(LEVELS, len(self._plain))
        shapes = (self._levels, HIDDEN), (HIDDEN, 1)
        layers = [skip_init(torch.nn.Linear, *each) for each in shapes]  # type: ignore[no-untyped-call]
        for layer in layers:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=self._generator)
            torch.nn.init.zeros_(layer.bias)
        self._critic = torch.nn.Sequential(layers[0], torch.nn.LeakyReLU(0.2), layers[1]).to(self._plain.device)
        self._optimizer = torch.optim.Adam(self._critic.parameters(), RATE, betas=(0.5, 0.999))

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        weight = self._weight(model)
        if self._plain.device != weight.device:
            self._move(weight.device)
        if torch.is_grad_enabled():
            self._learn(weight.detach())
        hidden = functional.softplus(-self._judged(weight)).mean()
        return super().term(model) + self._critic_strength * hidden

    def state_dict(self) -> dict[str, Any]:
        return {
            "plain": self._plain.cpu(),
            "critic": self._critic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._plain = state["plain"].to(self._plain.device)
        self._critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())

    def _weight(self, model: torch.nn.Module) -> torch.Tensor:
        """The values as they are stored: folding a normalisation, whose statistics move, would say how far it is."""
        return live_filters(model, self._carrier).flatten().float()

    def _judged(self, weight: torch.Tensor) -> torch.Tensor:
        """[NOISY, 1]: how plain the values look to the critic."""
        size = self._plain.square().mean().sqrt().clamp(min=1e-30)
        part = len(weight) // self._levels
        levels = weight.sort().values[: part * self._levels].reshape(-1, part).mean(1) / size
        noise = NOISE * torch.randn(NOISY, self._levels, generator=self._generator)
        judged: torch.Tensor = self._critic(levels + noise.to(levels.device, non_blocking=True))
        return judged

    def _learn(self, weight: torch.Tensor) -> None:
        loss = functional.softplus(-self._judged(self._plain)).mean() + functional.softplus(self._judged(weight)).mean()
        parameters = list(self._critic.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def _move(self, device: torch.device) -> None:
        """After the model, its optimizer's state included."""
        self._plain = self._plain.to(device)
        self._critic.to(device)
        self._optimizer.load_state_dict(self._optimizer.state_dict())
