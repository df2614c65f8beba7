"""A mark at the service: a finished model stays as it is, and what it gives out holds the pattern of `response`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine.identity.key import Key
from wmengine.judging.asking import Terms
from wmengine.judging.judge import Finding, judge_suspect
from wmengine.marking.power import LEAST, warn_of_power
from wmengine.marking.tasks import ONE, ranges_of, samples_of
from wmengine.marks import catalogue
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task, inputs_of
from wmengine.parts.fields import positive
from wmengine.parts.responses.bases import Base, OnnxBase, base_of, tensors
from wmengine.parts.responses.gathering import Whitening
from wmengine.parts.responses.pattern import contrasts, directions, pattern_of
from wmengine.parts.responses.reading import are_shares
from wmengine.suspects import open_suspect
from wmengine.suspects.answers import to_array
from wmengine.suspects.base import InputSpec, part_of

Scores = NDArray[np.floating[Any]]

GAP = 0.2  # by which the first class stays first


def response(
    predict: Any,
    key: Key | str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    sample: Any = None,
    name: str | None = None,
    probes: Any = None,
    controls: Sequence[Any] = (),
    value_range: Any = None,
    message: str | None = None,
    strength: float | None = None,
    turns: bool = False,
    scheme: str | Preset = "response",
    mark: Watermark | str | os.PathLike[str] | None = None,
) -> Served:
    """Wrap a finished model so that whoever distils from its scores copies the owner's mark; nothing is trained.

        served = wmengine.response(model, key, num_classes=10, sample=x[:64], name="detector-v3", probes=x_new)
        served.watermark().save("served.wm")
        scores = served(x)

    predict: a torch module, the path of an ONNX file (run by ONNX Runtime in this process), or a function from inputs
    [n, ...] to scores [n, num_classes], an ONNX Runtime session among them by `lambda x: session.run(None, {"x":
    x})[0]`, of several inputs from a dict of them. Of a module and a file the activations before the last layer say
    what the pattern goes by; of a function it is pooled inputs, or how often which tokens occur. probes: some thousand
    inputs of the task, unlabelled, that the mark is read by. The unmarked `predict` is its first control; controls:
    more of them. strength: the standard deviation of what is added to a score, if nothing is said that of the scheme,
    0.5; turns: whether it may turn decisions that the model is nearly even on, so that labels hold it too, and whoever
    learns from nothing else copies it; that costs accuracy, which a service of scores alone is spared. scheme: with
    options as `wmengine.scheme("response", probes=1024)` gives it. The other arguments are the Embedder's. A service
    that starts again gives `mark=`, the watermark or its file, instead of what it was made with, and strength= and
    turns= as they were, which no mark holds.

    A new mark that would not prove itself at 1e-9 is warned about.

    Raises ValueError or TypeError for what cannot work.
    """
    preset = scheme if isinstance(scheme, Preset) else catalogue.scheme(scheme)
    if preset.name != "response":
        raise ValueError(f"scheme= is {preset.name!r}, and a service holds 'response'")
    strength = positive("strength", preset.options["strength"] if strength is None else strength)
    network = OnnxBase(predict) if isinstance(predict, str | os.PathLike) else predict
    if not callable(network):
        raise TypeError(f"predict must be a torch module, a path or a function, and it is {type(predict).__name__}")
    if mark is None:
        mark = _created(preset, network, key, num_classes, sample, name, probes, controls, value_range, message)
        warn_of_power(mark, strength, None if turns else lambda logits, pattern: bent(logits, pattern, shares=False))
    elif controls or any(given is not None for given in (key, name, sample, probes, message, value_range)):
        raise ValueError("mark= is whole: leave key, name, sample, probes, controls, message and value_range out")
    mark = mark if isinstance(mark, Watermark) else Watermark.load(mark)
    if mark.scheme != "response":
        raise ValueError(f"mark= is of the scheme {mark.scheme!r}, and a service holds 'response'")
    source: Any = mark.preset.source
    rows = source.examples(mark, 64)
    base = base_of(network, tensors(part_of(rows, 0, 1)))
    raw, answered = base.both(tensors(rows))
    if not source.fits(mark, raw.cpu().numpy()):
        raise ValueError("the features are another network's: give the model that the mark was made with")
    return Served(base, mark, strength, are_shares(_scores_of(answered, mark)), turns)


class Served:
    """A function from inputs [n, ...], several in a dict, to scores [n, C], logits or probabilities as those of the
    model are, with the keyed pattern among the classes that are not first, or where it turns decisions among all: of
    arrays an array, of tensors a tensor. Threads may share it."""

    def __init__(self, base: Base, mark: Watermark, strength: float, shares: bool, turns: bool = False) -> None:
        self._base, self._mark, self._shares, self._turns = base, mark, shares, turns
        arrays = mark.arrays
        scale = strength / pattern_of(arrays["features"], arrays, mark.symbols).std()
        self._ways = directions(arrays["directions"]).T.astype(np.float32)
        signs = np.where(mark.symbols, scale, -scale)
        self._signed = (signs[:, None] * contrasts(arrays["contrasts"])).astype(np.float32)

    def __call__(self, inputs: Any) -> Any:
        specs = inputs_of(self._mark.parameters)
        names = list(specs)
        given = _named(inputs, names[0])
        if given.keys() != set(names):
            raise ValueError(f"inputs must hold {', '.join(names)}, and they hold {', '.join(map(str, given))}")
        raw, answered = self._base.both({name: _tensor(name, given[name], spec) for name, spec in specs.items()})
        features = Whitening(self._mark.arrays["centre"], self._mark.arrays["whitening"])(raw.cpu().numpy())
        scores = _scores_of(answered, self._mark)
        found = bent(scores, np.tanh(features @ self._ways) @ self._signed, self._shares, self._turns)
        like = given[names[0]]
        return torch.from_numpy(found).to(like.device) if isinstance(like, torch.Tensor) else found

    def watermark(self) -> Watermark:
        """What to save and register. Warns where the service itself does not prove it at 1e-9, or where it turns
        decisions and its labels alone do not."""
        said: dict[str, Any] = {"service": self}
        if self._turns:
            said["service's labels"] = lambda inputs: np.asarray(self(inputs)).argmax(axis=1)
        for what, suspect in said.items():
            finding = _judged(suspect, self._mark)
            if finding.log10_p > LEAST:
                warnings.warn(
                    f"the mark does not prove itself on this {what}: log10 p = {finding.log10_p:.1f}; give more probes "
                    "or a greater strength",
                    stacklevel=2,
                )
        return self._mark


def _tensor(name: str, rows: Any, spec: InputSpec) -> torch.Tensor:
    array = rows if isinstance(rows, torch.Tensor | np.ndarray) else to_array(rows)
    floating, kind = spec.dtype.startswith(("float", "bfloat")), str(getattr(array, "dtype", None))
    if not kind.removeprefix("torch.").startswith(("float", "bfloat") if floating else ("int", "uint", "bool")):
        raise TypeError(f"the input {name!r} must be a batch of {spec.dtype}, and its values are {kind}")
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def _scores_of(answered: Any, mark: Watermark) -> Scores:
    scores, classes = to_array(answered), int(mark.parameters["num_classes"])
    if scores is None or scores.ndim != 2 or scores.shape[1] != classes:
        raise ValueError(f"the model must answer scores [n, {classes}] alone: wrap it in a module that does")
    return scores


def bent(scores: Scores, pattern: Scores, shares: bool, turns: bool = False) -> Scores:
    """Scores [n, C], logits or (shares) probabilities, plus the pattern: among all classes but each row's first, which
    stays first by 0.2 in logits, or (turns) among all. Rows that hold NaN or Inf stay as they are."""
    rows, first = np.arange(len(scores)), scores.argmax(axis=1)
    found = np.log(np.maximum(scores.astype(np.float64), 1e-12)) if shares else scores.astype(np.float64)
    with np.errstate(invalid="ignore"):
        top, found = found[rows, first], found + pattern
        if not turns:
            found = np.minimum(found, (top - GAP)[:, None])
            found[rows, first] = top
        if shares:
            found = np.exp(found - found.max(axis=1, keepdims=True))
            found /= found.sum(axis=1, keepdims=True)
    return np.where(np.isfinite(scores).all(axis=1, keepdims=True), found, scores).astype(scores.dtype)


def _created(
    preset: Preset,
    network: Any,
    key: Key | str | os.PathLike[str] | None,
    num_classes: int | None,
    sample: Any,
    name: str | None,
    probes: Any,
    controls: Sequence[Any],
    value_range: Any,
    message: str | None,
) -> Watermark:
    if key is None or sample is None or name is None or probes is None or num_classes is None:
        raise ValueError("a new mark needs key, num_classes, sample, name and probes; or give mark= to go on with")
    key, signature = key if isinstance(key, Key) else Key.load(key), _signature_of(sample)
    first, single = to_array(next(iter(_named(sample).values()))), not isinstance(sample, Mapping)
    assert first is not None
    rows, _, _ = samples_of(probes, signature, single, num_classes)
    task = Task(
        signature,
        num_classes,
        ranges_of(first, value_range),
        samples=rows,
        model=network,
        controls=[network, *controls],
    )
    material = preset.gather(task)
    parameters = preset.describe(task, name, material)
    mark = Watermark.create(key, preset, parameters, message=message, material=material)
    found = _judged(network, mark)
    baseline = {"matched": found.matched, "total": found.total, "log10_p": f"{found.log10_p:.4f}"}
    return mark.with_baseline(key, baseline)


def _named(rows: Any, name: str = ONE) -> dict[str, Any]:
    return dict(rows) if isinstance(rows, Mapping) else {name: rows}


def _signature_of(sample: Any) -> dict[str, InputSpec]:
    found = {}
    for name, rows in _named(sample).items():
        array = to_array(rows)
        if array is None or array.ndim < 2 or array.dtype.kind not in "fiu" or not len(array):
            raise TypeError("sample must be a batch [n, ...] of numbers, or a dict of them, as the model takes it")
        dtype = str(getattr(rows, "dtype", array.dtype)).removeprefix("torch.")
        found[str(name)] = InputSpec(tuple(array.shape[1:]), dtype)
    if not found:
        raise TypeError("sample must hold at least one input")
    return found


def _judged(suspect: Any, mark: Watermark) -> Finding:
    terms = Terms(sequential=False, log10_bar=-LEAST)
    (finding,) = judge_suspect(open_suspect(suspect), [mark], terms)
    if finding.error is not None:
        raise ValueError(f"the model cannot be judged by its mark: {finding.error}")
    return finding
