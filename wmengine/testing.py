"""Does a preset keep its promises? `check_preset` embeds it in a small network and looks, for ours and for yours."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmengine._optional import require
from wmengine.identity.key import Key
from wmengine.judging.asking import Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.verdict import PROVING
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import registered
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.rank import Rank
from wmengine.suspects import open_suspect

torch = require("torch", extra="train")

LEVELS = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Report:
    """What was measured. log10_p: on the network itself and from its exported file; stranger: on one without the mark;
    null: for each of LEVELS the share of fresh keys with a p-value at most that on the stranger, empty for a rank."""

    watermark: Watermark
    log10_p: float
    exported_log10_p: float
    stranger_log10_p: float
    null: Mapping[float, float]


def small_network(seed: int = 0) -> Any:
    """Two convolutions with BatchNorm, some of its factors negative, and two linear layers, for inputs [1, 8, 8]."""
    torch.manual_seed(seed)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    with torch.no_grad():
        model[1].weight[::4] *= -1.0
    return model


def check_preset(
    preset: Preset,
    *,
    model: Callable[[int], Any] = small_network,
    sample: Any = None,
    num_classes: int = 10,
    value_range: Any = (0.0, 1.0),
    samples: Any = None,
    controls: Sequence[Any] = (),
    loss: Callable[[Any, Any], Any] | None = None,
    steps: int = 300,
    keys: int = 2000,
) -> Report:
    """Embed a preset and check what every preset promises; AssertionError, saying what fails.

    model: a network from a seed, for batches like `sample` (a tensor or a dict of tensors; [64, 1, 8, 8] unless given).
    samples, controls: what the Embedder takes. loss: the task's, of answers and labels int64 [n], where the model does
    not answer with logits.
    Checked: derivation (symbols follow from key, parameters and message, geometry from key and parameters), the `.wm`
    file, that the mark proves itself on the network and from its ONNX file after BatchNorm folding, that neither a
    stranger nor another key does, and P(p <= a) <= a over `keys` fresh draws of the symbols on the stranger. A preset
    whose null only ranks must never be owned.
    """
    torch.manual_seed(1)
    sample = torch.rand(64, 1, 8, 8) if sample is None else sample
    key = Key.generate(owner="check_preset")
    from wmengine.marking.embedder import Embedder
    from wmengine.marking.export import export_onnx

    with registered(preset), tempfile.TemporaryDirectory() as folder:
        network, stranger = model(0), model(1)
        embedder = Embedder(
            network,
            key,
            [preset],
            num_classes=num_classes,
            sample=sample,
            name="check",
            value_range=value_range,
            samples=samples,
            controls=controls,
        )
        _train(network, embedder, sample, num_classes, steps, loss)
        (mark,) = embedder.watermarks()
        path = os.path.join(folder, "model.onnx")
        named = isinstance(sample, Mapping)
        export_onnx(network, {name: rows[:1] for name, rows in sample.items()} if named else sample[:1], path)
        return check_mark(mark, key, network, path, stranger, keys=keys)


def check_mark(mark: Watermark, key: Key, marked: Any, exported: Any, stranger: Any, *, keys: int = 2000) -> Report:
    """The same of a mark that was made already. marked, exported: two suspects that hold it; stranger: one without."""
    proves = mark.preset.null in PROVING
    _check_derivation(mark, key)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mark.wm"
        mark.save(file)
        loaded = Watermark.load(file)
    _require(loaded.commitment == mark.commitment, "a watermark changes when it is saved and loaded")
    loaded.check_derivation(key)
    verdicts = [verify(marked, mark, key=key), verify(exported, mark, key=key)]
    for verdict, what in zip(verdicts, ("the network", "its ONNX file"), strict=True):
        _require(verdict.error is None, f"{what} cannot be judged: {verdict.error}")
        _require(verdict.owned == proves, f"{what} is {verdict.decision} with log10 p = {verdict.log10_p}")
    other = _created(mark, Key.generate(owner="somebody else"))
    for suspect, watermark, what in ((stranger, mark, "a stranger"), (marked, other, "another key")):
        verdict = verify(suspect, watermark)
        why = verdict.error or f"log10 p = {verdict.log10_p}"
        _require(verdict.decision == "not_proven", f"{what} is {verdict.decision}: {why}")
    null = {} if isinstance(mark.preset.statistic, Rank) else null_of(stranger, mark, key, keys)
    for level, share in null.items():
        most = level + 4.0 * math.sqrt(level / keys)
        _require(share <= most, f"P(p <= {level}) is {share} over {keys} draws of the symbols")
    return Report(mark, verdicts[0].log10_p, verdicts[1].log10_p, verify(stranger, mark).log10_p, null)


def null_of(suspect: Any, mark: Watermark, key: Key, keys: int) -> dict[float, float]:
    """For each of LEVELS, the share of `keys` fresh draws of the mark's symbols with a p-value at most that."""
    marks = [mark.with_message(key, f"null {number}") for number in range(keys)]
    findings = judge_suspect(open_suspect(suspect), marks, Terms(sequential=False, log10_bar=9.0))
    p = np.array([finding.log10_p for finding in findings])
    return {level: float((p <= math.log10(level)).mean()) for level in LEVELS}


def _train(network: Any, embedder: Any, sample: Any, num_classes: int, steps: int, task_loss: Any) -> None:
    """The sample with fixed random labels as a task: enough for a mark to be learned beside something else."""
    rows = next(iter(sample.values())) if isinstance(sample, Mapping) else sample
    labels = torch.randint(0, num_classes, (len(rows),)).to(rows.device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    network.train()
    for _ in range(steps):
        inputs, targets = embedder.mix(sample, labels)
        answers = network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
        if task_loss is None:
            loss = embedder.loss(answers, targets, inputs=inputs)
        else:
            loss = task_loss(answers, targets) + embedder.regulariser()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def _require(kept: bool, otherwise: str) -> None:
    """An assertion that python -O keeps."""
    if not kept:
        raise AssertionError(otherwise)


def _check_derivation(mark: Watermark, key: Key) -> None:
    again = _created(mark, key)
    _require(again.commitment == mark.commitment, "derived twice, it is not the same")
    messages = [_created(mark, key, message=message) for message in ("a", "b")]
    _require(len({each.geometry for each in (mark, *messages)}) == 1, "geometry follows from the message")
    renamed, other = _created(mark, key, name="another"), _created(mark, Key.generate(owner=key.owner))
    _require(not _share_geometry(renamed, mark), "geometry does not follow from the parameters")
    _require(not _share_geometry(other, mark), "geometry does not follow from the key")
    if isinstance(mark.preset.statistic, Rank):
        return  # its symbols are the network's own answers
    symbols = {each.symbols.tobytes() for each in (mark, *messages)}
    _require(len(symbols) == 3, "symbols do not follow from the message")
    _require(not np.array_equal(renamed.symbols, mark.symbols), "symbols do not follow from the parameters")
    _require(not np.array_equal(other.symbols, mark.symbols), "symbols do not follow from the key")


def _created(mark: Watermark, key: Key, *, message: str | None = None, **changed: Any) -> Watermark:
    """The mark that another key, message or parameters make of the same material."""
    parameters = {**mark.parameters, **changed}
    material = {name: mark.arrays[name] for name in parameters.get("material", {})}
    return Watermark.create(key, mark.preset, parameters, message=message, material=material, names=mark.names)


def _share_geometry(first: Watermark, second: Watermark) -> bool:
    """Whether any of what two marks' geometry is made of is the same; of what only ranks, all of it."""
    names = first.arrays.keys() - {first.preset.symbols.name, *first.parameters.get("material", {})}
    same = [np.array_equal(first.arrays[each], second.arrays[each]) for each in names]
    return all(same) if isinstance(first.preset.statistic, Rank) else any(same)
