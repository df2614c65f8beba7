"""What a suspect shows: its accuracy, and what its mark is worth by verification and by one statistic alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine.identity.key import Key
from wmengine.judging.answering import classes_of, interpreted, width_of
from wmengine.judging.looks import looks_of_bits, looks_of_labels, looks_of_scores
from wmengine.judging.verification import verify_all
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools, inputs_of
from wmengine.parts.statistics.base import Look, Statistic
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.soft import Soft
from wmengine.parts.statistics.tails import binomial_interval, paired_difference_interval
from wmengine.suspects.base import Answers, Suspect

Correct = NDArray[np.bool_]


def correct(suspect: Suspect, rows: tuple[torch.Tensor, torch.Tensor], classes: int) -> Correct:
    """bool [n]: which of the test inputs are answered with their label."""
    answered = suspect.answer({"input": rows[0].cpu().numpy()}, classes).values
    predicted = answered.argmax(axis=1) if answered.ndim == 2 else answered
    return np.asarray(predicted == rows[1].cpu().numpy())


def accuracy(found: Correct) -> dict[str, Any]:
    """Columns: accuracy with its interval."""
    low, high = binomial_interval(int(found.sum()), len(found))
    return {"accuracy": float(found.mean()), "accuracy_low": low, "accuracy_high": high, "tested": len(found)}


def loss(before: Correct | None, after: Correct) -> dict[str, Any]:
    """Columns: points of accuracy lost, with their interval."""
    if before is None:
        return dict.fromkeys(("loss", "loss_low", "loss_high"))
    found = paired_difference_interval(int((before & ~after).sum()), int((after & ~before).sum()), len(after))
    return dict(zip(("loss", "loss_low", "loss_high"), (100.0 * each for each in found), strict=True))


def evidence(suspect: Suspect, mark: Watermark | None, key: Key) -> dict[str, Any]:
    """Columns: the verdict, and log10 p by one statistic alone, every hypothesis paid."""
    alone = ("log10_p_matches", "log10_p_soft", "log10_p_labels_soft")
    columns = ("matched", "total", "chance", "log10_p", "decision", *alone)
    if mark is None:
        return dict.fromkeys(columns)
    (verdict,) = verify_all(suspect, [mark], key=key)
    chance = mark.preset.chance(mark.parameters)
    if isinstance(mark.preset.source, Pools):
        verified = (verdict.matched, verdict.total, chance, verdict.log10_p, verdict.decision)
        return dict(zip(columns, (*verified, None, None, _by_labels(suspect, mark, key)), strict=True))
    looks, labels = [*_looks(suspect, mark)] if verdict.error is None else [], None
    exact = mark.preset.null == "exact"  # what soft needs: that all classes are as likely
    if mark.kind == "black-box" and looks:
        labels = _alone(Soft(), looks[1:], chance, mark.total) if exact else None
        looks = looks[:1]
    matches = _alone(Matches(), looks, chance, mark.total)
    soft = _alone(Soft(), looks, chance, mark.total) if exact else None
    verified = (verdict.matched, verdict.total, chance, verdict.log10_p, verdict.decision)
    return dict(zip(columns, (*verified, matches, soft, labels), strict=True))


def _by_labels(suspect: Suspect, mark: Watermark, key: Key) -> float:
    """log10 p where the suspect says no more than its best class."""
    (name,) = inputs_of(mark.parameters)

    def labels(rows: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(suspect.answer({name: rows}, int(mark.parameters["num_classes"])).values.argmax(axis=1))

    return verify_all(labels, [mark], key=key)[0].log10_p


def _looks(suspect: Suspect, mark: Watermark) -> Iterator[tuple[float, Look]]:
    """(log10 share, what is seen): of bits by every hypothesis; of answers as scores, then as labels, in the likeliest
    way of asking."""
    source: Any = mark.preset.source
    if mark.kind == "white-box":
        for observation in source.observe(mark, suspect, mark.total).found:
            yield math.log10(observation.share), looks_of_bits(observation.y, [mark.symbols])[0]
        return
    way, *_ = source.ways(mark, suspect, False)
    answers = suspect.answer(source.inputs(mark, way, 0, mark.total), width_of(mark))
    labels = Answers("labels", answers.values.argmax(axis=1).astype(np.int64))
    symbols = np.arange(mark.total)
    scores, named = (interpreted(mark, symbols, each).values for each in (answers, labels))
    yield 0.0, looks_of_scores(scores, [[mark.symbols]])[0].looks[0]
    yield 0.0, looks_of_labels(named.reshape(-1), [mark.symbols], classes_of(mark))[0]


def _alone(statistic: Statistic, looks: list[tuple[float, Look]], chance: float, total: int) -> float:
    found = [0.0]
    for log10_share, look in looks:
        test = statistic.begin(chance, total, sequential=False)
        test.add(look)
        found.append(test.log10_p - log10_share)
    return min(found)
