"""One suspect against one watermark: count the matching symbols, say how likely a stranger matches as many, judge.

Unless told otherwise this is the fixed test: all N triggers are asked and all T bits are read, whatever the first of
them show. Unanswered triggers and tied bits are misses, so the p-value P(Bin(N, p0) >= matched) is an upper bound for
any suspect made without the key; where layers can be matched, or triggers put, in several ways, every way is paid for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from wmengine import __version__
from wmengine.errors import SuspectError
from wmengine.judge import Score, is_owned, score_suspect
from wmengine.key import Key
from wmengine.reordering import CLASSES, check_clean
from wmengine.sandbox import Limits
from wmengine.stats import Evidence
from wmengine.suspects import Suspect, open_suspect
from wmengine.trial import MODES
from wmengine.watermark import Watermark

# What a forger cannot reach by trying keys: the bar for evidence against others while no commitment carries a date.
ADVERSARIAL_ALPHA = 2.0**-128


@dataclass(frozen=True)
class Verdict:
    """What was found in one suspect with one watermark.

    decision: "owned" (log10_p <= log10 alpha: the suspect depends on material made with this key), "not_proven" or
    "error" (it could not be judged, and `error` says why). matched of total symbols; queries: triggers that were put
    to the suspect, adapter tries included, but no clean data and repetitions; log10_p is the p-value with all
    tries paid, and evidence what it is computed from, None where nothing was read. derivation: "checked" if the
    watermark was derived again from the key; commitment: the watermark's, as names are not unique. engine: the version
    of wmengine. seconds: wall time. sha256 covers a file and its external weights, and is None for what is no file
    or could not be opened.
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
    evidence: Evidence | None
    derivation: str
    commitment: str
    alpha: float
    engine: str
    seconds: float
    error: str | None
    notes: tuple[str, ...]

    @property
    def owned(self) -> bool:
        return self.decision == "owned"

    def to_json(self) -> str:
        """One JSON object with these fields."""
        return json.dumps(asdict(self), allow_nan=False)


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
    classes: str = "same",
    clean: tuple[Any, Any] | None = None,
    provider: str = "cpu",
) -> Verdict:
    """Judge whether a suspect depends on material made with a watermark's key.

    suspect: the path of an ONNX file (its external weights beside it), the URL of an endpoint or what `endpoint` made
    of it, a torch module, or a function from float32 [N, ...] to scores [N, C] or labels [N]. watermark: a Watermark or
    its file. key: the owner's Key or its file; the watermark is then derived from it again and compared. alpha: owned
    at a p-value of at most this. adversarial: for evidence against others: needs the key, and the bar is 2^-128, as no
    timestamp of a commitment is looked at yet. passphrase opens sealed files. queries: "all" asks every trigger;
    "sequential" stops when the answer is clear. isolation: "persistent" or "per-model" judge a file in a sandboxed
    process of its own, "none" in this one, for your own files; limits: the seconds and bytes that it may use there.
    classes: "same" order as the mark's, or "any", for a black-box mark and a suspect that may have renumbered them: the
    order is estimated on clean=(inputs, labels), task data without triggers (inputs uint8 or floats of the mark's
    range), for free; or without them, where all triggers are asked, every order is tried and the p-value is multiplied
    by their number, C! at most. provider: where a file runs, "cpu" or "cuda"; a GPU leaves little of the sandbox, and
    the notes say so.

        verdict = verify("suspect.onnx", "acme-adi.wm", key="acme.key")

    What is wrong with the suspect gives the decision "error". What is wrong with the other arguments raises: a path
    that does not exist (FileNotFoundError), KeyFileError, WatermarkError, ValueError, TypeError.
    """
    started = time.perf_counter()
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, and it is {alpha}")
    if queries not in MODES:
        raise ValueError(f"queries must be one of {', '.join(MODES)}, and it is {queries!r}")
    if classes not in CLASSES:
        raise ValueError(f"classes must be one of {', '.join(CLASSES)}, and it is {classes!r}")
    if clean is not None and classes != "any":
        raise ValueError('clean= needs classes="any", as it is only used to find the order of the classes')
    if classes == "any" and clean is None and queries != "all":
        raise ValueError('classes="any" needs queries="all" or clean=, as one order must fit all answers')
    if adversarial and key is None:
        raise ValueError("adversarial=True needs key=, as the watermark must be derived again from its key")
    if adversarial and clean is not None:
        raise ValueError(
            "adversarial=True takes no clean=, as whoever chooses the data and their labels chooses the order; without "
            "them all orders are tried and paid for"
        )
    if isinstance(watermark, str | os.PathLike):
        watermark = Watermark.load(watermark, passphrase)
    elif not isinstance(watermark, Watermark):
        raise TypeError(f"watermark must be a Watermark or a path, and it is {type(watermark).__name__}")
    if classes == "any" and watermark.kind == "white-box":
        raise ValueError(f'classes="any" is for black-box watermarks, and {watermark.name} is a white-box one')
    known = None if clean is None else check_clean(clean, watermark)
    if isinstance(key, str | os.PathLike):
        key = Key.load(key, passphrase)
    if key is not None:
        watermark.check_derivation(key)
    alpha = min(alpha, ADVERSARIAL_ALPHA) if adversarial else alpha

    opened: Suspect | None = None
    score = Score(0, watermark.total, 0, 0.0)
    try:
        opened = open_suspect(suspect, isolation, limits, provider, weights=watermark.kind == "white-box")
        (score,) = score_suspect(
            opened, [watermark], queries, -math.log10(alpha), ask_again=True, any_order=classes == "any", clean=known
        )
    except SuspectError as cause:
        score = replace(score, error=str(cause))
    finally:
        if opened is not None and opened is not suspect:
            opened.close()
    owned = score.error is None and is_owned(score.log10_p, alpha)
    return Verdict(
        suspect=os.fspath(suspect) if opened is None else opened.name,
        sha256=None if opened is None else opened.sha256,
        watermark=watermark.name,
        scheme=watermark.scheme,
        decision="error" if score.error is not None else "owned" if owned else "not_proven",
        matched=score.matched,
        total=score.total,
        queries=score.queries,
        log10_p=score.log10_p,
        evidence=score.evidence,
        derivation="not_checked" if key is None else "checked",
        commitment=watermark.commitment,
        alpha=alpha,
        engine=__version__,
        seconds=time.perf_counter() - started,
        error=score.error,
        notes=(
            *score.notes,
            *_caveats(watermark, owned, score.log10_p, key is not None, adversarial, known is not None),
        ),
    )


def _caveats(
    watermark: Watermark, owned: bool, log10_p: float, checked: bool, adversarial: bool, ordered: bool
) -> Iterator[str]:
    if adversarial:
        yield "the bar is 2^-128, as no timestamp of the commitment is looked at"
    elif owned and log10_p > math.log10(ADVERSARIAL_ALPHA):
        yield (
            f"p is above 2^-128, so against a dispute this leans on the commitment being dated, by its owner's word, "
            f"{watermark.created}"
        )
    if owned and ordered:
        yield "the order of the classes rests on the clean data: trying several sets of them would be several tries"
    if owned and not checked:
        yield "the watermark was not derived from its key again: its symbols could have been written to fit the suspect"
