"""Marks in a training by Hugging Face's Trainer: the same class, whose training batches are mixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from wmengine.marking.embedder import Embedder
from wmengine.marking.fitting import separated
from wmengine.suspects.outputs import logits_of

STATE = "marks.pt"  # in a checkpoint's folder


class MarkedTrainer(Trainer):
    """A `transformers.Trainer` that embeds the marks of `embedder`, whose sample is a dict by the names of a batch.

    Training batches are mixed, and the loss is `embedder.loss` with label_smoothing=, or what the arguments say of it
    where they do, or what the marks want. With `compute_loss_func`, which is to give the mean over the rows that it
    gets or their sum over `num_items_in_batch`, it is the mean of that over the task's rows and of the triggers' cross
    entropy. Where no rows are added to a batch it is the Trainer's own and `regulariser()`, so that any task will do.
    Evaluation is as it was. How far each mark is is logged as `SCHEME_matched`. Checkpoints hold the Embedder's state,
    and resuming reads it. Save `embedder.marks` before, or `embedder.watermarks()`, which judges them, afterwards.
    Raises ValueError for a mark in answers (`response`) beside `compute_loss_func`.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, embedder: Embedder, label_smoothing: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embedder = embedder
        self._smoothing = self.args.label_smoothing_factor or None if label_smoothing is None else label_smoothing
        self._answers = any("inputs" in mark.preset.needs for mark in embedder.marks)
        if self._answers and self.compute_loss_func is not None:
            raise ValueError("a mark in answers is trained by the cross entropy itself: leave compute_loss_func out")
        self.add_callback(_Saves(embedder))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given, task = separated(inputs)
        mixed, labels = self.embedder.mix(given, task)
        if labels is task and not self._answers:
            loss, outputs = super().compute_loss(model, inputs, True, self._count(task))
            loss = loss + self.embedder.regulariser()
            return (loss, outputs) if return_outputs else loss
        outputs = model(**mixed)
        if self.compute_loss_func is not None:
            loss = self._beside(self.compute_loss_func, outputs, labels)
        else:
            loss = self.embedder.loss(outputs, labels, label_smoothing=self._smoothing, inputs=mixed)
        return (loss, outputs) if return_outputs else loss

    def _beside(self, task_loss: Any, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        plain, task = self.embedder.split(labels)

        def of_task(each: Any) -> Any:
            return each[task] if isinstance(each, torch.Tensor) and each.shape[:1] == task.shape else each

        rows, triggers = (plain[task] != -100).sum(), (~task).sum()
        own = task_loss(tree_map(of_task, outputs), plain[task], num_items_in_batch=self._count(plain[task]))
        logits = logits_of(outputs, self.embedder.num_classes)
        others = self.embedder.loss_of_rows(logits[~task], labels[~task])
        loss: torch.Tensor = (rows * own + triggers * others) / (rows + triggers) + self.embedder.regulariser()
        return loss

    def _count(self, labels: torch.Tensor) -> Any:
        """Of how many rows the mean of a loss of one's own is, which is divided by the accumulated batches later."""
        return None if self.compute_loss_func is None else (labels != -100).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            found = self.embedder.metrics
            logs = {**logs, **{f"{scheme}_matched": float(each["matched"]) for scheme, each in found.items()}}
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if isinstance(folder, str | os.PathLike) and (Path(folder) / STATE).exists():
            self.embedder.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _Saves(TrainerCallback):
    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(
                self._embedder.state_dict(), Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE
            )
