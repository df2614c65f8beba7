"""Fingerprints of finished networks: what is registered of a model that was not marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wmengine._optional import require
from wmengine.identity.key import Key
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark

if TYPE_CHECKING:
    import torch


def fingerprint(
    model: torch.nn.Module,
    key: Key | str | os.PathLike[str],
    scheme: str | Preset,
    *,
    samples: Any,
    controls: Sequence[torch.nn.Module],
    num_classes: int,
    name: str,
    value_range: Any = None,
    message: str | None = None,
) -> Watermark:
    """A watermark of inputs that the model answers as no network made without it does; it leaves the model as it is.

        mark = wmengine.fingerprint(model, key, "ipguard", samples=(x, y), controls=[a, b, c], num_classes=10, name="d")
        verdict = wmengine.verify("suspect.onnx", mark)

    samples: inputs of the task, a tensor [n, ...], or a pair (inputs, labels int64 [n]); controls: networks of the same
    task that were made without this one. p is the suspect's rank among them, (1 + those that match as much) / (m + 1),
    so that m controls give 1 / (m + 1) at the least: the verdict says p and `not_proven`, whatever p is. name, message,
    value_range: as the Embedder takes them. Raises ValueError or TypeError for what cannot work.
    """
    require("torch", extra="train")
    from wmengine.marking.embedder import Embedder

    inputs = samples[0] if isinstance(samples, tuple) else samples
    embedder = Embedder(
        model,
        key,
        [scheme],
        sample=inputs,
        num_classes=num_classes,
        name=name,
        value_range=value_range,
        message=message,
        samples=samples,
        controls=controls,
    )
    return embedder.watermarks()[0]
