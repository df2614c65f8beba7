"""What one suspect's answers or weights say about one mark or many: the scores behind a verdict and behind a scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine import ops
from wmengine.carriers import Tensor, match_tensors
from wmengine.errors import SuspectError
from wmengine.reordering import CleanData
from wmengine.schemes import symbol_chance
from wmengine.stats import Evidence, binomial_log10_tail, paid_log10_p
from wmengine.suspects import Suspect
from wmengine.trial import Trial, run_trials
from wmengine.watermark import Watermark


@dataclass(frozen=True)
class Score:
    """matched of total symbols after `queries` triggers; log10_p with all tries paid, log10_e where it is an e-value's.

    evidence: what log10_p is computed from, None where nothing was read. Where `error` says why the mark could not be
    looked for, the numbers say nothing.
    """

    matched: int
    total: int
    queries: int
    log10_p: float
    log10_e: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    evidence: Evidence | None = None


def score_suspect(
    suspect: Suspect,
    marks: Sequence[Watermark],
    mode: str,
    log10_bar: float,
    every_adapter: bool = True,
    ask_again: bool = False,
    any_order: bool = False,
    clean: CleanData | None = None,
) -> list[Score]:
    """One score for each mark. A mark that the suspect cannot be asked about has an error, and the others go on.

    mode: "all" or "sequential", for black-box marks; log10_bar: −log10 of what a p-value must reach; every_adapter: put
    triggers in unlikely ways too; ask_again: look whether answers depend on the batch even where nothing is proven;
    any_order and clean: see Trial.
    """
    scores: list[Score | None] = [None] * len(marks)
    trials: dict[int, Trial] = {}
    tensors: list[Tensor] | SuspectError | None = None
    for index, mark in enumerate(marks):
        try:
            if mark.kind == "white-box":
                if tensors is None:
                    tensors = _tensors(suspect, mark)
                if isinstance(tensors, SuspectError):
                    raise tensors
                scores[index] = score_weights(tensors, mark, suspect.notes)
            else:
                trials[index] = open_trial(suspect, mark, mode, log10_bar, every_adapter, any_order, clean)
        except SuspectError as error:
            scores[index] = _failed(mark, error)
    # Marks of one number of classes are asked together; if the suspect fails one group, the others are still asked.
    groups: dict[int, list[int]] = {}
    for index, trial in trials.items():
        groups.setdefault(trial.num_classes, []).append(index)
    for indices in groups.values():
        notes = run_trials(suspect, [trials[index] for index in indices])
        for index in indices:
            scores[index] = score_trial(suspect, trials[index], notes, ask_again)
    return [score for score in scores if score is not None]


def open_trial(
    suspect: Suspect,
    mark: Watermark,
    mode: str,
    log10_bar: float,
    every_adapter: bool = True,
    any_order: bool = False,
    clean: CleanData | None = None,
) -> Trial:
    """A trial of the ways that the suspect's input leaves open to put the mark's triggers."""
    ways = suspect.adapters(mark.arrays["triggers"].shape[1:], mark.parameters["value_range"], every_adapter)
    return Trial(mark, ways, mode, log10_bar, any_order, clean, getattr(suspect, "limit", None))


def score_trial(suspect: Suspect, trial: Trial, notes: Sequence[str], ask_again: bool = False) -> Score:
    """The score of a trial that is over. A proven suspect is asked some triggers once more, in other batches."""
    if trial.error is not None:
        return _failed(trial.mark, trial.error)
    said = [*notes, *trial.notes()]
    if trial.proven or ask_again:
        said += filter(None, [trial.ask_again(suspect)])
    return Score(
        trial.matched,
        trial.total,
        trial.queries,
        trial.log10_p,
        trial.log10_e,
        tuple(dict.fromkeys(said)),
        evidence=trial.evidence,
    )


def score_weights(tensors: Sequence[Tensor], mark: Watermark, notes: Sequence[str] = ()) -> Score:
    """Read the bits in every pairing of carriers and tensors; the best one counts, after paying for all."""
    parameters, bits = mark.parameters, mark.arrays["bits"]
    shapes = [tuple(shape) for shape in parameters["carriers"]]
    matching = match_tensors(shapes, tensors, parameters["carrier_indices"])
    said = (*notes, *matching.notes)
    if matching.found == 0:
        nothing = "no tensor of the suspect has the shape of a carrier: nothing to read"
        return Score(0, 0, 0, 0.0, notes=(*said, nothing))
    projections = _Projections(mark, tensors)
    matches = [bit_matches(projections.sum(pairing), bits) for pairing in matching.tries]
    chance = symbol_chance(mark.scheme, parameters)
    log10_p, best = paid_log10_p([binomial_log10_tail(count, bits.size, chance) for count in matches])
    evidence = Evidence("fixed", matches[best], bits.size, chance, math.log10(1 / len(matches)))
    return Score(matches[best], bits.size, 0, log10_p, notes=said, evidence=evidence)


def bit_matches(projected: NDArray[np.floating[Any]], bits: NDArray[np.uint8]) -> int:
    """How many bits [T] the projection y [T] shows: 1 is y > 0 and 0 is y < 0; y = 0, NaN and Inf show neither."""
    read = np.isfinite(projected) & (projected != 0)
    return int((read & ((projected > 0) == (bits == 1))).sum())


def is_owned(log10_p: float, alpha: float) -> bool:
    """Whether a p-value reaches the bar."""
    return log10_p <= math.log10(alpha)


def _failed(mark: Watermark, error: SuspectError | str) -> Score:
    return Score(0, mark.total, 0, 0.0, error=str(error))


def _tensors(suspect: Suspect, mark: Watermark) -> list[Tensor] | SuspectError:
    try:
        return suspect.tensors(mark.parameters["input_shape"])
    except SuspectError as error:
        return error


class _Projections:
    """The projection of each (carrier, tensor) pair, computed once; projections are linear, so a pairing is a sum."""

    def __init__(self, mark: Watermark, tensors: Sequence[Tensor]) -> None:
        self.mark = mark
        self.tensors = tensors
        self.known: dict[tuple[int, int], NDArray[np.float32]] = {}

    def sum(self, pairing: tuple[int | None, ...]) -> NDArray[np.float64]:
        total = np.zeros(self.mark.total)
        for carrier, tensor in enumerate(pairing):
            if tensor is not None:
                total += self._project(carrier, tensor)
        return total

    def _project(self, carrier: int, tensor: int) -> NDArray[np.float32]:
        if (carrier, tensor) not in self.known:
            parameters = self.mark.parameters
            self.known[carrier, tensor] = ops.carrier_projection(
                self.tensors[tensor].values,
                int(self.mark.arrays["carrier_keys"][carrier]),
                self.mark.total,
                parameters["carrier"],
                parameters["projection"],
            )
        return self.known[carrier, tensor]
