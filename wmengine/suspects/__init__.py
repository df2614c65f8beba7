"""Suspects: anything that might be a copy. `open_suspect` takes a file, a URL, a torch module or a function."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from wmengine.sandbox import Limits
from wmengine.suspects.base import Suspect, is_url
from wmengine.suspects.checkpoint import CheckpointSuspect, is_checkpoint
from wmengine.suspects.onnx_file import OnnxSuspect

__all__ = ["OnnxSuspect", "Suspect", "open_suspect"]


def open_suspect(
    suspect: Any,
    isolation: str = "persistent",
    limits: Limits | None = None,
    device: str = "cpu",
    inputs: Mapping[str, float] | None = None,
    labels: Sequence[str] | None = None,
) -> Suspect:
    """A suspect from a path, a URL, a torch module, a function, or a suspect that is open already.

    A file that begins as safetensors, GGUF or torch's checkpoints do, and is not named .onnx, is a checkpoint.
    isolation, limits, device, inputs and labels are for ONNX files: see OnnxSuspect. A URL is asked as `endpoint` does
    without options.

    Raises FileNotFoundError for a path that does not exist, ValueError for a URL that is no endpoint's and for another
    device than the CPU, inputs or labels with what is no file, TypeError for what is none of these, and SuspectError
    for a file that cannot be judged.
    """
    is_file = isinstance(suspect, str | os.PathLike) and not is_url(suspect)
    if device != "cpu" and not is_file:
        raise ValueError(f"device={device!r} is for the path of a file; other suspects run where they are")
    if inputs and not is_file:
        raise ValueError("inputs= is for the path of a file")
    if labels is not None and not is_file:
        raise ValueError("labels= is for the path of a file; an endpoint has them among its options")
    if is_url(suspect):
        from wmengine.suspects.endpoint.suspect import endpoint

        return endpoint(suspect)
    if isinstance(suspect, str) and "://" in suspect and not os.path.exists(suspect):
        from wmengine.suspects.endpoint.address import shown

        raise ValueError(f"{shown(suspect)} is no endpoint, and a file must be downloaded, or scanned where it is")
    if isinstance(suspect, str | os.PathLike) and is_checkpoint(suspect):
        return CheckpointSuspect(suspect)
    if isinstance(suspect, str | os.PathLike):
        return OnnxSuspect(suspect, isolation=isolation, limits=limits, device=device, inputs=inputs, labels=labels)
    if isinstance(suspect, Suspect):
        return suspect
    torch = sys.modules.get("torch")  # whoever holds a module has imported torch: no need to import it here
    if torch is not None and isinstance(suspect, torch.nn.Module):
        from wmengine.suspects.module import ModuleSuspect

        return ModuleSuspect(suspect)
    if callable(suspect):
        from wmengine.suspects.module import CallableSuspect

        return CallableSuspect(suspect)
    mend = ": give its predict_proba" if hasattr(suspect, "predict_proba") else ""
    kind = type(suspect).__name__
    raise TypeError(f"a suspect is a path, a torch module or a callable, and {kind} is none of them{mend}")
