"""One suspect against one watermark: count the matching symbols, say how likely a stranger matches as many, judge.

This is the fixed test: all N triggers are asked and all T bits are read, whatever the first of them show. Unanswered
triggers and tied bits are misses, so the p-value P(Bin(N, p0) >= matched) is an upper bound for any suspect made
without the key; where layers can be matched in several ways every way is paid for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.carriers import Tensor, match_tensors
from wmengine.errors import SuspectError
from wmengine.key import Key
from wmengine.sandbox import Limits
from wmengine.schemes import symbol_chance
from wmengine.stats import binomial_log10_tail, paid_log10_p
from wmengine.suspects import Suspect, open_suspect
from wmengine.trial import MODES, Trial, run_trials
from wmengine.watermark import Watermark

# What a forger cannot reach by trying keys: the bar for evidence against others while no commitment carries a date.
ADVERSARIAL_ALPHA = 2.0**-128


@dataclass(frozen=True)
class Verdict:
    """What was found in one suspect with one watermark.

    decision: "owned" (log10_p <= log10 alpha: the suspect depends on material made with this key), "not_proven" or
    "error" (it could not be judged, and `error` says why). matched of total symbols, after `queries` inputs; log10_p is
    the p-value with all tries paid. derivation: "checked" if the watermark was derived again from the key. seconds:
    wall time. sha256 covers a file and its external weights, and is None for what is no file.
    """

    suspect: str
    sha256: str | None
    watermark: str
    scheme: str
    decision: str
    matched: int
    total: int
    queries: int
    log10_p: float
    derivation: str
    alpha: float
    seconds: float
    error: str | None
    notes: tuple[str, ...]

    @property
    def owned(self) -> bool:
        return self.decision == "owned"

    def to_json(self) -> str:
        """One JSON object with these fields."""
        return json.dumps(asdict(self), allow_nan=False)


@dataclass(frozen=True)
class _Score:
    matched: int
    total: int
    queries: int
    log10_p: float
    notes: tuple[str, ...]


def verify(
    suspect: Any,
    watermark: Watermark | str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str] | None = None,
    alpha: float = 1e-9,
    adversarial: bool = False,
    passphrase: str | None = None,
    queries: str = "all",
    isolation: str = "persistent",
    limits: Limits | None = None,
) -> Verdict:
    """Judge whether a suspect depends on material made with a watermark's key.

    suspect: the path of an ONNX file (its external weights beside it), a torch module, or a function from float32
    [N, ...] to scores [N, C] or labels [N]. watermark: a Watermark or its file. key: the owner's Key or its file; the
    watermark is then derived from it again and compared. alpha: owned at a p-value of at most this. adversarial: for
    evidence against others: needs the key, and the bar is 2^-128, as no timestamp of a commitment is looked at yet.
    passphrase opens sealed files. queries: "all" asks every trigger; "sequential" stops when the answer is clear.
    isolation: "persistent" or "per-model" judge a file in a sandboxed process of its own, "none" in this one, for your
    own files; limits: the seconds and bytes that it may use there.

        verdict = verify("suspect.onnx", "acme-adi.wm", key="acme.key")

    What is wrong with the suspect gives the decision "error". What is wrong with the other arguments raises: a path
    that does not exist (FileNotFoundError), KeyFileError, WatermarkError, ValueError, TypeError.
    """
    started = time.perf_counter()
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, and it is {alpha}")
    if queries not in MODES:
        raise ValueError(f"queries must be one of {', '.join(MODES)}, and it is {queries!r}")
    if adversarial and key is None:
        raise ValueError("adversarial=True needs key=, as the watermark must be derived again from its key")
    if isinstance(watermark, str | os.PathLike):
        watermark = Watermark.load(watermark, passphrase)
    elif not isinstance(watermark, Watermark):
        raise TypeError(f"watermark must be a Watermark or a path, and it is {type(watermark).__name__}")
    if isinstance(key, str | os.PathLike):
        key = Key.load(key, passphrase)
    if key is not None:
        watermark.check_derivation(key)
    alpha = min(alpha, ADVERSARIAL_ALPHA) if adversarial else alpha

    opened: Suspect | None = None
    error: str | None = None
    score = _Score(0, watermark.total, 0, 0.0, ())
    try:
        opened = open_suspect(suspect, isolation, limits)
        if watermark.kind == "white-box":
            score = _score_weights(opened, watermark)
        else:
            score = _score_answers(opened, watermark, alpha, queries)
    except SuspectError as cause:
        error = str(cause)
    finally:
        if opened is not None and opened is not suspect:
            opened.close()
    owned = error is None and score.log10_p <= math.log10(alpha)
    return Verdict(
        suspect=os.fspath(suspect) if opened is None else opened.name,
        sha256=None if opened is None else opened.sha256,
        watermark=watermark.name,
        scheme=watermark.scheme,
        decision="error" if error is not None else "owned" if owned else "not_proven",
        matched=score.matched,
        total=score.total,
        queries=score.queries,
        log10_p=score.log10_p,
        derivation="not_checked" if key is None else "checked",
        alpha=alpha,
        seconds=time.perf_counter() - started,
        error=error,
        notes=(*score.notes, *_caveats(watermark, owned, score.log10_p, key is not None, adversarial)),
    )


def _caveats(watermark: Watermark, owned: bool, log10_p: float, checked: bool, adversarial: bool) -> Iterator[str]:
    if adversarial:
        yield "the bar is 2^-128, as no timestamp of the commitment is looked at"
    elif owned and log10_p > math.log10(ADVERSARIAL_ALPHA):
        yield (
            f"p is above 2^-128, so against a dispute this leans on the commitment being dated, by its owner's word, "
            f"{watermark.created}"
        )
    if owned and not checked:
        yield "the watermark was not derived from its key again: its symbols could have been written to fit the suspect"


def _score_answers(suspect: Suspect, watermark: Watermark, alpha: float, queries: str) -> _Score:
    """Put the triggers in every way that the suspect's input leaves open, and count answers that are their labels."""
    ways = suspect.adapters(watermark.arrays["triggers"].shape[1:], watermark.parameters["value_range"])
    trial = Trial(watermark, ways, queries, -math.log10(alpha))
    notes = run_trials(suspect, [trial])
    notes += [*trial.notes(), *filter(None, [trial.ask_again(suspect)])]
    return _Score(trial.matched, watermark.total, trial.queries, trial.log10_p, tuple(dict.fromkeys(notes)))


def _score_weights(suspect: Suspect, watermark: Watermark) -> _Score:
    """Read the bits in every pairing of carriers and tensors; the best one counts, after paying for all."""
    parameters, bits = watermark.parameters, watermark.arrays["bits"]
    tensors = suspect.tensors(parameters["input_shape"])
    shapes = [tuple(shape) for shape in parameters["carriers"]]
    matching = match_tensors(shapes, tensors, parameters["carrier_indices"])
    notes = (*suspect.notes, *matching.notes)
    if matching.found == 0:
        return _Score(0, 0, 0, 0.0, (*notes, "no tensor of the suspect has the shape of a carrier: nothing to read"))
    projections = _Projections(watermark, tensors)
    matches = [bit_matches(projections.sum(pairing), bits) for pairing in matching.tries]
    tails = [binomial_log10_tail(count, bits.size, symbol_chance(watermark.scheme, parameters)) for count in matches]
    log10_p, best = paid_log10_p(tails)
    return _Score(matches[best], bits.size, 0, log10_p, notes)


def bit_matches(projected: NDArray[np.floating[Any]], bits: NDArray[np.uint8]) -> int:
    """How many bits [T] the projection y [T] shows: 1 is y > 0 and 0 is y < 0; y = 0, NaN and Inf show neither."""
    read = np.isfinite(projected) & (projected != 0)
    return int((read & ((projected > 0) == (bits == 1))).sum())


class _Projections:
    """The projection of each (carrier, tensor) pair, computed once; projections are linear, so a pairing is a sum."""

    def __init__(self, watermark: Watermark, tensors: list[Tensor]) -> None:
        self.watermark = watermark
        self.tensors = tensors
        self.known: dict[tuple[int, int], NDArray[np.float32]] = {}

    def sum(self, pairing: tuple[int | None, ...]) -> NDArray[np.float64]:
        total = np.zeros(self.watermark.total)
        for carrier, tensor in enumerate(pairing):
            if tensor is not None:
                total += self._project(carrier, tensor)
        return total

    def _project(self, carrier: int, tensor: int) -> NDArray[np.float32]:
        if (carrier, tensor) not in self.known:
            parameters = self.watermark.parameters
            self.known[carrier, tensor] = ops.carrier_projection(
                self.tensors[tensor].values,
                int(self.watermark.arrays["carrier_keys"][carrier]),
                self.watermark.total,
                parameters["carrier"],
                parameters["projection"],
            )
        return self.known[carrier, tensor]
