"""How a suspect's outputs are read as classes: scores, a label, the best few classes, or one score for two classes.

Nothing here ever sees the expected symbols: which outputs may answer, and how, is told from shapes, types and the
answers alone, so the choice is free. Where several outputs hold scores of all classes, all of them are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask
from wmengine.facts import Fact, fact

Outputs = list[tuple[str, Any]]
Array = NDArray[Any]

ABSTAINED = -1
MAXIMUM_RANKS = 1 << 16  # where the number of classes is not known
MAXIMUM_READINGS = 16  # outputs of scores that are read beside each other


@dataclass(frozen=True)
class Predicted:
    """Scores [N, C] that stayed on their device: each row's class came back, ABSTAINED where there is none.

    levels: int8[N, C], those of :func:`wmengine.ops.match_counts`, −30 to 30.
    """

    labels: NDArray[np.int32]
    classes: int
    levels: NDArray[np.int8]


@dataclass(frozen=True)
class Reading:
    """Which output answers, and what it holds.

    kind: "scores" [N, C], of one number [N] too; "boxes" [N, K, C], of which each class has its highest score; "more
    scores" [N, C + 1], of which only the label counts; "labels" [N]; "ranks" [N, k], the numbers of the best k classes,
    with their scores in output `beside` where there are any; "single" [N], one score for two classes; "columns" [N],
    the scores of the first class, those of the others in the outputs `columns`.
    """

    output: int
    kind: str = "scores"
    beside: int | None = None
    columns: tuple[int, ...] = ()

    def read(self, outputs: Outputs, rows: int) -> Array | None:
        """Scores [rows, C], labels int64 [rows], or of kind "single" scores [rows]; None where the output has changed.

        Scores are float32, or float64 where they came in more than float32 holds: rounding must not move an argmax.
        Those that stayed on their device are int64 [rows, 1], the class that is highest.
        """
        if max(self.output, self.beside or 0, *self.columns) >= len(outputs):
            return None
        if self.columns:
            found = [Reading(each, "single").read(outputs, rows) for each in (self.output, *self.columns)]
            scores = [each for each in found if each is not None]
            return np.stack(scores, axis=1) if len(scores) == len(found) else None
        value = outputs[self.output][1]
        if isinstance(value, Predicted):
            if len(value.labels) != rows or self.kind not in ("scores", "more scores"):
                return None
            labels = value.labels.astype(np.int64)
            return labels if self.kind == "more scores" else labels[:, None]
        array = to_array(value)
        if self.kind == "boxes":
            return None if array is None or not _is_boxes(array, rows) else array.max(axis=1)
        shape = answer_shape(array, rows)
        if array is None or shape is None:
            return None
        if self.kind == "labels":
            return _labels(array.reshape(rows)) if shape[1:] in ((), (1,)) else None
        if self.kind == "single":
            return array.reshape(rows).astype(np.float64) if shape[1:] in ((), (1,)) else None
        if len(shape) == 1 and self.kind == "scores":
            shape = (rows, 1)
        if len(shape) != 2:
            return None
        array = array.reshape(shape)
        if self.kind == "ranks":
            best = np.zeros(rows, np.int64) if self.beside is None else _best(outputs[self.beside][1], shape)
            if best is None or array.dtype.kind not in "iu":
                return None
            named = array[np.arange(rows), np.maximum(best, 0)].astype(np.int64)
            return np.where(best == ABSTAINED, ABSTAINED, named)
        if array.dtype in (np.float16, np.float32):
            array = array.astype(np.float32)
        else:
            with np.errstate(over="ignore"):
                array = array.astype(np.float64)
        return highest(array) if self.kind == "more scores" else array


def highest(scores: Array) -> NDArray[np.int64]:
    """The class of each row of scores [N, C], the first of equals; ABSTAINED where there is NaN or the highest is Inf,
    or C is 0.

    A score of −Inf is lower than all others, as the logarithm of a chance that was rounded to 0 is.
    """
    if scores.shape[1] == 0:
        return np.full(len(scores), ABSTAINED, np.int64)
    return np.where(np.isfinite(scores.max(axis=1)), scores.argmax(axis=1), ABSTAINED).astype(np.int64)


def read_all(readings: Sequence[Reading], outputs: Outputs, rows: int) -> Array | None:
    """What the one reading reads, or the classes int64 [rows, R] that each of R readings of scores names."""
    found = [reading.read(outputs, rows) for reading in readings]
    if len(found) == 1:
        return found[0]
    columns = [each if each is None or each.dtype.kind == "i" else highest(each)[:, None] for each in found]
    return None if any(each is None for each in columns) else np.concatenate([*filter(_there, columns)], axis=1)


def to_array(output: Any) -> Array | None:
    """A NumPy array of what a suspect returned (array, torch tensor, nested list); None if it is none of these."""
    try:
        if hasattr(output, "detach"):
            tensor = output.detach().cpu()
            narrow = tensor.is_floating_point() and tensor.element_size() < 4  # NumPy has no bfloat16
            output = (tensor.float() if narrow else tensor).numpy()
        array = np.asarray(output)
        return array.astype(np.uint8) if array.dtype == np.bool_ else array
    except Exception:  # a sparse, quantised or meta tensor, or whatever the suspect's own classes raise
        return None


def answer_shape(array: Array | None, rows: int) -> tuple[int, ...] | None:
    """(rows,) or (rows, C) of an output that may answer, None for any other; no value is looked at.

    Axes of length 1 are dropped while there are more than two: [N, C, 1, 1] is [N, C]. The answer to a single input may
    come without its first axis.
    """
    return None if array is None or array.dtype.kind not in "fiu" else shape_of_answers(array.shape, rows)


def shape_of_answers(shape: tuple[int, ...], rows: int) -> tuple[int, ...] | None:
    """As answer_shape, of a shape alone."""
    if rows == 1 and shape[:1] != (1,):
        shape = (1, *shape)
    if shape[:1] != (rows,):
        return None
    if len(shape) > 2:
        shape = (rows, *([size for size in shape[1:] if size != 1] or [1]))
    return shape if len(shape) <= 2 else None


def choose_readings(outputs: Outputs, rows: int, num_classes: int | None, name: str) -> list[Reading]:
    """How the outputs are read: all scores of num_classes (the first of any number if None), labels, ranks, one score.

    Labels that name the same classes as the scores beside them in another order count more than those: scikit-learn
    sorts classes that are text, "10" before "2". Scores of one class more are read where there is nothing better.
    Raises OtherTask naming both numbers of classes, or the outputs' shapes where none can be read.
    """
    arrays = [None if isinstance(output, Predicted) else to_array(output) for _, output in outputs]
    shapes = [
        (len(output.labels), output.classes) if isinstance(output, Predicted) else answer_shape(array, rows)
        for (_, output), array in zip(outputs, arrays, strict=True)
    ]
    ranks = _ranks(outputs, arrays, shapes, num_classes)
    within = {index for reading in ranks for index in (reading.output, reading.beside)}
    labels = [
        Reading(index, "labels")
        for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True))
        if array is not None and shape is not None and shape[1:] in ((), (1,)) and array.dtype.kind in "iu"
    ]
    taken = within | {reading.output for reading in labels}
    columns = {
        index: shape[1] if len(shape) == 2 else 1
        for index, shape in enumerate(shapes)
        if index not in taken and shape is not None and (len(shape) == 2 or num_classes == 1)
    }
    scores = [Reading(index) for index, count in columns.items() if num_classes in (None, count)]
    if scores:
        count = columns[scores[0].output]
        renamed = [each for each in labels if _renamed(each, scores[0], outputs, rows, count)]
        return (renamed or scores)[: 1 if renamed or num_classes is None else MAXIMUM_READINGS]
    more = [Reading(index, "more scores") for index, count in columns.items() if count - 1 == num_classes]
    boxes = [
        Reading(index, "boxes")
        for index, array in enumerate(arrays)
        if array is not None and _is_boxes(array, rows) and num_classes == array.shape[2]
    ]
    if boxes and not (labels or ranks):
        return boxes[:MAXIMUM_READINGS]
    for reading in (
        *_columns(arrays, shapes, num_classes),
        *labels,
        *ranks,
        *more,
        *_last_resorts(arrays, shapes, num_classes),
    ):
        return [reading]
    classes = sorted({shape[1] for shape in shapes if shape is not None and len(shape) == 2 and shape[1] != 1})
    if classes:
        raise OtherTask(
            f"{name} answers with {' or '.join(map(str, classes))} classes and the watermark has {num_classes}; "
            "verify a suspect of the same task"
        )
    said = ", ".join(f"{label[:100]} {_shape_of(output)}" for label, output in outputs) or "none"
    raise OtherTask(
        f"{name} answers {rows} inputs with no scores [{rows}, C] and no labels [{rows}], but {said}; verify a suspect "
        "that names one class for each input"
    )


def describe(readings: Sequence[Reading], outputs: Outputs) -> list[Fact]:
    """What readings assume, for the verdict's facts."""
    names, facts = [repr(outputs[reading.output][0][:100]) for reading in readings], []
    if len(names) > 1:
        facts.append(fact("outputs", count=len(names), of=len(outputs), name=names[0]))
    elif len(outputs) > 1:
        facts.append(fact("output", name=names[0], of=len(outputs)))
    if readings[0].kind == "columns":
        return [fact("columns", of=len(outputs), count=1 + len(readings[0].columns), name=names[0])]
    if readings[0].kind == "ranks":
        facts.append(fact("ranks", name=names[0]))
    if readings[0].kind == "boxes":
        facts.append(fact("boxes", name=names[0]))
    if readings[0].kind == "more scores":
        facts.append(fact("class_more", name=names[0]))
    return facts


def of_two_classes(scores: Array) -> tuple[NDArray[np.int64], Fact]:
    """Labels from one score for each input, and a fact: class 1 above 0.5 for probabilities, above 0 for logits."""
    finite = scores[np.isfinite(scores)]
    threshold = 0.5 if ((finite >= 0.0) & (finite <= 1.0)).all() else 0.0
    labels = np.where(np.isfinite(scores), scores > threshold, ABSTAINED).astype(np.int64)
    return labels, fact("one_score", threshold=threshold)


def _ranks(
    outputs: Outputs,
    arrays: Sequence[Array | None],
    shapes: Sequence[tuple[int, ...] | None],
    num_classes: int | None,
) -> list[Reading]:
    """The integer outputs [N, k] whose rows name k different classes each, from 0 or from 1, as TopK's do."""
    found = []
    for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array is None or shape is None or len(shape) != 2 or shape[1] < 2 or array.dtype.kind not in "iu":
            continue
        if shape[1] > (MAXIMUM_RANKS if num_classes is None else num_classes + 1):
            continue
        near = sorted((each for each in range(len(shapes)) if each != index), key=lambda each: abs(each - index))
        beside = next((each for each in near if shapes[each] == shape and _is_score(arrays[each])), None)
        if shape[1] == num_classes == 2 and (beside is None or not _sorted(outputs[beside][1], shape)):
            continue  # ones and zeros may as well be scores
        ordered = np.sort(array.reshape(shape), axis=1)
        last = np.iinfo(np.int64).max if num_classes is None else num_classes  # where they are counted from 1
        if (ordered[:, 1:] > ordered[:, :-1]).all() and (ordered >= 0).all() and (ordered <= last).all():
            found.append(Reading(index, "ranks", beside))
    return found


def _columns(
    arrays: Sequence[Array | None], shapes: Sequence[tuple[int, ...] | None], num_classes: int | None
) -> list[Reading]:
    """As many floats [N] as there are classes, or whole numbers of which each row has a single 1 among zeros: the
    scores of one class each, in the order of the outputs.

    Two of them may as well be a logit and its probability, or a label and its opposite: of two classes they are chances
    that add up to 1.
    """
    for kinds in ("f", "iu"):
        found = {
            index: array.reshape(shape[0])
            for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True))
            if array is not None and shape is not None and shape[1:] in ((), (1,)) and array.dtype.kind in kinds
        }
        if len(found) != num_classes or len(found) < 2:
            continue
        scores = np.stack([*found.values()], axis=1)
        if kinds == "iu":
            fits = len(found) > 2 and bool((np.sort(scores, axis=1) == np.eye(len(found))[-1]).all())
        else:
            fits = len(found) > 2 or np.allclose(scores.sum(axis=1), 1.0, atol=1e-3, equal_nan=True)
        if fits:
            first, *others = found
            return [Reading(first, "columns", columns=tuple(others))]
    return []


def _last_resorts(
    arrays: Sequence[Array | None], shapes: Sequence[tuple[int, ...] | None], num_classes: int | None
) -> list[Reading]:
    """Floats [N]: class numbers where all are whole, or for two classes one score, a probability or a logit."""
    for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array is None or shape is None or shape[1:] not in ((), (1,)) or num_classes is None:
            continue
        finite = array[np.isfinite(array)]
        if num_classes == 2:
            return [Reading(index, "single")]
        if finite.size and bool(((finite == np.floor(finite)) & (finite >= 0) & (finite <= num_classes)).all()):
            return [Reading(index, "labels")]
    return []


def _renamed(labels: Reading, scores: Reading, outputs: Outputs, rows: int, classes: int) -> bool:
    """Whether labels name the columns of scores as text sorts their numbers, "0", "1", "10", "11", "2", or of two the
    other one, as they do beside the decision of scikit-learn's SVC."""
    named, answered = labels.read(outputs, rows), scores.read(outputs, rows)
    if named is None or answered is None or classes == 0:
        return False
    column = answered[:, 0] if answered.dtype.kind == "i" else answered.argmax(axis=1)
    order = np.array([1, 0] if classes == 2 else sorted(range(classes), key=str))
    return bool((named == order[column]).all() and (named != column).any())


def _sorted(scores: Any, shape: tuple[int, ...]) -> bool:
    """Whether these scores are highest at one place in all rows, as those of the best classes in their order are."""
    best = _best(scores, shape)
    return best is not None and len(np.unique(best)) == 1


def _there(array: Array | None) -> bool:
    return array is not None


def _is_boxes(array: Array, rows: int) -> bool:
    """Whether these are scores [rows, K, C] of the K boxes that a detector finds in each input."""
    return array.dtype.kind == "f" and array.ndim == 3 and len(array) == rows and min(array.shape[1:]) > 1


def _is_score(array: Array | None) -> bool:
    """Floats here, or on another device (None)."""
    return array is None or array.dtype.kind == "f"


def _best(output: Any, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Where each row of scores of this shape is highest, ABSTAINED where that is no class."""
    if isinstance(output, Predicted):
        return output.labels.astype(np.int64) if (len(output.labels), output.classes) == shape else None
    array = to_array(output)
    if array is None or answer_shape(array, shape[0]) != shape:
        return None
    return highest(array.reshape(shape))


def _labels(values: Array) -> NDArray[np.int64]:
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    whole = np.isfinite(values) & (np.abs(values) < 2**53) & (values == np.floor(values))
    return np.where(whole, np.where(whole, values, 0), ABSTAINED).astype(np.int64)


def _shape_of(output: Any) -> str:
    array = None if isinstance(output, list) else to_array(output)
    if array is None:
        return type(output).__name__
    return f"{'text ' if array.dtype.kind in 'US' else ''}{list(array.shape)}"
