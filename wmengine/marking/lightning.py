"""Marks in a Lightning training: a callback beside the two changed lines of `training_step`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from wmengine.marking.embedder import Embedder
from wmengine.marks.watermark import Watermark


class MarkingCallback(Callback):
    """Saves FOLDER/SCHEME.wm before the first step, keeps an Embedder's state in checkpoints, logs how far each mark is
    after every epoch (`SCHEME_matched`), and judges the marks when the training is over.

    The module mixes and has its loss from the same Embedder: in `training_step`, `x, y = emb.mix(*batch)` and
    `return emb.loss(self(x), y)`. Where several processes train, each makes its own Embedder. Raises WatermarkError,
    before anything is trained, where the folder holds another mark of the scheme.
    """

    def __init__(self, embedder: Embedder, folder: str | os.PathLike[str]) -> None:
        self.embedder = embedder
        self.folder = Path(folder)

    def state_dict(self) -> dict[str, Any]:
        return self.embedder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.embedder.load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for mark in self.embedder.marks:
            path = self.folder / f"{mark.scheme}.wm"
            mark.save(path, overwrite=path.exists() and Watermark.load(path).commitment == mark.commitment)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scheme, found in self.embedder.metrics.items():
            pl_module.log(f"{scheme}_matched", float(found["matched"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.embedder.watermarks()
