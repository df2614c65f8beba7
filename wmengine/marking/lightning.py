"""Marks in a Lightning training: a callback beside the two changed lines of `training_step`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from wmengine.marking.embedder import Embedder


class MarkingCallback(Callback):
    """Keeps an Embedder's state in checkpoints, logs how far each mark is after every epoch (`SCHEME_matched`), and
    saves FOLDER/SCHEME.wm when the training is over.

    The module mixes and has its loss from the same Embedder: in `training_step`, `x, y = emb.mix(*batch)` and
    `return emb.loss(self(x), y)`. Where several processes train, each makes its own Embedder.
    """

    def __init__(self, embedder: Embedder, folder: str | os.PathLike[str]) -> None:
        self.embedder = embedder
        self.folder = Path(folder)

    def state_dict(self) -> dict[str, Any]:
        return self.embedder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.embedder.load_state_dict(state_dict)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scheme, found in self.embedder.metrics.items():
            pl_module.log(f"{scheme}_matched", float(found["matched"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        marks = self.embedder.watermarks()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for mark in marks:
                mark.save(self.folder / f"{mark.scheme}.wm")
