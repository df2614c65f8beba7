"""The recipe by which networks of the larger tasks are trained, with a mark and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Adam with a one-cycle schedule. pictures: they are mirrored at random, under autocast to bfloat16."""

    epochs: int
    batch: int
    rate: float
    pictures: bool = False

    def __str__(self) -> str:
        said = f"{self.epochs} epochs, Adam, one cycle to {self.rate:g}, batches of {self.batch}"
        return f"{said}, mirrored, bfloat16" if self.pictures else said

    def __call__(self, model: Any, rows: Rows, seed: int, embedder: Any = None, tuned: int | None = None) -> nn.Module:
        """The model in eval mode. rows: inputs and labels, which may be shares of classes. embedder: with an Embedder's
        `mix` and `loss`. tuned: labels are smoothed by 0.1; of a finished network, for so many epochs at half the rate,
        or 0 for one that is at its beginning.
        """
        inputs, labels = rows
        optimizer = torch.optim.Adam(model.parameters())
        steps, epochs, rate = len(labels) // self.batch, tuned or self.epochs, self.rate / 2 if tuned else self.rate
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=steps)
        generator = torch.Generator().manual_seed(seed)
        smoothing = 0.0 if tuned is None else 0.1
        model.train()
        for _ in range(epochs):
            for chosen in torch.randperm(len(labels), generator=generator)[: steps * self.batch].split(self.batch):
                x, y = inputs[chosen], labels[chosen]
                if self.pictures:
                    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < 0.5
                    x = torch.where(mirrored, x.flip(-1), x)
                if embedder is not None:
                    x, y = embedder.mix(x, y)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=self.pictures):
                    logits = model(x.contiguous(memory_format=torch.channels_last) if self.pictures else x)
                    if embedder is None:
                        loss = functional.cross_entropy(logits, y, label_smoothing=smoothing)
                    else:
                        loss = embedder.loss(logits, y, label_smoothing=smoothing, inputs=x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        trained: nn.Module = model.eval()
        return trained
