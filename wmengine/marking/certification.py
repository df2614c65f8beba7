"""What a mark of triggers withstands: its symbols by vote over noisy copies of a network, and how far these votes hold.

Bansal et al.: "Certified neural network watermarks with randomized smoothing", ICML 2022. Under a change of the weights
by less than noise · Φ⁻¹(p), in units of each parameter's root mean square, an answer that a noisy copy gives with
chance p > 1/2 stays the likeliest (Cohen, Rosenfeld, Kolter, ICML 2019). Theirs certify the median of the accuracy over
copies, which is no binomial count and has no p-value; here each trigger votes, and the votes are counted.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from wmengine._optional import require
from wmengine.judging.answering import answers_of, classes_of, interpreted, named_by, width_of
from wmengine.judging.verdict import PROVING
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.tails import binomial_log10_tail, threshold
from wmengine.suspects.module import ModuleSuspect
from wmengine.suspects.weights import unwrap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Certificate:
    """matched of total symbols by vote, and what that is worth to a stranger. radius: with the confidence asked for, a
    change of the weights shorter than this, ‖Δ_l / rms_l‖ over all parameters l together, leaves the votes at a p-value
    of alpha or less; 0 where they do not reach it."""

    matched: int
    total: int
    log10_p: float
    radius: float


def certify(
    model: torch.nn.Module,
    mark: Watermark,
    *,
    draws: int = 1000,
    noise: float = 0.1,
    confidence: float = 0.99,
    alpha: float = 1e-9,
    seed: int = 0,
) -> Certificate:
    """Ask `draws` copies of a torch module, each with Gaussian noise of `noise` times its root mean square on every
    parameter, for the symbols of a black-box mark.

    The p-value is exact, as a vote is a function of the network and of noise that no symbol enters. The model is left
    as it was. Raises ValueError for a mark that is not asked for, or that only ranks, and for numbers out of range.
    """
    torch = require("torch", extra="train")
    from wmengine.parts.training.noisy_rows import noisy_parameters

    if mark.kind != "black-box" or mark.preset.null not in PROVING:
        raise ValueError(f"a certificate is of a mark of triggers that proves, and {mark.scheme!r} is none")
    if draws < 1 or not noise > 0.0 or not 0.5 < confidence < 1.0 or not 0.0 < alpha < 1.0:
        raise ValueError("draws and noise must be above 0, confidence between 1/2 and 1, alpha between 0 and 1")
    plain = unwrap(model)
    noisy = copy.deepcopy(plain)
    suspect = ModuleSuspect(noisy)
    device = next(plain.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    inputs, symbols, total = mark.preset.asks.examples(mark), np.arange(mark.total), mark.total
    votes = np.zeros((total, classes_of(mark)), np.int64)
    for _ in range(draws):
        with torch.no_grad():
            for name, values in noisy_parameters(plain, noise, generator).items():
                noisy.get_parameter(name).copy_(values)
        named = named_by(interpreted(mark, symbols, answers_of(suspect, inputs, width_of(mark))))[:, 0]
        said = (named >= 0) & (named < votes.shape[1])
        votes[symbols[said], named[said]] += 1
    expected, chance = votes[symbols, mark.symbols], mark.preset.chance(mark.parameters)
    votes[symbols, mark.symbols] = 0
    matched = int((expected > votes.max(axis=1)).sum())
    needed = threshold(total, chance, math.log10(alpha))
    # Every trigger's chance is bounded at once, so those that hold out longest may be chosen.
    agreed = 0 if needed is None else int(np.sort(expected)[total - needed])
    least = _least_chance(agreed, draws, math.log10((1.0 - confidence) / total))
    radius = noise * NormalDist().inv_cdf(least) if least > 0.5 else 0.0
    return Certificate(matched, total, binomial_log10_tail(matched, total, chance), radius)


def _least_chance(successes: int, trials: int, log10_error: float) -> float:
    """The lower end of the Clopper-Pearson interval: with any smaller chance, so many successes are an error."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if binomial_log10_tail(successes, trials, middle) < log10_error else (low, middle)
    return low
