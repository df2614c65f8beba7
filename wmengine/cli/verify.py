"""`wmengine verify`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wmengine.cli.app import app
from wmengine.cli.options import (
    ClassesOption,
    DeviceOption,
    IsolationOption,
    JsonOption,
    KeyOption,
    MemoryOption,
    PassphraseOption,
    SecondsOption,
    TestOption,
    limits,
    load_clean,
    read_names,
    unlock,
)
from wmengine.cli.output import fail

if TYPE_CHECKING:
    from wmengine.judging.verdict import Verdict


@app.command()
def verify(
    suspect: Annotated[
        str,
        typer.Argument(metavar="SUSPECT", help="The ONNX file or the checkpoint to judge, or the URL of an endpoint."),
    ],
    watermark: Annotated[
        list[Path],
        typer.Option(
            "--watermark", metavar="FILE", help="The watermark to look for (.wm); several give one line each."
        ),
    ],
    key: KeyOption = None,
    alpha: Annotated[float, typer.Option(help="Owned when the p-value is at most this.")] = 1e-9,
    adversarial: Annotated[
        bool, typer.Option("--adversarial", help="For evidence against others: needs --key, and the bar is 2^-128.")
    ] = False,
    test: TestOption = "fixed",
    endpoint_options: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="How to ask the endpoint: names, budget, rate, a template for others."),
    ] = None,
    classes: ClassesOption = "same",
    clean: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="With --classes any: arrays `inputs` and `labels` of task data, on which the order is found for free.",
        ),
    ] = None,
    input_values: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=VALUE",
            help="The value, throughout, of an input that a file takes and the watermark has not.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.txt",
            help="The names of all classes, a line each, in their order: for a file that answers with names.",
        ),
    ] = None,
    isolation: IsolationOption = "persistent",
    device: DeviceOption = "cpu",
    seconds: SecondsOption = 120.0,
    memory: MemoryOption = 4.0,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> int:
    """Judge one suspect: does it depend on material made with this key? Exit 0 if it is owned by any watermark."""
    from wmengine.judging.verification import verify_all

    if adversarial and key is None:
        raise ValueError("--adversarial needs --key: evidence against others rests on the derivation")
    asked: Any = suspect
    if endpoint_options is not None:
        from wmengine.suspects.endpoint.options import read_options
        from wmengine.suspects.endpoint.suspect import EndpointSuspect

        asked = EndpointSuspect(read_options(suspect, endpoint_options))
    passphrase, owner = unlock(watermark, key, passphrase_file)
    verdicts = verify_all(
        asked,
        watermark,
        passphrase=passphrase,
        key=owner,
        alpha=alpha,
        adversarial=adversarial,
        test=test,
        isolation=isolation,
        limits=limits(seconds, memory),
        classes=classes,
        clean=None if clean is None else load_clean(clean),
        device=device,
        inputs=_values(input_values or []),
        labels=None if labels is None else read_names(labels),
    )
    for verdict in verdicts:
        if as_json:
            print(verdict.to_json())
        elif verdict.decision == "error":
            fail(verdict.error or f"{verdict.suspect} could not be judged")
        else:
            _print_verdict(verdict)
    decisions = {verdict.decision for verdict in verdicts}
    return 0 if "owned" in decisions else 1 if "not_proven" in decisions else 2


def _values(given: list[str]) -> dict[str, float]:
    """Inputs by name. Raises ValueError for what is no NAME=VALUE."""
    found = {}
    for each in given:
        name, _, value = each.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not name or not math.isfinite(found[name]):
            raise ValueError(f"--input must be NAME=VALUE with a number, and it is {each!r}")
    return found


def _print_verdict(verdict: "Verdict") -> None:
    from wmengine.errors import printable

    print(f"{printable(verdict.suspect)}: {verdict.decision.replace('_', ' ')}")
    rows = [
        ("watermark", f"{verdict.watermark} ({verdict.scheme})"),
        *([] if verdict.message is None else [("message", verdict.message)]),
        ("matched", f"{verdict.matched} of {verdict.total} symbols"),
        ("log10 p", f"{verdict.log10_p:.2f} (owned at {math.log10(verdict.alpha):.2f} or less)"),
        ("derivation", verdict.derivation.replace("_", " ")),
        ("queries", f"{verdict.queries} in {verdict.seconds:.2f} s"),
    ]
    for name, value in rows:
        print(f"  {name:<10}  {value}")
    for note in verdict.notes:
        print(f"  note: {printable(note)}")
