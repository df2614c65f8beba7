"""Which files a scan is about: files, folders, patterns, URLs of object stores; each file once, in one fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wmengine.errors import SuspectError, WatermarkError
from wmengine.suspects.model_file import LocalSource, Source
from wmengine.watermark import Watermark

SUFFIX = ".onnx"


def list_suspects(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Every suspect below the paths, sorted, each once.

    A file is taken whatever it is called; a folder or a prefix of an object store gives all files below it that end in
    .onnx; a pattern (`*`, `?`, `[…]`, `**`) whatever it matches. URLs (`s3://bucket/prefix`) go through fsspec. Raises
    FileNotFoundError for a path that names nothing, ValueError where there is no suspect in all.
    """
    found: set[str] = set()
    for path in map(_without_protocol, map(os.fsdecode, paths)):
        found.update(_remote(path) if "://" in path else _local(path))
    if not found:
        raise ValueError(f"there is no {SUFFIX} file to scan: give files, folders, patterns or URLs that hold some")
    return sorted(found)


def open_source(suspect: str) -> Source:
    """Where a listed suspect is read from."""
    suspect = _without_protocol(suspect)
    return RemoteSource(suspect) if "://" in suspect else LocalSource(suspect)


def load_watermarks(paths: Sequence[str | os.PathLike[str]], passphrase: str | None = None) -> list[Watermark]:
    """The watermarks in these files and folders (.wm), sorted by file, each commitment once.

    Raises WatermarkError for a file that is none, ValueError where there is none in all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.wm")) if path.is_dir() else [path]
    marks: dict[str, Watermark] = {}
    for file in files:
        mark = Watermark.load(file, passphrase)
        marks.setdefault(mark.commitment, mark)
    if not marks:
        raise WatermarkError(f"there is no watermark in {', '.join(map(str, paths))}: give .wm files or their folder")
    return list(marks.values())


def _without_protocol(path: str) -> str:
    """`file://` and `local://` are this machine: read with its own care for links and pipes."""
    for protocol in ("file://", "local://"):
        path = path.removeprefix(protocol)
    return path


def _local(path: str) -> Iterator[str]:
    if os.path.isdir(path):
        for folder, _, names in os.walk(path):
            yield from (os.path.join(folder, name) for name in names if name.endswith(SUFFIX))
    elif os.path.lexists(path):
        yield path
    elif glob.has_magic(path):
        matches = [match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)]
        if not matches:
            raise FileNotFoundError(f"{path} matches no file")
        yield from matches
    else:
        raise FileNotFoundError(f"{path} does not exist; give ONNX files, folders, patterns or URLs")


def _remote(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    try:
        if glob.has_magic(path):
            names = filesystem.glob(path)
        elif filesystem.isfile(path):
            names = [path]
        else:
            names = [name for name in filesystem.find(path) if name.endswith(SUFFIX)]
    except Exception as error:  # every store has its own exceptions
        raise SuspectError(f"{url} cannot be listed ({error}); check the address and the rights to it") from None
    if not names:
        raise FileNotFoundError(f"{url} holds no {SUFFIX} file")
    return [str(filesystem.unstrip_protocol(name)) for name in names]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SuspectError(f"{url} cannot be opened: {error}") from None
    return filesystem, path


class RemoteSource:
    """A file in an object store, or wherever else fsspec reads from."""

    def __init__(self, url: str) -> None:
        self.name = url

    def read(self, maximum_bytes: int) -> bytes:
        filesystem, path = _filesystem(self.name)
        return _fetch(filesystem, path, self.name, maximum_bytes)

    def read_beside(self, location: str, maximum_bytes: int) -> bytes:
        filesystem, path = _filesystem(self.name)
        beside = f"{path.rpartition('/')[0]}/{location}"
        return _fetch(filesystem, beside, f"{self.name.rpartition('/')[0]}/{location}", maximum_bytes)


def _fetch(filesystem: Any, path: str, name: str, maximum_bytes: int) -> bytes:
    try:
        with filesystem.open(path, "rb") as file:
            data: bytes = file.read(maximum_bytes + 1)
    except FileNotFoundError:
        raise SuspectError(f"{name} is missing") from None
    except Exception as error:  # every store has its own exceptions
        raise SuspectError(f"{name} cannot be read ({error})") from None
    if len(data) > maximum_bytes:
        raise SuspectError(f"{name} is larger than the {maximum_bytes} bytes that a model and its weights may have")
    return data
