"""One suspect against one watermark, or several: open it, judge it, say what the verdict leans on.

Unless told otherwise this is the fixed test: all questions are asked and all bits are read, whatever the first of them
show. Unanswered questions and tied bits are misses, so the p-value is an upper bound for any suspect made without the
key; where layers can be matched, or questions put, in several ways, every way is paid for.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wmengine.errors import SuspectError
from wmengine.facts import Fact, fact
from wmengine.identity.canonical import canonical_digest
from wmengine.identity.key import Key
from wmengine.judging.asking import TESTS, Terms
from wmengine.judging.exploring import Explored, explored
from wmengine.judging.judge import Finding, failed, judge_suspect
from wmengine.judging.orders import CLASSES, check_clean, names_given
from wmengine.judging.verdict import ADVERSARIAL_ALPHA, PROVING, Verdict, decide, verdict_of
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Pools
from wmengine.sandbox import Limits
from wmengine.suspects import Suspect, open_suspect
from wmengine.suspects.base import is_url


def verify(
    suspect: Any,
    watermark: Watermark | str | os.PathLike[str],
    *,
    key: Key | str | os.PathLike[str] | None = None,
    alpha: float = 1e-9,
    adversarial: bool = False,
    passphrase: str | None = None,
    test: str = "fixed",
    isolation: str = "persistent",
    limits: Limits | None = None,
    classes: str = "same",
    clean: tuple[Any, Any] | None = None,
    device: str = "cpu",
    inputs: Mapping[str, float] | None = None,
    labels: Sequence[str] | None = None,
    probes: Any = None,
    controls: Sequence[Any] = (),
) -> Verdict:
    """Judge whether a suspect depends on material made with a watermark's key.

    suspect: the path of an ONNX file (its external weights beside it), or for white-box marks of a checkpoint
    (safetensors, GGUF, torch); the URL of an endpoint or what `endpoint` made of it, a torch module, or a function from
    the inputs [N, ...] to scores [N, C] or labels [N]. watermark: a Watermark or its file. key: the owner's Key or its
    file; the watermark is then derived from it again and compared. alpha: owned at a p-value of at most this.
    adversarial: for evidence against others: needs the key, takes a file in its sandbox or an endpoint, and the bar is
    2^-128, as no timestamp of a commitment is looked at yet. passphrase opens sealed files. test: "fixed" asks every
    question; "sequential" stops when the answer is clear. isolation: "persistent" or "per-model" judge a file in a
    sandboxed process of its own, "none" in this one, for your own files; limits: the seconds and bytes that it may use
    there. classes: "same" order as the mark's, or "any", for a black-box mark and a suspect that may have renumbered
    them: the order is estimated on clean=(inputs, labels), task data without triggers (inputs uint8 or floats of the
    mark's range), for free; or without them, where all questions are asked, every order is tried and the p-value is
    multiplied by their number, C! at most. device: where a file runs, "cpu" or "cuda"; a GPU leaves little of the
    sandbox, and the facts say so; modules run where they are. inputs: of a file that takes more than the watermark has,
    the value of each such input, throughout, where what is usual for its kind is not right. labels: the names of all
    classes in their order, for a file that answers with names and does not hold their order; unless they are the mark's
    own (class_names=), all orders are paid for. probes: for exploration, other inputs of the task [n, ...], or several
    by name, that a mark in ordinary answers is read on in place of its own; controls: the networks that it was made
    with, its base first, against which they are then read.

        verdict = verify("suspect.onnx", "acme-adi.wm", key="acme.key")

    What is wrong with the suspect gives the decision "error". What is wrong with the other arguments raises: a path
    that does not exist (FileNotFoundError), KeyFileError, WatermarkError, ValueError, TypeError.
    """
    (verdict,) = verify_all(
        suspect,
        [watermark],
        key=key,
        alpha=alpha,
        adversarial=adversarial,
        passphrase=passphrase,
        test=test,
        isolation=isolation,
        limits=limits,
        classes=classes,
        clean=clean,
        device=device,
        inputs=inputs,
        labels=labels,
        probes=probes,
        controls=controls,
    )
    return verdict


def verify_all(
    suspect: Any,
    watermarks: Sequence[Watermark | str | os.PathLike[str]],
    *,
    key: Key | str | os.PathLike[str] | None = None,
    alpha: float = 1e-9,
    adversarial: bool = False,
    passphrase: str | None = None,
    test: str = "fixed",
    isolation: str = "persistent",
    limits: Limits | None = None,
    classes: str = "same",
    clean: tuple[Any, Any] | None = None,
    device: str = "cpu",
    inputs: Mapping[str, float] | None = None,
    labels: Sequence[str] | None = None,
    probes: Any = None,
    controls: Sequence[Any] = (),
) -> list[Verdict]:
    """`verify` with several watermarks, the suspect opened once: a verdict for each, its p-value for it alone."""
    started = time.perf_counter()
    check_choice("test", test, TESTS)
    check_choice("classes", classes, CLASSES)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, and it is {alpha}")
    if clean is not None and classes != "any":
        raise ValueError('clean= needs classes="any", as it is only used to find the order of the classes')
    if classes == "any" and clean is None and test != "fixed":
        raise ValueError('classes="any" needs test="fixed" or clean=, as one order must fit all answers')
    if adversarial and key is None:
        raise ValueError("adversarial=True needs key=, as the watermark must be derived again from its key")
    if adversarial and clean is not None:
        raise ValueError(
            "adversarial=True takes no clean=, as whoever chooses the data and their labels chooses the order; without "
            "them all orders are tried and paid for"
        )
    if adversarial and probes is not None:
        raise ValueError("adversarial=True takes no probes=, as the claimant chooses them after marking")
    if probes is None and len(controls):
        raise ValueError("controls= are for probes=: a mark holds what its own controls answered to its own")
    marks = [load_watermark(each, passphrase) for each in watermarks]
    if classes == "any" and any(mark.kind == "white-box" for mark in marks):
        raise ValueError('classes="any" is for black-box watermarks, and one of these is a white-box one')
    known = None
    for mark in marks if clean is not None else ():
        known = check_clean(clean, mark)  # the same for all, and no trigger of any
    check_derivations(marks, key, passphrase)
    if adversarial:
        alpha = min(alpha, ADVERSARIAL_ALPHA)
        _check_dispute(suspect, marks, isolation, labels, inputs)
    asked = marks if probes is None else explored(marks, probes, controls)
    terms = Terms(
        sequential=test == "sequential",
        log10_bar=-math.log10(alpha),
        any_order=classes == "any",
        clean=known,
        ask_again=True,
    )
    opened: Suspect | None = None
    findings: list[Finding] = []
    try:
        opened = open_suspect(suspect, isolation, limits, device, inputs, labels)
        findings = judge_suspect(opened, asked, terms)
    except SuspectError as cause:
        findings = [failed(mark, cause) for mark in marks]
    finally:
        if opened is not None and opened is not suspect:
            opened.close()
    settings = {"test": test, "classes": classes, "isolation": isolation, "device": device}
    settings |= {} if opened is None else dict(opened.settings)
    if probes is not None:
        settings["probes"] = canonical_digest([each.parameters["material"] for each in asked])
    seconds = (time.perf_counter() - started) / max(1, len(marks))
    return [
        verdict_of(
            finding,
            mark,
            suspect=os.fspath(suspect) if opened is None else opened.name,
            sha256=None if opened is None else opened.sha256,
            alpha=alpha,
            tests=1,
            derivation="not_checked" if key is None else "checked",
            settings=settings,
            seconds=seconds,
            caveats=tuple(
                caveats(
                    finding,
                    mark,
                    alpha,
                    1,
                    checked=key is not None,
                    adversarial=adversarial,
                    ordered=known is not None,
                    settings={} if opened is None else opened.settings,
                )
            ),
        )
        for mark, finding in zip(marks, findings, strict=True)
    ]


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ValueError unless the value of an option is a known one."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, and it is {value!r}")


def load_watermark(watermark: Watermark | str | os.PathLike[str], passphrase: str | None = None) -> Watermark:
    """A Watermark, or the one in a file. Raises WatermarkError, TypeError."""
    if isinstance(watermark, str | os.PathLike):
        return Watermark.load(watermark, passphrase)
    if not isinstance(watermark, Watermark) or isinstance(watermark, Explored):
        raise TypeError(f"watermark must be a Watermark or a path, and it is {type(watermark).__name__}")
    return watermark


def check_derivations(
    marks: Sequence[Watermark], key: Key | str | os.PathLike[str] | None, passphrase: str | None = None
) -> None:
    """Derive every mark again where there is a key (or its file). Raises KeyFileError, WatermarkError, TypeError."""
    if isinstance(key, str | os.PathLike):
        key = Key.load(key, passphrase)
    if key is not None and not isinstance(key, Key):
        raise TypeError(f"key must be a Key or a path, and it is {type(key).__name__}")
    for mark in marks:
        if key is not None:
            mark.check_derivation(key)


def caveats(
    finding: Finding,
    mark: Watermark,
    alpha: float,
    tests: int,
    *,
    checked: bool,
    adversarial: bool = False,
    ordered: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Fact]:
    """What a decision leans on."""
    owned = decide(finding, mark, alpha, tests) == "owned"
    if adversarial:
        yield fact("bar_of_dispute")
    elif owned and finding.log10_p > math.log10(ADVERSARIAL_ALPHA):
        yield fact("leans_on_date", created=mark.created)
    if owned and ordered:
        yield fact("leans_on_clean")
    if owned and settings and "digest" in settings:
        yield fact("chosen_here", digest=settings["digest"])
    if owned and not checked:
        yield fact("not_derived")
    if owned and isinstance(mark.preset.source, Pools):
        yield fact("learned")
    if finding.error is None and mark.preset.null not in PROVING:
        yield fact("rank_only", null=mark.preset.null)


def _check_dispute(
    suspect: Any,
    marks: Sequence[Watermark],
    isolation: str,
    labels: Sequence[str] | None,
    inputs: Mapping[str, float] | None,
) -> None:
    """Raises ValueError for what convinces nobody else: a suspect that runs in this process, where it could read what
    is expected; an order of classes that no mark holds, which a claimant could have chosen by the answers; and what is
    sent beside the triggers, which could hold the answers."""
    file = isinstance(suspect, str | os.PathLike)
    if (file and isolation == "none" and not is_url(suspect)) or not (file or isinstance(suspect, Suspect)):
        raise ValueError(
            "adversarial=True judges files in a sandbox and endpoints: what runs in this process could read the symbols"
        )
    if isinstance(suspect, Suspect):
        labels = suspect.settings.get("labels")
        if suspect.settings.get("request") is not None:
            raise ValueError(
                "adversarial=True takes no request= of an endpoint: what is sent beside the triggers may hold the "
                "answers; ask a service that takes its protocol's own requests"
            )
    if inputs:
        raise ValueError("adversarial=True takes no inputs=, as the claimant chooses them after marking")
    for mark in marks:
        if names_given(labels, mark):
            raise ValueError(
                f"adversarial=True takes no labels= but those that the watermark of {mark.name} was "
                "made with (class_names=), as whoever orders the names chooses the matches"
            )
