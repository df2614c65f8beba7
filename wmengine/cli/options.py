"""Options that several commands have, and what their files hold."""

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wmengine.identity.key import Key
    from wmengine.sandbox import Limits

LONGEST_PASSPHRASE = 4096  # bytes

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text: one object a line.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="File whose first line is the passphrase of the sealed files given; asked for on a terminal otherwise.",
    ),
]

TestOption = Annotated[
    str,
    typer.Option(
        "--test", metavar="TEST", help='"fixed" asks every trigger, "sequential" stops when the answer is clear.'
    ),
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
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="KEY", help="Derive the watermarks again from their owner's key and compare."),
]


def limits(seconds: float, memory: float) -> "Limits":
    from wmengine.sandbox import Limits

    for name, value in {"--seconds": seconds, "--memory": memory}.items():
        if not 0.0 < value <= 1e6:
            raise ValueError(f"{name} must be above 0 and at most a million, and it is {value:g}")
    return Limits(seconds=seconds, memory_bytes=int(memory * 2**30))


def load_clean(path: Path) -> tuple[Any, Any]:
    import zipfile

    import numpy as np

    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["inputs"], arrays["labels"]
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} must be an .npz file with the arrays `inputs` and `labels`") from None


def unlock(
    watermarks: Sequence[Path], key: Path | None, passphrase_file: Path | None
) -> "tuple[str | None, Key | None]":
    """The passphrase of the watermarks, None where none is sealed, and the key of its file; a passphrase file is read
    once, as it may be a pipe."""
    from wmengine.identity.key import Key

    given = None if passphrase_file is None else read_passphrase(passphrase_file)
    passphrase = _passphrase_of(watermarks, given)
    return passphrase, None if key is None else Key.load(key, _passphrase_of([key], given))


def _passphrase_of(paths: Sequence[Path], given: str | None) -> str | None:
    """The passphrase of those of these files that are sealed, asked for once unless given; None where none is, or
    nobody is there to ask."""
    sealed = [path for path in paths if _is_sealed(path)]
    if not sealed or given is not None:
        return given
    more = f" and {len(sealed) - 1} more" if len(sealed) > 1 else ""
    return ask_passphrase(f"Passphrase of {sealed[0]}{more}: ") if _is_asked() else None


def _is_sealed(path: Path) -> bool:
    from wmengine.errors import WmengineError
    from wmengine.identity.sealing import is_sealed, read_file

    try:
        return is_sealed(read_file(path, "file", WmengineError))
    except WmengineError:  # loading says what is wrong with it
        return False


def _is_asked() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def check_file(path: Path) -> None:
    """Raises ValueError for a folder, a pipe or a device; what does not exist is for whoever opens it."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")


def read_names(path: Path) -> list[str]:
    """The lines of a text file, without empty ones at its end."""
    from wmengine.errors import WmengineError
    from wmengine.identity.sealing import read_file

    try:
        return read_file(path, "text file", WmengineError).decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: give the name of a class on each line") from None


def read_passphrase(path: Path) -> str:
    """The first line of a file or a pipe, of which no more is read than a passphrase may have."""
    with path.open("rb") as file:
        line = file.readline(LONGEST_PASSPHRASE + 1)
    try:
        lines = line.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: a passphrase stands on the first line of a text file") from None
    if not lines or not lines[0]:
        raise ValueError(f"{path} holds no passphrase: put it on the first line")
    if len(line) > LONGEST_PASSPHRASE:
        raise ValueError(f"{path} holds no passphrase: its first line is longer than {LONGEST_PASSPHRASE} bytes")
    return lines[0]


def ask_passphrase(prompt: str, twice: bool = False) -> str:
    if not _is_asked():
        raise ValueError("there is no terminal to ask for a passphrase: give --passphrase-file")
    passphrase = getpass.getpass(prompt)
    if twice and getpass.getpass("Once more: ") != passphrase:
        raise ValueError("the two passphrases differ: nothing was written")
    if not passphrase:
        raise ValueError("the passphrase is empty: nothing was done")
    return passphrase
