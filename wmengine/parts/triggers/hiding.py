"""The encoder that hides a logo in pictures, and the two networks that it is trained against and with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

_BATCH, _RATE, _MOST = 32, 3e-3, 0.25  # the largest change of a pixel
_FIRST, _SECOND = 0.01**2, 0.03**2  # SSIM's constants for pictures in [0, 1]


def hidden(pictures: NDArray[np.float32], logo: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """Pictures [P, C, H, W] in [0, 1] with the logo [C, H, W] hidden in each, in [0, 1]; the same on every call."""
    channels = pictures.shape[1]
    plain, mark = torch.from_numpy(pictures), torch.from_numpy(logo)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        encoder = _network(2 * channels, channels, pooled=False)
        critic, reader = (_network(channels, 1, pooled=True) for _ in range(2))
        encoding = torch.optim.Adam([*encoder.parameters(), *reader.parameters()], _RATE)
        judging = torch.optim.Adam(critic.parameters(), _RATE)
        for _ in range(steps):
            batch = plain[torch.randint(len(plain), (_BATCH,))]
            encoded = _encoded(encoder, batch, mark)
            fooled = (
                functional.softplus(critic(batch - 0.5)).mean()
                + functional.softplus(-critic(encoded.detach() - 0.5)).mean()
            )
            judging.zero_grad()
            fooled.backward()  # type: ignore[no-untyped-call]
            judging.step()
            told = functional.softplus(-reader(encoded - 0.5)).mean() + functional.softplus(reader(batch - 0.5)).mean()
            loss = (
                3 * functional.mse_loss(encoded, batch)
                + 5 * (1 - similarity(encoded, batch))
                + 0.1 * functional.softplus(critic(encoded - 0.5)).mean()
                + 2 * told
            )
            encoding.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            encoding.step()
        with torch.no_grad():
            parts = [_encoded(encoder, part, mark) for part in torch.split(plain, 256)]
    return np.asarray(torch.cat(parts).numpy())


def similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The mean structural similarity of pictures [n, C, H, W] in [0, 1], over windows of 7 x 7 (Wang et al. 2004)."""
    mean = [functional.avg_pool2d(each, 7, 1) for each in (first, second)]
    squares = [functional.avg_pool2d(each * each, 7, 1) - m * m for each, m in zip((first, second), mean, strict=True)]
    both = functional.avg_pool2d(first * second, 7, 1) - mean[0] * mean[1]
    above = (2 * mean[0] * mean[1] + _FIRST) * (2 * both + _SECOND)
    below = (mean[0] ** 2 + mean[1] ** 2 + _FIRST) * (squares[0] + squares[1] + _SECOND)
    found: torch.Tensor = (above / below).mean()
    return found


def _network(channels: int, answers: int, *, pooled: bool) -> nn.Sequential:
    layers = [nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 1)] if pooled else [nn.Conv2d(24, answers, 1)]
    return nn.Sequential(*layers, *end)


def _encoded(encoder: nn.Module, pictures: torch.Tensor, logo: torch.Tensor) -> torch.Tensor:
    both = torch.cat([pictures, logo.expand_as(pictures)], dim=1) - 0.5
    found: torch.Tensor = (pictures + _MOST * encoder(both).tanh()).clamp(0.0, 1.0)
    return found
