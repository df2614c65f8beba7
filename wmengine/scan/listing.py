"""Which files a scan is about: files, folders, patterns, URLs of object stores; each file once, in one fixed order."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wmengine.errors import SuspectError, WatermarkError
from wmengine.suspects.model_file import LocalSource, Source
from wmengine.watermark import Watermark

SUFFIX = ".onnx"
PAUSES = (0.5, 2.0)  # seconds before a store that failed is asked again


def list_suspects(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Every suspect below the paths, sorted, each once.

    A file is taken whatever it is called; a folder or a prefix of an object store gives all files below it that end in
    .onnx, in capitals or not; a pattern (`*`, `?`, `[…]`, `**`) gives the files and folders that it matches. Links to
    folders are followed only where a path names one itself. URLs (`s3://bucket/prefix`) go through fsspec. Raises
    FileNotFoundError for a path that names nothing, SuspectError for a folder or a store that cannot be listed, as a
    scan must not pass over it in silence, ValueError where there is no suspect in all.
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
        for folder, _, names in os.walk(path, onerror=_refuse):
            yield from (os.path.join(folder, name) for name in names if _is_model(name))
    elif os.path.lexists(path):
        yield path
    elif glob.has_magic(path):
        matches = sorted(_matches(path))
        if not matches:
            raise FileNotFoundError(f"{path} matches no file")
        for match in matches:
            yield from _local(match)
    else:
        raise FileNotFoundError(f"{path} does not exist; give ONNX files, folders, patterns or URLs")


def _matches(pattern: str) -> set[str]:
    """What a pattern matches; `**` follows no links, as two that lead to their own folder would have no end."""
    parts = Path(pattern).parts
    while parts and parts[-1] == "**":  # all below: a folder is looked through anyhow
        parts = parts[:-1]
    plain = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:plain])
    found = root.glob(os.path.join(*parts[plain:])) if plain < len(parts) else [root]
    # A link to a folder is followed where the caller names it, and not where a stranger has put it.
    return {os.fspath(match) for match in found if not (match.is_symlink() and match.is_dir())}


def _refuse(error: OSError) -> None:
    """Called by `os.walk` for a folder that it cannot list."""
    if not isinstance(error, FileNotFoundError):  # one that has just been removed holds nothing
        raise SuspectError(
            f"{error.filename} cannot be listed ({error.strerror}); check its permissions, or name the folders to scan"
        )


def _is_model(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def _remote(url: str) -> list[str]:
    if "::" in url:
        raise SuspectError(f"{url} is a chain of stores, and a scan reads from one: copy the files out of it first")
    filesystem, path = _filesystem(url)
    try:
        if not url.endswith("/") and filesystem.isfile(path):  # first, as a signed URL holds what looks like a pattern
            names = [path]
        elif glob.has_magic(path):
            names = []
            for match, about in filesystem.glob(path, detail=True).items():
                folder = about["type"] == "directory"
                names += [name for name in filesystem.find(match) if _is_model(name)] if folder else [match]
        else:
            names = [name for name in filesystem.find(path) if _is_model(name)]
    except Exception as error:  # every store has its own exceptions
        raise SuspectError(
            f"{url} cannot be listed ({_reason(error)}); check the address and the rights to it"
        ) from None
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
        return _fetch(self.name, maximum_bytes)

    def read_beside(self, location: str, maximum_bytes: int) -> bytes:
        if self.name.startswith(("http://", "https://")):
            location = quote(location)  # %2e%2e would lead out of the model's folder, and ? is no part of a name
        return _fetch(f"{self.name.rpartition('/')[0]}/{location}", maximum_bytes)


def _fetch(url: str, maximum_bytes: int) -> bytes:
    """The bytes behind a URL; what fails is tried again, as stores fail now and then.

    Not what is missing, and not what took as long as the store's client waits, which is minutes already.
    """
    filesystem, path = _filesystem(url)
    for pause in (*PAUSES, None):
        try:
            with filesystem.open(path, "rb") as file:
                data: bytes = file.read(maximum_bytes + 1)
            break
        except (FileNotFoundError, PermissionError, IsADirectoryError, TimeoutError) as error:
            raise SuspectError(f"{url} cannot be read ({_reason(error)})") from None
        except Exception as error:  # every store has its own exceptions
            if pause is None:
                raise SuspectError(f"{url} cannot be read ({_reason(error)}), tried {len(PAUSES) + 1} times") from None
            time.sleep(pause)
    if len(data) > maximum_bytes:
        raise SuspectError(f"{url} is larger than the {maximum_bytes} bytes that a model and its weights may have")
    return data


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
