"""The batches of a training loop: what a sample says of them, trigger rows appended, and clear words for wrong ones.

A trigger row of group g carries its class raised by g · num_classes: as a number, or among soft labels as the place of
its 1 in a row that is so much wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from wmengine.marking.tasks import ONE, ranges_of, samples_of
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Course, inputs_of
from wmengine.parts.fields import MAX_CLASSES, integer
from wmengine.suspects.answers import to_array
from wmengine.suspects.base import InputSpec

IGNORE_INDEX = -100
_ROUNDING = 0.02  # of many small shares in bfloat16


class Batches:
    """What a sample batch, a tensor or a dict of tensors by name, says of all batches."""

    def __init__(self, sample: Any, num_classes: int | None, value_range: Any) -> None:
        self._single = not isinstance(sample, Mapping)
        given = {ONE: sample} if self._single else dict(sample)
        if not given:
            raise ValueError("sample must hold at least one input")
        for name, rows in given.items():
            _check_sample(name, rows, self._single)
        self._sample: dict[str, torch.Tensor] = {name: rows[:1].detach().clone() for name, rows in given.items()}
        self.signature = {
            str(name): InputSpec(tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))
            for name, rows in given.items()
        }
        self.num_classes = None if num_classes is None else integer("num_classes", num_classes, 2, MAX_CLASSES)
        first = to_array(next(iter(given.values())))
        assert first is not None
        self.value_range = ranges_of(first, value_range)

    def fix_classes(self, classes: int, scheme: str) -> None:
        """Take the number of classes that a mark has. Raises ValueError where another one was given."""
        if self.num_classes not in (None, classes):
            raise ValueError(f"the mark {scheme!r} is of {classes} classes, and num_classes is {self.num_classes}")
        self.num_classes = classes

    def check_mark(self, mark: Watermark) -> None:
        """Raises ValueError unless a mark is for models of these inputs."""
        inputs = {name: (spec.shape, spec.dtype) for name, spec in inputs_of(mark.parameters).items()}
        mine = {name: (spec.shape, spec.dtype) for name, spec in self.signature.items()}
        if inputs != mine:
            raise ValueError(f"the mark {mark.scheme!r} is for inputs {inputs}, and the sample holds {mine}")

    def samples(self, given: Any) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None, NDArray[Any] | None]:
        """See `samples_of`."""
        return samples_of(given, self.signature, self._single, self.num_classes)

    def example(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A row of the sample on the model's device; a copy, as a model may write into it."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return {name: rows.to(device, copy=True) for name, rows in self._sample.items()}

    def mixed(
        self, inputs: Any, labels: torch.Tensor, courses: Sequence[tuple[int, Course]]
    ) -> tuple[Any, torch.Tensor]:
        """The batch with the rows of courses appended, the labels of group g raised by g · num_classes."""
        assert self.num_classes is not None
        batch, width = self.checked(inputs, labels), self.num_classes * (1 + len(courses))
        parts, ys = {name: [rows] for name, rows in batch.items()}, [labels]
        if labels.ndim == 2:
            ys = [functional.pad(labels, (0, width - self.num_classes))]
        wanted = max(2, len(labels) // 8)
        for group, course in courses:
            rows = course.rows(wanted, batch)
            if rows is not None:
                for name, values in rows[0].items():
                    memory_format = _memory_format(batch[name])
                    parts[name].append(values.contiguous(memory_format=memory_format))
                raised = rows[1] + group * self.num_classes
                ys.append(raised if labels.ndim == 1 else functional.one_hot(raised, width).to(labels.dtype))
        whole = {name: torch.cat(rows) for name, rows in parts.items()}
        return (whole[ONE] if self._single else whole), torch.cat(ys)

    def seen(self, inputs: Any, labels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch by name, the task's or a mixed one, and its labels with no group in them."""
        named = dict(inputs) if isinstance(inputs, Mapping) else {ONE: inputs}
        return named, split(labels, self.num_classes)[0]

    def named(self, inputs: Any) -> dict[str, torch.Tensor]:
        """The inputs of a batch by name. Raises TypeError where these are other ones than the sample's."""
        if self._single == isinstance(inputs, Mapping) or (not self._single and set(inputs) != set(self.signature)):
            known = "a tensor" if self._single else f"a dict with {', '.join(self.signature)}"
            raise TypeError(f"inputs must be {known}, as the sample was")
        batch: dict[str, torch.Tensor] = {ONE: inputs} if self._single else dict(inputs)
        for rows in batch.values():
            if not isinstance(rows, torch.Tensor):
                raise TypeError(
                    f"inputs must be torch tensors, and {type(rows).__name__} is none: torch.from_numpy(...)"
                )
        return batch

    def checked(self, inputs: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of a batch by name. Raises ValueError or TypeError for a batch unlike the sample, and for labels
        that are none of its classes."""
        labels, batch = checked_labels(labels, self.num_classes), self.named(inputs)
        for name, rows in batch.items():
            shape = self.signature[name].shape
            if tuple(rows.shape[1:]) != shape or len(rows) != len(labels):
                mend = "" if rows.is_floating_point() else "; pad the sequences of all batches to that length"
                raise ValueError(
                    f"a batch must be [n, {', '.join(map(str, shape))}] with n labels, as the sample was, and "
                    f"it is {list(rows.shape)} with {len(labels)} labels{mend}"
                )
            if rows.is_floating_point() != self._sample[name].is_floating_point():
                kind = "floating" if self._sample[name].is_floating_point() else "integers"
                raise TypeError(f"inputs must be {kind}, as the sample was, and they are {rows.dtype}")
            if labels.device != rows.device:
                raise ValueError(f"inputs are on {rows.device} and labels on {labels.device}; move both to one device")
        if labels.ndim == 2:
            if labels.shape[1] != (self.num_classes or labels.shape[1]):
                raise ValueError(f"soft labels must be [n, {self.num_classes}], and they are {list(labels.shape)}")
            return batch
        classes = self.num_classes or MAX_CLASSES
        in_range = ((labels >= 0) & (labels < classes)) | (labels == IGNORE_INDEX)
        if labels.device.type == "cpu":
            if not bool(in_range.all()):
                wrong = labels[~in_range][0].item()
                raise ValueError(f"labels must be from 0 to {classes - 1}, and one is {wrong}")
        else:
            # As torch's own cross-entropy on a GPU: the device stops, and the host does not wait to see.
            torch._assert_async(in_range.all(), f"labels must be from 0 to {classes - 1}")
        return batch


def shares_of(labels: Any, num_classes: int | None) -> Any:
    """Labels as they are, or of two classes the second's shares, floating [n] or [n, 1] as binary cross entropy takes
    them, as soft labels [n, 2]."""
    binary = isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.shape[1:] in ((), (1,))
    return torch.stack([1 - labels, labels], -1).reshape(-1, 2) if binary and num_classes == 2 else labels


def split(labels: torch.Tensor, num_classes: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as the task has them, of trigger rows too, and the group int64 [n] of each row; 0 is the task."""
    if num_classes is None:
        return labels, torch.zeros_like(labels[:, 0] if labels.ndim == 2 else labels, dtype=torch.int64)
    if labels.ndim == 2:
        by_group = labels.reshape(len(labels), -1, num_classes)
        return by_group.sum(1), by_group.sum(2).argmax(1)
    group = (labels // num_classes).clamp(min=0)  # ignored rows are the task's
    return torch.sub(labels, group, alpha=num_classes), group


def check_logits(logits: torch.Tensor, labels: torch.Tensor, num_classes: int | None) -> int:
    """The number of classes of these logits. Raises ValueError or TypeError where they do not fit the labels."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits must be a torch tensor [n, C], and they are {type(logits).__name__}")
    classes = logits.shape[1] if num_classes is None and logits.ndim == 2 else num_classes
    labels = checked_labels(labels, classes)
    if logits.ndim != 2 or tuple(logits.shape) != (len(labels), classes):
        raise ValueError(
            f"logits must be [{len(labels)}, {classes}], a row for each label, and they are {list(logits.shape)}"
        )
    return int(classes or 0)


def checked_labels(labels: Any, classes: int | None) -> torch.Tensor:
    """Class numbers of any integer type as int64 [n], or soft labels (a share of each class) as wide as logits, or as
    `mix` makes them; TypeError for anything else."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor of class numbers [n], and they are {type(labels).__name__}")
    soft = labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 0
    if soft and labels.shape[1] % (classes or labels.shape[1]) == 0:
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((labels.detach().double().sum(1) - 1.0).abs() > _ROUNDING) | (labels < 0.0).any(1)
            if bool(wrong.any()):
                raise ValueError(
                    "soft labels must be shares of the classes that add up to 1, and a row of them does not: for "
                    "several labels at once there is 'adi_multilabel', beside a loss of your own"
                )
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim != 1:
        raise TypeError(
            f"labels must be class numbers, integers [n], or soft labels, floating [n, {classes or 'C'}], and they are "
            f"{labels.dtype} {list(labels.shape)}"
        )
    return labels.long()


def _check_sample(name: str, sample: Any, single: bool) -> None:
    what = "sample" if single else f"sample[{name!r}]"
    if not isinstance(sample, torch.Tensor) or sample.is_complex():
        kind = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
        raise TypeError(f"{what} must be a tensor, a batch as the loop feeds it, and it is {kind}")
    if sample.ndim < 2 or sample.numel() == 0:
        raise ValueError(
            f"{what} must be a batch [n, ...] with at least one row, and its shape is {list(sample.shape)}"
        )
    if sample.is_floating_point() and not bool(torch.isfinite(sample).all()):
        raise ValueError(f"{what} holds NaN or Inf; give clean inputs")


def _memory_format(inputs: torch.Tensor) -> torch.memory_format:
    if inputs.ndim == 4 and not inputs.is_contiguous() and inputs.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
