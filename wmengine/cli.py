"""The command line: each command is a few lines around one function of the library, which is imported only then.

Answers go to stdout, as aligned text or with --json as one JSON object. Errors are one line on stderr. `verify` exits 0
when the suspect is owned, 1 when that is not proven, 2 when it could not be judged; every other command exits 0 or 2.
After Ctrl-C the status is 130, and 141 where nobody reads the answer (`| head`).
"""

import getpass
import importlib
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wmengine import __version__

if TYPE_CHECKING:
    from wmengine.key import Key
    from wmengine.sandbox import Limits
    from wmengine.schemes import Scheme
    from wmengine.verify import Verdict
    from wmengine.watermark import Watermark

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="File whose first line is the passphrase of the sealed files given; asked for on a terminal otherwise.",
    ),
]

QueriesOption = Annotated[
    str,
    typer.Option(metavar="MODE", help='"all" triggers, or "sequential": stop asking when the answer is clear.'),
]
IsolationOption = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        help='"persistent" sandboxed processes, one "per-model" (for evidence), or "none" (for your own files).',
    ),
]
ClassesOption = Annotated[
    str,
    typer.Option(metavar="ORDER", help='"same" order as the mark\'s, or "any": every order is tried and paid for.'),
]
DeviceOption = Annotated[str, typer.Option(metavar="WHERE", help='Where models run: "cpu" or "cuda".')]
SecondsOption = Annotated[float, typer.Option(metavar="S", help="Wall-clock seconds that one file may take.")]
MemoryOption = Annotated[float, typer.Option(metavar="GIB", help="Memory that one file may use.")]

app = typer.Typer(
    help="Mark neural networks while they train, and prove with an exact p-value whose copy a suspect is.",
    epilog="Exit status: verify 0 owned, 1 not proven, 2 could not be judged; the rest 0 or 2; Ctrl-C 130.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


INTERRUPTED, NOBODY_READS = 130, 141  # what shells make of SIGINT and SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    status = _run(arguments)
    if status == INTERRUPTED and arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said, and the process ends: once more changes nothing
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # said already; what is still buffered must not raise once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # --debug is taken out here so that it may stand behind the command as well as before it.
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    given = [argument for argument in given[:end] if argument != "--debug"] + given[end:]
    try:
        status = app(given, prog_name="wmengine", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if status == INTERRUPTED:  # typer makes a status of Ctrl-C
            raise KeyboardInterrupt
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "wmengine"
        return _fail(f"{error.format_message().rstrip('.')}: see {command} --help")
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except (BrokenPipeError, SystemExit):  # the reader has gone (`| head`), of which typer makes an exit with 1
        return NOBODY_READS
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_sentence(error))
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str:
    """What to say about an error: the engine's own and the system's speak for themselves, others are our mistake."""
    from wmengine.errors import WmengineError

    if isinstance(error, WmengineError | ValueError | ImportError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return f"unexpected {type(error).__name__}: {error} (run again with --debug and report what it prints)"


def _fail(message: str, status: int = 2) -> int:
    from wmengine.errors import printable

    print(f"wmengine: {printable(' '.join(message.split()))}", file=sys.stderr)
    return status


def _print_version(asked: bool) -> None:
    if asked:
        print(f"wmengine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where report, table, marks, key and models go.")
    ] = Path("wmengine-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Shorter training, the same proofs.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Mark a small network, make the copies that a thief would make, and prove whose every copy is."""
    from wmengine.demo import print_table, run_demo

    result = run_demo(out, quick)
    if as_json:
        _print_json(result.to_json())
    else:
        print_table(result)
    return 0 if result.proven else _fail(f"not every verdict is as it should be: see {result.report}")


@app.command()
def keygen(
    owner: Annotated[str, typer.Argument(metavar="OWNER", help='Who the key belongs to, such as "ACME Vision".')],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The key file to write; never overwritten.")],
    seal: Annotated[
        bool, typer.Option("--seal", help="Ask for a passphrase on the terminal and seal the file.")
    ] = False,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make an owner's secret key and print its commitment, which is safe to publish."""
    from wmengine.key import Key

    passphrase = None
    if passphrase_file is not None:
        passphrase = _read_passphrase(passphrase_file)
    elif seal:
        passphrase = _ask_passphrase(f"Passphrase to seal {out}: ", twice=True)
    key = Key.generate(owner)
    key.save(out, passphrase)
    if as_json:
        _print_json(
            {"owner": key.owner, "commitment": key.commitment, "path": str(out), "sealed": passphrase is not None}
        )
        return 0
    print(f"{out}: the key of {key.owner}, {'sealed' if passphrase is not None else 'not sealed'}; keep it secret.")
    print(f"commitment: {key.commitment}")
    print("Publish the commitment where its date can be shown: it counts against others from that date on.")
    return 0


@app.command()
def verify(
    suspect: Annotated[
        str, typer.Argument(metavar="SUSPECT", help="The ONNX file to judge, or the URL of an endpoint.")
    ],
    watermark: Annotated[Path, typer.Option("--watermark", metavar="FILE", help="The watermark to look for (.wm).")],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="KEY", help="Derive the watermark again from its owner's key and compare."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Owned when the p-value is at most this.")] = 1e-9,
    adversarial: Annotated[
        bool, typer.Option("--adversarial", help="For evidence against others: needs --key, and the bar is 2^-128.")
    ] = False,
    queries: QueriesOption = "all",
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
    isolation: IsolationOption = "persistent",
    device: DeviceOption = "cpu",
    seconds: SecondsOption = 120.0,
    memory: MemoryOption = 4.0,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> int:
    """Judge one suspect: does it depend on material made with this key?"""
    from wmengine.errors import Interrupted
    from wmengine.verify import verify as judge

    if adversarial and key is None:
        raise ValueError("--adversarial needs --key: evidence against others rests on the derivation")
    asked: Any = suspect
    if endpoint_options is not None:
        from wmengine.suspects.endpoint import endpoint, read_options

        asked = endpoint(suspect, **read_options(endpoint_options))
    interrupted = False
    try:
        verdict = judge(
            asked,
            _load_watermark(watermark, passphrase_file),
            key=None if key is None else _load_key(key, passphrase_file),
            alpha=alpha,
            adversarial=adversarial,
            queries=queries,
            isolation=isolation,
            limits=_limits(seconds, memory),
            classes=classes,
            clean=None if clean is None else _load_clean(clean),
            provider=device,
        )
    except Interrupted as interruption:
        interrupted, verdict = True, interruption.verdict
    if as_json:
        print(verdict.to_json())
    elif verdict.decision == "error":
        _fail(verdict.error or f"{verdict.suspect} could not be judged")
    else:
        _print_verdict(verdict)
    if interrupted:
        return INTERRUPTED
    return {"owned": 0, "not_proven": 1}.get(verdict.decision, 2)


@app.command()
def scan(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATHS...", help="ONNX files, folders, patterns, or URLs of object stores."),
    ],
    watermarks: Annotated[
        list[Path],
        typer.Option("--watermarks", metavar="DIR", help="Watermarks to look for: .wm files or folders of them."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE.parquet", help="The table to write; an interrupted scan is resumed beside it."
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a table that is finished.")] = False,
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Suspects at a time (default: the cores).")] = None,
    alpha: Annotated[float, typer.Option(help="Owned when p times the number of pairs is at most this.")] = 1e-9,
    all_queries: Annotated[
        bool, typer.Option("--all-queries", help="Ask every trigger instead of stopping when the answer is clear.")
    ] = False,
    all_adapters: Annotated[
        bool, typer.Option("--all-adapters", help="Put triggers on every known scale, even where nothing suggests it.")
    ] = False,
    classes: ClassesOption = "same",
    isolation: IsolationOption = "persistent",
    device: DeviceOption = "cpu",
    seconds: SecondsOption = 120.0,
    memory: MemoryOption = 4.0,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|local", help="Judge on this Ray cluster; --jobs are then those of all nodes."),
    ] = None,
    passphrase_file: PassphraseOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: every row when it is done, then the summary.")
    ] = False,
) -> int:
    """Judge many suspects with many watermarks, in sandboxes, on all cores; the same command resumes."""
    from wmengine.scan import scan as scan_all
    from wmengine.scan.progress import Report

    if classes == "any" and not all_queries:
        raise ValueError("--classes any needs --all-queries: one order must fit all answers")
    if out.suffix != ".parquet":
        raise ValueError(f"--out must end in .parquet, and it is {out}")
    with Report(as_json) as report:
        table = scan_all(
            paths,
            watermarks,
            out=out,
            force=force,
            jobs=jobs,
            alpha=alpha,
            queries="all" if all_queries else "sequential",
            adapters="all" if all_adapters else "likely",
            classes=classes,
            isolation=isolation,
            provider=device,
            limits=_limits(seconds, memory),
            passphrase=_read_passphrase(passphrase_file) if passphrase_file else None,
            progress=report.add,
            ray=ray,
        )
    report.summarise(table, out)
    return 0


@app.command()
def schemes(as_json: JsonOption = False) -> int:
    """List the schemes that can be embedded and verified."""
    from dataclasses import asdict

    from wmengine.schemes import SCHEMES

    if as_json:
        _print_json({name: {"kind": scheme.kind, **asdict(scheme)} for name, scheme in SCHEMES.items()})
        return 0
    rows = [(name, scheme.kind, _parts(scheme), scheme.null, scheme.paper) for name, scheme in SCHEMES.items()]
    _print_table(("scheme", "kind", "parts", "null", "paper"), rows)
    return 0


@app.command()
def info(as_json: JsonOption = False) -> int:
    """Print versions, instruction set, threads, GPU, ONNX providers, and anything wrong with the installation."""
    from wmengine.info import describe, installation

    found = installation()
    if as_json:
        _print_json(found)
    else:
        print(describe(found))
    return 0


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="OPERATOR", help="Which operators to measure; all unless told.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, under a minute: does everything run?")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where result files go (benchmarks/results, with new tables and plots; with --quick a temporary one).",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", help="CPU threads, for torch and wmengine alike.")] = 2,
    as_json: JsonOption = False,
) -> int:
    """Measure every operator beside its floor and its peers. Needs a checkout: benchmarks are not installed."""
    runner = _benchmarks()
    report = runner.run(operators or (), quick=quick, out=out, device=device, threads=threads)
    if as_json:
        _print_json(report.to_json())
    else:
        print(report.text())
    return 0


def _benchmarks() -> Any:
    """benchmarks.runner of the checkout that this package is installed from, or else of the current folder."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "runner.py").is_file() and (root / "wmengine" / "cli.py").is_file():
            sys.path.insert(0, str(root))
            try:
                return importlib.import_module("benchmarks.runner")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("benchmarks"):
                    raise
                raise ImportError(f"{error.name} is not installed: pip install -e '.[bench]' in {root}") from error
    raise ValueError(
        "the benchmarks are not part of the installed package: clone wmengine's repository and run this in the clone"
    )


def _parts(scheme: "Scheme") -> str:
    from wmengine.schemes import WhiteBox

    if isinstance(scheme, WhiteBox):
        return f"{scheme.carrier} × {scheme.projection} × {scheme.link}, {scheme.bits} bits"
    return f"{scheme.triggers} triggers × {scheme.labels} labels, {scheme.count} triggers"


def _print_verdict(verdict: "Verdict") -> None:
    from wmengine.errors import printable

    print(f"{printable(verdict.suspect)}: {verdict.decision.replace('_', ' ')}")
    rows = [
        ("watermark", f"{verdict.watermark} ({verdict.scheme})"),
        ("matched", f"{verdict.matched} of {verdict.total} symbols"),
        ("log10 p", f"{verdict.log10_p:.2f} (owned at {math.log10(verdict.alpha):.2f} or less)"),
        ("derivation", verdict.derivation.replace("_", " ")),
        ("queries", f"{verdict.queries} in {verdict.seconds:.2f} s"),
    ]
    for name, value in rows:
        print(f"  {name:<10}  {value}")
    for note in verdict.notes:
        print(f"  note: {printable(note)}")


def _limits(seconds: float, memory: float) -> "Limits":
    from wmengine.sandbox import Limits

    for name, value in {"--seconds": seconds, "--memory": memory}.items():
        if not 0.0 < value <= 1e6:
            raise ValueError(f"{name} must be above 0 and at most a million, and it is {value:g}")
    return Limits(seconds=seconds, memory_bytes=int(memory * 2**30))


def _load_clean(path: Path) -> tuple[Any, Any]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["inputs"], arrays["labels"]
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} must be an .npz file with the arrays `inputs` and `labels`") from None


def _load_key(path: Path, passphrase_file: Path | None) -> "Key":
    from wmengine.key import Key

    return Key.load(path, _passphrase_for(path, passphrase_file))


def _load_watermark(path: Path, passphrase_file: Path | None) -> "Watermark":
    from wmengine.watermark import Watermark

    return Watermark.load(path, _passphrase_for(path, passphrase_file))


def _passphrase_for(path: Path, passphrase_file: Path | None) -> str | None:
    """The passphrase to open `path` with; None for a file that is not sealed, or when nobody is there to ask."""
    from wmengine.sealing import is_sealed

    try:
        if not is_sealed(path.read_bytes()):
            return None
    except OSError:
        return None  # loading says what is wrong with the file
    if passphrase_file is not None:
        return _read_passphrase(passphrase_file)
    return _ask_passphrase(f"Passphrase of {path}: ") if sys.stdin.isatty() else None


def _read_passphrase(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: a passphrase stands on the first line of a text file") from None
    if not lines or not lines[0]:
        raise ValueError(f"{path} holds no passphrase: put it on the first line")
    return lines[0]


def _ask_passphrase(prompt: str, twice: bool = False) -> str:
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask for a passphrase: give --passphrase-file")
    passphrase = getpass.getpass(prompt)
    if twice and getpass.getpass("Once more: ") != passphrase:
        raise ValueError("the two passphrases differ: nothing was written")
    if not passphrase:
        raise ValueError("the passphrase is empty: nothing was done")
    return passphrase


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table fitted to the terminal, or plain aligned columns where stdout is none."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*headers, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
