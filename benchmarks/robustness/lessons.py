"""Other ways to put `response` into a network than the product's, for the table of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from wmengine.marking.embedder import Embedder
from wmengine.marks.watermark import Watermark
from wmengine.parts.responses.pattern import contrasts, directions, pattern_of

_WARMTH = 2.0  # in which scores are read
_SLOW = 0.98  # how much of a running mean each step keeps


@dataclass(frozen=True)
class Lesson:
    """taught: what share of each label is the mean of what unmarked networks of the owner's answer, with and without a
    mark. offset: whether the loss is that of the logits less the pattern, as the product's is. hinge: so many times the
    mean over all bits of max(0, 1 - y_t) is added, y_t what a batch shows of the bit, read as verification does against
    the base alone; 1 is what all of the pattern would show."""

    taught: float = 0.0
    offset: bool = True
    hinge: float = 0.0


class Learner:
    """What a training loop calls in an Embedder's place. networks: unmarked ones, the base first."""

    def __init__(self, lesson: Lesson, embedder: Embedder | None, networks: Sequence[nn.Module]) -> None:
        self._lesson, self._embedder, self._networks = lesson, embedder, networks
        self._full = torch.zeros(())
        if embedder is not None:
            self._ways, self._signed, self._scale = pattern_of_mark(embedder.marks[0])

    def mix(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, y

    def loss(
        self, logits: torch.Tensor, y: torch.Tensor, *, label_smoothing: float = 0.0, inputs: torch.Tensor
    ) -> torch.Tensor:
        if self._lesson.taught:
            with torch.no_grad():
                shares = torch.stack([network(inputs).float().softmax(1) for network in self._networks]).mean(0)
            y = torch.lerp(functional.one_hot(y, shares.shape[1]).to(shares), shares, self._lesson.taught)
        if self._embedder is None or not self._lesson.offset:
            loss = functional.cross_entropy(logits, y, label_smoothing=label_smoothing)
        else:
            loss = self._embedder.loss(logits, y, label_smoothing=label_smoothing, inputs=inputs)
        if self._embedder is not None and self._lesson.hinge:
            loss = loss + self._lesson.hinge * self._short(self._embedder.features(inputs), logits, inputs)
        return loss

    def _short(self, features: torch.Tensor, logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            base = self._networks[0](inputs).float()
        with torch.autocast(inputs.device.type, enabled=False):
            ways, signed = self._ways.to(base.device), self._signed.to(base.device)
            bent = torch.tanh(features @ ways)
            plain, whole = ((each / _WARMTH).softmax(1) for each in (base, base + self._scale * bent @ signed))
            bent -= bent.mean(0)
            full = ((bent.T @ (whole - plain)) * signed).sum(1).mean()
            self._full = _SLOW * self._full + (1.0 - _SLOW) * full if self._full else full
            shown = ((bent.T @ ((logits.float() / _WARMTH).softmax(1) - plain)) * signed).sum(1)
            return functional.relu(1.0 - shown / self._full).mean()


def pattern_of_mark(mark: Watermark) -> tuple[torch.Tensor, torch.Tensor, float]:
    """g [D, T], ±v [T, C], and by what the sum over all bits is multiplied for the mark's strength."""
    arrays = mark.arrays
    signed = np.where(mark.symbols, 1.0, -1.0)[:, None] * contrasts(arrays["contrasts"])
    scale = mark.preset.options["strength"] / pattern_of(arrays["features"], arrays, mark.symbols).std()
    return torch.tensor(directions(arrays["directions"]).T).float(), torch.tensor(signed).float(), float(scale)
