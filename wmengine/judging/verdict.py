"""What was found in one suspect with one mark: the one row type of verdicts, tables and JSON, and the one place that
says owned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from wmengine._version import __version__
from wmengine.facts import Fact
from wmengine.judging.judge import Finding
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.base import Evidence

# What a forger cannot reach by trying keys: the bar for evidence against others while no commitment carries a date.
ADVERSARIAL_ALPHA = 2.0**-128
# A p-value under these nulls may prove; the others only rank, however small it is.
PROVING = ("exact", "bound")


@dataclass(frozen=True)
class Verdict:
    """One suspect and one watermark.

    decision: "owned" (log10_p_corrected <= log10 alpha: the suspect depends on material made with this key),
    "not_proven", "error" (it could not be judged, and `error` says why), or in a scan "other_task" (nor could it, and a
    fact says why, as a model of another task cannot). matched of total symbols; queries: questions
    that were put to the suspect in all ways together, without clean data and repetitions; log10_p is the p-value with
    every hypothesis paid, log10_p_corrected the same times the number of `tests`, the pairs of the scan that it is of;
    evidence: what log10_p is computed from, None where nothing was read. null: of the scheme; only "exact" and "bound"
    prove. log10_e: of an e-value for the pair, and q_value what e-BH makes of those of a scan, None elsewhere.
    derivation: "checked" if the watermark was derived again from the key; commitment: the watermark's, as names are not
    unique; message: who the copy is for. settings: what was fixed before anything was asked. engine: the version of
    wmengine. seconds: wall time. sha256 covers a file and its external weights, and is None for what is no file or
    could not be opened. facts: what was assumed, tried, paid for or refused; `notes` are their sentences.
    """

    suspect: str
    sha256: str | None
    watermark: str
    message: str | None
    commitment: str
    scheme: str
    null: str
    decision: str
    matched: int
    total: int
    queries: int
    log10_p: float
    log10_p_corrected: float
    log10_e: float
    q_value: float | None
    tests: int
    alpha: float
    evidence: Evidence | None
    derivation: str
    settings: Mapping[str, Any]
    engine: str
    seconds: float
    error: str | None
    facts: tuple[Fact, ...]

    @property
    def owned(self) -> bool:
        return self.decision == "owned"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(map(str, self.facts))

    def __bool__(self) -> NoReturn:
        raise TypeError("a verdict is neither true nor false: ask for its .owned, or its .decision")

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the notes, as JSON has them."""
        row = dict(vars(self))
        row["evidence"] = None if self.evidence is None else dict(vars(self.evidence))
        row["settings"] = dict(self.settings)
        row["facts"] = [{"code": each.code, "values": dict(each.values)} for each in self.facts]
        return row | {"notes": list(self.notes)}

    def to_json(self) -> str:
        """One JSON object with these fields."""
        return json.dumps(self.to_dict(), allow_nan=False)


_FIELDS = tuple(each.name for each in fields(Verdict))


def decide(finding: Finding, mark: Watermark, alpha: float, tests: int) -> str:
    """The one place that says owned: for a null that proves, where the corrected p-value reaches alpha."""
    if finding.error is not None:
        return "error"
    if finding.other_task:
        return "other_task"
    proves = mark.preset.null in PROVING
    return "owned" if proves and corrected(finding.log10_p, tests) <= math.log10(alpha) else "not_proven"


def corrected(log10_p: float, tests: int) -> float:
    """A p-value times the number of tests (Bonferroni), at most 1."""
    return min(0.0, log10_p + math.log10(tests))


def verdict_of(
    finding: Finding,
    mark: Watermark,
    *,
    suspect: str,
    sha256: str | None,
    alpha: float,
    tests: int,
    derivation: str,
    settings: Mapping[str, Any],
    seconds: float,
    caveats: tuple[Fact, ...] = (),
) -> Verdict:
    """The verdict on a finding, not yet compared with the others of a scan."""
    decision = decide(finding, mark, alpha, tests)
    return Verdict(
        suspect=suspect,
        sha256=sha256,
        watermark=mark.name,
        message=mark.message,
        commitment=mark.commitment,
        scheme=mark.scheme,
        null=mark.preset.null,
        decision=decision,
        matched=finding.matched,
        total=finding.total,
        queries=finding.queries,
        log10_p=finding.log10_p,
        log10_p_corrected=corrected(finding.log10_p, tests),
        log10_e=finding.log10_e if finding.log10_e is not None else log10_calibrated(finding.log10_p),
        q_value=None,
        tests=tests,
        alpha=alpha,
        evidence=finding.evidence,
        derivation=derivation,
        settings=settings,
        engine=__version__,
        seconds=seconds,
        error=finding.error,
        facts=(*finding.facts, *caveats),
    )


def log10_calibrated(log10_p: float) -> float:
    """log10 of an e-value made of a p-value: (1 − p + p ln p) / (p ln² p), the mean of κ p^(κ−1) over κ in [0, 1].

    Vovk and Wang, "E-values: calibration, combination and applications", 2021, equation 2.
    """
    ln = log10_p * math.log(10.0)
    if ln > -1e-4:
        return math.log10(0.5 - ln / 6.0)  # its series at p = 1, where the quotient cancels
    return math.log10(1.0 + math.exp(ln) * (ln - 1.0)) - log10_p - 2.0 * math.log10(-ln)


def from_dict(row: Mapping[str, Any]) -> Verdict:
    """A verdict from what `to_dict` gave, through JSON or a table."""
    values = {name: row[name] for name in _FIELDS}
    evidence = values["evidence"]
    if evidence is not None:
        rows = evidence["rows"]
        values["evidence"] = Evidence(**{**evidence, "rows": None if rows is None else tuple(map(tuple, rows))})
    values["facts"] = tuple(Fact(each["code"], each["values"]) for each in values["facts"])
    return Verdict(**values)
