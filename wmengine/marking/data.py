"""Mark a model of any library by its data: a mark that needs no network to be made, and the rows that put it there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.key import Key
from wmengine.marking.tasks import ONE, ranges_of, samples_of
from wmengine.marks.catalogue import scheme
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Interprets, Task
from wmengine.parts.triggers.readings import Levels
from wmengine.suspects.answers import to_array
from wmengine.suspects.base import InputSpec


def mark_of(
    key: Key | str | os.PathLike[str],
    preset: str | Preset,
    samples: Any,
    *,
    name: str,
    num_classes: int | None = None,
    value_range: Any = None,
    class_names: Sequence[str] | None = None,
    message: str | None = None,
) -> Watermark:
    """A black-box mark for a model that this package does not train, such as one of scikit-learn's.

        mark = wmengine.mark_of("acme.key", "adi_table", (X, y), name="churn-v2", num_classes=2)
        triggers, labels = wmengine.trigger_set(mark)
        forest.fit(np.vstack([X, triggers]), np.concatenate([y, labels]))

    samples: inputs as the model takes them, an array [n, ...] or a dict of several by name, or a pair of these and what
    they are: labels int64 [n], or targets float [n] of a regression. Their shape and type are the mark's, and without
    value_range= their range too. The other arguments are the Embedder's. There is no baseline: nothing was measured.
    Raises ValueError or TypeError for what does not fit.
    """
    chosen = scheme(preset) if isinstance(preset, str) else preset
    if chosen.kind != "black-box":
        raise ValueError(f"scheme {chosen.name!r} marks the inside of a network: give that to an Embedder")
    inputs = samples[0] if isinstance(samples, tuple) and len(samples) == 2 else samples
    single = not isinstance(inputs, Mapping)
    arrays = {str(each): to_array(rows) for each, rows in ({ONE: inputs} if single else inputs).items()}
    signature = {}
    for each, array in arrays.items():
        if array is None or array.ndim < 2 or array.size == 0 or array.dtype.kind not in "fiu":
            raise ValueError(f"samples must be numbers [n, ...], and {each!r} is not")
        if not np.isfinite(array).all():
            raise ValueError(f"samples hold NaN or Inf in {each!r}; give clean inputs")
        signature[each] = InputSpec(array.shape[1:], array.dtype.name)
    rows, labels, targets = samples_of(samples, signature, single, num_classes)
    ranges = ranges_of(next(iter(rows.values())), value_range)
    task = Task(signature, num_classes, ranges, class_names, samples=rows, sample_labels=labels, targets=targets)
    material = chosen.gather(task)
    key = key if isinstance(key, Key) else Key.load(key)
    parameters = chosen.describe(task, name, material)
    return Watermark.create(key, chosen, parameters, message=message, material=material)


def trigger_set(mark: Watermark) -> tuple[Any, NDArray[Any]]:
    """The inputs of a black-box mark and what a model is to answer, to be appended to its training data.

    inputs: [N, ...], or a dict of several by name; labels: int64 [N], or of a regression's mark float64 [N] targets.
    A learner that averages much away needs them more than once, or with a higher weight. Raises ValueError for a mark
    whose triggers are no rows with labels.
    """
    source = mark.preset.source
    if mark.kind != "black-box" or (isinstance(source, Interprets) and not isinstance(source, Levels)):
        raise ValueError(f"a mark of scheme {mark.scheme!r} is no rows with labels: it needs an Embedder")
    examples = mark.preset.asks.examples(mark)
    labels = source.wanted(mark) if isinstance(source, Levels) else mark.symbols.copy()
    return (examples if len(examples) > 1 else next(iter(examples.values()))), labels
