"""What a thief writes down of his queries: what one network answers, or two, to each alone, or to versions of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from wmengine.suspects import open_suspect

SHIFT = 2  # pixels
NOISE = 0.02  # its standard deviation, of the range of the inputs; more would cost the thief accuracy


def answered(
    networks: Sequence[Any], inputs: torch.Tensor, classes: int, *, scores: bool, versions: int, warmth: float = 1.0
) -> torch.Tensor:
    """Shares of the classes [n, C], softmax(ℓ / warmth), the mean of all that is answered; without scores labels int64
    [n], which most versions have; of those that as many have the query's own. Several networks answer as the mean of
    their shares."""
    suspects, said = [open_suspect(each) for each in networks], []
    for version in versions_of(inputs.cpu(), versions):
        each = [torch.from_numpy(suspect.answer({"input": version.numpy()}, classes).values) for suspect in suspects]
        shares = torch.stack([(values.float() / warmth).softmax(1) for values in each]).mean(0)
        said.append(shares if scores else functional.one_hot(shares.argmax(1), classes).float())
    return torch.stack(said).mean(0) if scores else (sum(said) + said[0] / 2).argmax(1)


def versions_of(inputs: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Pictures [n, C, H, W] as they are, and then shifted, noisy and every other time mirrored, within their range."""
    yield inputs
    generator, (low, high) = torch.Generator().manual_seed(0), inputs.aminmax()
    padded = functional.pad(inputs, (SHIFT,) * 4, mode="replicate") if count > 1 else inputs
    for number in range(1, count):
        top, left = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        moved = padded[..., top : top + inputs.shape[-2], left : left + inputs.shape[-1]]
        moved = moved.flip(-1) if number % 2 else moved
        noise = NOISE * (high - low) * torch.randn(inputs.shape, generator=generator)
        yield (moved + noise).clamp(low, high)
