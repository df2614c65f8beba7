"""The course of `Offset`: what the base makes of a batch becomes the pattern that its logits are to hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from wmengine.parts.base import Setting
from wmengine.parts.responses.bases import base_of, tensors
from wmengine.parts.responses.pattern import CLIP, contrasts, directions, pattern_of
from wmengine.parts.training.second_pass import in_eval_mode, logits_of

if TYPE_CHECKING:
    from wmengine.parts.training.offset import Offset

_PROBED = 64
_SMOOTHING = 0.1
_WARMTH = 2.0


class OffsetCourse:
    """Its base is a copy of the first control, or of the model as it was when there is none."""

    projected: torch.Tensor | None = None

    def __init__(self, training: Offset, setting: Setting) -> None:
        mark = setting.mark
        bits = mark.arrays[setting.symbols.name]
        self._mixtures, self._last = training.mixtures, dict[str, torch.Tensor]()
        self.smoothing = 0.0 if training.mixtures else _SMOOTHING
        self._base = base_of(setting.controls[0] if setting.controls else setting.model, setting.example)
        scale = training.strength / pattern_of(mark.arrays["features"], mark.arrays, bits).std()
        signed = np.where(bits, scale, -scale)[:, None] * contrasts(mark.arrays["contrasts"])
        arrays = mark.arrays["centre"], mark.arrays["whitening"], directions(mark.arrays["directions"]).T, signed
        self._tensors = [torch.tensor(np.asarray(array, np.float32)) for array in arrays]
        self._check(setting)

    # A step that is compiled breaks here: the base is a network of its own, and a hook shows what it makes of a batch.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._last = {name: rows.detach()[: self._mixtures] for name, rows in inputs.items()}
        return self._whitened(self._base.both(inputs)[0])

    def offset(self, features: torch.Tensor) -> torch.Tensor:
        _, _, ways, signed = self._on(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return torch.tanh(features.float() @ ways) @ signed

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def term(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Of mixtures of the last batch's inputs; features that were kept come without inputs, and bring none."""
        inputs, self._last = self._last, {}
        if any(len(rows) < 2 for rows in inputs.values()) or not inputs or not torch.is_grad_enabled():
            return None
        first = next(iter(inputs.values()))
        tokens = first.ndim == 2 and not first.is_floating_point()
        mixed = {name: _mixed(rows, tokens) for name, rows in inputs.items()}
        features, answered = self._base.both(mixed)
        taught = (answered.float() + self.offset(self._whitened(features))) / _WARMTH
        with in_eval_mode(model):
            like = next(model.parameters())
            given = {name: rows.to(like if rows.is_floating_point() else like.device) for name, rows in mixed.items()}
            found = logits_of(model, given) / _WARMTH
        losses = found.log_softmax(1), taught.to(found.device).log_softmax(1)
        return _WARMTH**2 * functional.kl_div(*losses, log_target=True, reduction="batchmean")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""

    def _whitened(self, raw: torch.Tensor) -> torch.Tensor:
        centre, whitening, _, _ = self._on(raw.device)
        with torch.autocast(raw.device.type, enabled=False):
            return ((raw - centre) @ whitening).clamp(-CLIP, CLIP)

    def _on(self, device: torch.device) -> list[torch.Tensor]:
        self._tensors = [each.to(device, non_blocking=True) for each in self._tensors]
        return self._tensors

    def _check(self, setting: Setting) -> None:
        """Raises ValueError unless the base makes of the first probes what the mark holds, and answers as it must."""
        raw, answered = self._base.both(tensors(setting.source.examples(setting.mark, _PROBED)))
        if self._mixtures and not isinstance(answered, torch.Tensor):
            raise ValueError(f"mixtures= needs a base that answers logits [n, C], not {type(answered).__name__}")
        if not setting.source.fits(setting.mark, raw.cpu().numpy()):
            raise ValueError(
                f"the features of {setting.preset_name!r} are another network's: give controls= the networks that the "
                "mark was made with, its base first (without controls, the model as it was before)"
            )


def _mixed(rows: torch.Tensor, tokens: bool) -> torch.Tensor:
    """Each row with the one before it: of numbers the mean, of tokens and masks [n, L] the beginning of the first, a
    token longer from row to row, and the rest of the other, so that all inputs are cut alike."""
    others = rows.roll(1, 0)
    if tokens:
        count, length = rows.shape
        cut = 1 + torch.arange(count, device=rows.device) % max(1, length - 1)
        return torch.where(torch.arange(length, device=rows.device) < cut[:, None], rows, others)
    return (rows + others) / 2
