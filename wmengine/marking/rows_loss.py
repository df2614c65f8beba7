"""The cross entropy of task rows and trigger rows together, as torch has it: smoothing, class weights, soft labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from wmengine import ops
from wmengine.marking.batches import IGNORE_INDEX


def rows_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, hits int64 [groups]) of logits [n, C] and labels int64 [n] or soft [n, C]; group int64 [n], 0 the task's.

    weight: [C], of the task's classes; a trigger row's are all 1. Numbers are averaged as torch does, over the weights
    of the rows' own classes, and soft labels over the rows; without rows the loss is 0. Raises ValueError for a weight
    of another shape and for smoothing out of its range.
    """
    classes = logits.shape[1]
    if not isinstance(label_smoothing, int | float) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be a number from 0 to 1, and it is {label_smoothing!r}")
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (classes,):
            raise ValueError(f"weight must be a tensor [{classes}], a weight for each class, and it is {weight!r:.100}")
        weight = weight.detach().to(logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if len(labels) == 0:
        return logits.float().sum(), torch.zeros(groups, dtype=torch.int64, device=logits.device)
    if labels.ndim == 1 and (weight is None or label_smoothing == 0.0):
        of_rows = None if weight is None else torch.where(group == 0, weight[labels.clamp(0, classes - 1)], 1.0)
        result = ops.marked_cross_entropy(
            logits,
            labels,
            of_rows,
            group,
            groups=groups,
            label_smoothing=label_smoothing,
            ignore_index=IGNORE_INDEX,
        )
        return result.loss, result.group_hits
    kept = group >= 0 if labels.ndim == 2 else labels != IGNORE_INDEX
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logits = torch.where(kept[:, None], wide, 0.0)
    of_classes = torch.ones_like(logits) if weight is None else torch.where(group[:, None] == 0, weight, 1.0)
    if labels.ndim == 2:
        shares, total, labels = labels.to(logits), kept.sum(), labels.argmax(1)
    else:
        shares = functional.one_hot(labels.clamp(min=0), classes).to(logits) * kept[:, None]
        total = (shares * of_classes).sum()
    smoothed = shares * (1.0 - label_smoothing) + label_smoothing / classes * kept[:, None]
    loss = -(of_classes * smoothed * logits.log_softmax(1)).sum() / total
    hits = kept & (logits.argmax(1) == labels)
    by_group = group == torch.arange(groups, device=group.device)[:, None]
    return loss, (by_group & hits).sum(1)
