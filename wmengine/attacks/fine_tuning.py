"""Fine-tuning with the thief's own labels: the last layer or all, the last one as it was or drawn anew."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from wmengine.attacks.data import Data
from wmengine.attacks.training import cross_entropy, last_layer, logits, train

if TYPE_CHECKING:
    import numpy as np
    import torch


def fine_tune(
    model: torch.nn.Module,
    data: Data,
    random: np.random.Generator,
    *,
    last_only: bool,
    anew: bool,
    epochs: int,
    rate: float,
    batch: int,
) -> torch.nn.Module:
    """Train on the cross entropy of labels. last_only: only the last layer is, and no statistics of a normalisation are
    counted on. anew: the last layer begins as its kind of layer does."""
    last = last_layer(model, data) if last_only or anew else None
    if last is not None and anew:
        last.reset_parameters()
    return train(
        model,
        data,
        lambda inputs, labels: cross_entropy(logits(model, inputs), labels),
        random,
        epochs=epochs,
        rate=rate,
        batch=batch,
        layer=last if last_only else None,
    )


ftll = partial(fine_tune, last_only=True, anew=False)
ftal = partial(fine_tune, last_only=False, anew=False)
rtll = partial(fine_tune, last_only=True, anew=True)
rtal = partial(fine_tune, last_only=False, anew=True)
