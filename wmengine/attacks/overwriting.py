"""Overwriting: the thief embeds marks of his own over the owner's, with another key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wmengine.attacks.data import Data, Inputs
from wmengine.attacks.training import checked, joined, logits, placed, rows_of, train
from wmengine.identity.key import Key
from wmengine.marks.preset import Preset
from wmengine.parts.fields import integer
from wmengine.suspects.weights import evaluating

if TYPE_CHECKING:
    import numpy as np
    import torch

MOST_TIMES = 1000
THIEF, STOLEN = "thief", "stolen"  # the owner of his key, and what he calls the model
SAMPLE, SAMPLES = 64, 4096


def overwrite(
    model: torch.nn.Module,
    data: Data,
    random: np.random.Generator,
    *,
    scheme: str | Preset | Sequence[str | Preset],
    times: int,
    epochs: int,
    rate: float,
    batch: int,
) -> torch.nn.Module:
    """Train with marks of a fresh key, `times` times one after the other.

    scheme: a scheme of the engine or several, by name or as `wmengine.scheme(...)` gives them. Each time the secret of
    the key "thief" is the next 32 bytes of `random`, the model is "stolen" and the sample the first 64 rows of data, so
    that whoever knows the seed can read the marks. Schemes that take samples of the task are given some thousand rows
    of data with their labels. Raises ValueError for schemes that need more than data.
    """
    from wmengine.marking.embedder import Embedder
    from wmengine.marks.catalogue import scheme as named

    schemes = [scheme] if isinstance(scheme, str | Preset) else scheme
    if not isinstance(schemes, Sequence) or not all(isinstance(each, str | Preset) for each in schemes):
        raise ValueError(f"scheme must be the name of a scheme, or a list of such, and it is {scheme!r}")
    needs = {need for each in schemes for need in (named(each) if isinstance(each, str) else each).needs}
    if "controls" in needs:
        raise ValueError(
            f"a thief has no controls, networks made without the mark, which {scheme!r} needs: choose another"
        )
    keys = [Key(THIEF, random.bytes(32)) for _ in range(integer("times", times, 1, MOST_TIMES))]
    for each in model.parameters():  # what the owner froze can carry marks too
        each.requires_grad_(each.is_floating_point())
    sample = placed(model, data.example(SAMPLE))
    with evaluating(model):
        num_classes = logits(model, sample).shape[1]
    samples = _samples(model, data, num_classes) if "samples" in needs else None
    for key in keys:
        embedder = Embedder(model, key, schemes, num_classes=num_classes, sample=sample, name=STOLEN, samples=samples)

        def loss(inputs: Inputs, labels: torch.Tensor | None, embedder: Embedder = embedder) -> torch.Tensor:
            inputs, labels = embedder.mix(inputs, checked(labels, rows_of(inputs), num_classes))
            return embedder.loss(logits(model, inputs), labels, label_smoothing=0.0, inputs=inputs)

        train(model, data, loss, random, epochs=epochs, rate=rate, batch=batch)
    return model


def _samples(model: torch.nn.Module, data: Data, classes: int) -> tuple[Inputs, torch.Tensor]:
    """Rows of data, at least 4,096 where there are as many, with their labels."""
    import torch

    found: list[tuple[Inputs, torch.Tensor]] = []
    for inputs, labels in data.batches(SAMPLES, torch.Generator().manual_seed(0)):
        found.append((placed(model, inputs), checked(labels, rows_of(inputs), classes)))
        if sum(len(labels) for _, labels in found) >= SAMPLES:
            break
    rows, truths = zip(*found, strict=True)
    return joined(*rows), torch.cat(truths)
