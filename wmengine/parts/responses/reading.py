"""Bits read from answers: what of them no unmarked network explains, along each bit's direction and contrast.

Nothing here sees a bit: given the pool, its features, the controls and the suspect, the signs are as good as coins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.responses.pattern import contrasts, directions

Floats = NDArray[np.float64]

_RIDGE = 1e-3  # per input, of regressors with a standard deviation of 1
_WARMTH = 2.0  # scores are read as softmax(ℓ / 2), where all classes are heard
_LEAST = -40.0  # of a log-probability
_ROUNDING = 2.0**-40  # a y below this share of its inputs' number is rounding: it shows no bit
_MOST = 1 << 21  # numbers at once: 2048 inputs of 1024 bits


def are_shares(scores: NDArray[Any]) -> bool:
    """Whether scores [n, C] are probabilities, by those rows that hold no NaN."""
    whole = scores[~np.isnan(scores).any(axis=1)].astype(np.float64)
    return bool(len(whole) and whole.min() >= 0.0 and np.abs(whole.sum(axis=1) - 1.0).max() < 1e-3)


def log_probabilities(scores: NDArray[Any]) -> Floats:
    """Scores [n, C], logits or probabilities, as log-probabilities; rows that hold NaN or +Inf become NaN."""
    found = scores.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if are_shares(found):
            found = np.log(found)
        found -= found.max(axis=1, keepdims=True)
        found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    return np.where(np.isnan(found), np.nan, np.maximum(found, _LEAST))


def told(scores: NDArray[Any]) -> Floats:
    """What scores say of every class: softmax(ℓ / 2), [n, C]; NaN in rows that hold NaN or +Inf."""
    return _softmax(log_probabilities(scores) / _WARMTH)


def told_by_labels(labels: NDArray[np.int64], classes: int) -> Floats:
    """The same of labels [n], a single 1 each; NaN in rows without one of the classes."""
    found = np.full((len(labels), classes), np.nan)
    inside = (labels >= 0) & (labels < classes)
    found[inside] = np.eye(classes)[labels[inside]]
    return found


def unexplained(said: Floats, controls: NDArray[Any]) -> Floats:
    """said [n, C] less what the controls' answers, centred log-probabilities [K, n, C], explain of it.

    A ridge regression on these and on their probabilities, warm and as they are, with an intercept: one for all
    classes' columns, solved in float64, by inputs where these are fewer than the regressors.
    """
    logs = controls.astype(np.float64)
    columns = [part for log in logs for part in (log, _softmax(log), _softmax(log / _WARMTH))]
    known = np.concatenate(columns, axis=1)
    known -= known.mean(axis=0)
    known /= known.std(axis=0) + 1e-9
    rest = said - said.mean(axis=0)
    ridge = _RIDGE * len(known)
    if len(known) < known.shape[1]:
        return np.asarray(ridge * np.linalg.solve(known @ known.T + ridge * np.eye(len(known)), rest))
    gram = known.T @ known + ridge * np.eye(known.shape[1])
    return np.asarray(rest - known @ np.linalg.solve(gram, known.T @ rest))


def projected(rest: Floats, features: NDArray[Any], arrays: Any) -> Floats:
    """y [T] of what is unexplained [n, C], on inputs with features [n, D]: Σ_n (φ_t(u_n) − mean) (v_t · rest_n)."""
    g, v = directions(arrays["directions"]).T, contrasts(arrays["contrasts"])
    found, bent_sum = np.zeros_like(v), np.zeros(len(v))
    chunk = min(2048, max(1, _MOST // len(v)))
    for start in range(0, len(rest), chunk):
        bent = np.tanh(features[start : start + chunk].astype(np.float64) @ g)
        found += bent.T @ rest[start : start + chunk]
        bent_sum += bent.sum(axis=0)
    found -= np.outer(bent_sum, rest.mean(axis=0))
    y = (found * v).sum(axis=1)
    return np.where(np.abs(y) > _ROUNDING * len(rest), y, 0.0)


def _softmax(logs: Floats) -> Floats:
    found = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(found / found.sum(axis=1, keepdims=True))
