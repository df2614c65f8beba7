"""Which files a scan is about: files, folders, patterns, URLs of object stores; each file once, in one fixed order.

Strangers may fill what is listed here. Whatever they can make for nothing (empty files, pipes, links to nowhere, more
names of one file) is no suspect of its own, as every suspect is paid for by all others. What a store has listed is
opened by the path that it gave, and never read as a URL again: names are strangers' too.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from wmengine.errors import SuspectError, WatermarkError
from wmengine.judging.verification import load_watermark
from wmengine.marks.watermark import Watermark
from wmengine.suspects.checkpoint import SUFFIXES, is_checkpoint, is_index
from wmengine.suspects.model_file import MAXIMUM_BYTES, LocalSource, Source
from wmengine.suspects.onnx_engine import may_name_files

SUFFIX = ".onnx"
PAUSES = (0.5, 2.0)  # seconds before a store that failed is asked again


@dataclass(frozen=True)
class Listed:
    """A suspect: every name that its file is shown by, its store (the URL that listed it, "" for this machine), and
    the first name's path there, which holds in any working folder.

    inode: which file that must be, where it has several names, as the verdict is all of them's; else 0.
    """

    names: tuple[str, ...]
    store: str
    path: str
    inode: int = 0

    @property
    def name(self) -> str:
        """The first of its names: the one that is judged."""
        return self.names[0]


class Listing(NamedTuple):
    """All suspects, and how many files were left out because they hold nothing, or are called otherwise than models."""

    suspects: tuple[Listed, ...]
    empty: int
    others: int


class _Found(NamedTuple):
    """A name; `file` is equal for names of one file."""

    name: str
    store: str
    path: str
    file: tuple[Any, ...]
    empty: bool = False
    link: bool = False
    inode: int = 0
    other: bool = False


def list_suspects(paths: Iterable[str | os.PathLike[str]], checkpoints: bool = False) -> Listing:
    """Every suspect below the paths, sorted, each once.

    A file is taken whatever it is called, and if it is empty; a folder or a prefix of an object store gives all files
    below it that end in .onnx, in capitals or not, and hold something; a pattern (`*`, `?`, `[…]`, `**`) gives the
    files and folders that it matches. checkpoints: folders give these, too, by what they are called; of `.bin` files,
    which hold ONNX's external weights as often, those that begin as one. Links to folders are followed only where a
    path names one itself. A folder below that cannot be listed is a suspect, of which its row will say that it cannot
    be read. URLs (`s3://bucket/prefix`) go through fsspec. Raises FileNotFoundError for a path that names nothing,
    SuspectError for a folder or a store of the caller's that cannot be listed, ValueError where there is no suspect in
    all.
    """
    found: dict[str, _Found] = {}
    suffixes = (SUFFIX, *SUFFIXES) if checkpoints else (SUFFIX,)
    for path in map(_without_protocol, map(os.fsdecode, paths)):
        for each in _remote(path) if "://" in path else _local(path, suffixes):
            if each.name not in found or found[each.name].empty or found[each.name].other:
                found[each.name] = each
    files: dict[tuple[Any, ...], list[_Found]] = {}
    for each in sorted(found.values(), key=lambda each: (each.link, each.name)):  # links are led elsewhere too easily
        if not (each.empty or each.other):
            files.setdefault(each.file, []).append(each)
    empty, others = sum(each.empty for each in found.values()), sum(each.other for each in found.values())
    if not files:
        raise ValueError(
            f"there is no {SUFFIX} file {'or checkpoint ' * checkpoints}to scan, but {empty} that are empty and "
            f"{others} called otherwise: give files, folders, patterns or URLs that hold some"
        )
    suspects = [
        Listed(tuple(each.name for each in names), names[0].store, names[0].path, names[0].inode * (len(names) > 1))
        for same in files.values()
        for names in _of_one_model(same)
    ]
    return Listing(tuple(sorted(suspects, key=lambda each: each.name)), empty, others)


def held_anywhere(path: str | os.PathLike[str]) -> str:
    """A path or URL of the caller's as it holds in any working folder."""
    text = _without_protocol(os.fsdecode(path))
    return text if "://" in text or os.path.isabs(text) else os.path.join(os.getcwd(), text)


def open_source(suspect: Listed, called: str) -> Source:
    """Where a listed suspect is read from; called: what errors call it."""
    if suspect.store:
        return RemoteSource(called, suspect.store, suspect.path)
    return LocalSource(suspect.path, called, suspect.inode)


def load_watermarks(
    given: Sequence[Watermark | str | os.PathLike[str]], passphrase: str | None = None
) -> list[Watermark]:
    """The watermarks that are given, or in these files and folders (.wm), each commitment once.

    Raises WatermarkError for a file that is none, and where there is none in all.
    """
    marks: dict[str, Watermark] = {}
    for each in given:
        found = [each] if isinstance(each, Watermark) else watermark_files([each])
        for file in found:
            mark = load_watermark(file, passphrase)
            marks.setdefault(mark.commitment, mark)
    if not marks:
        raise WatermarkError(f"there is no watermark in {', '.join(map(str, given))}: give .wm files or their folder")
    return list(marks.values())


def watermark_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """These files, and the .wm files of these folders and patterns, sorted."""
    files: list[Path] = []
    for path in map(os.fsdecode, paths):
        several = os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))
        files += (
            sorted(Path(each.name) for each in _local(path, (".wm",)) if not each.other) if several else [Path(path)]
        )
    return files


def _without_protocol(path: str) -> str:
    """`file://` and `local://` are this machine: read with its own care for links and pipes."""
    for protocol in ("file://", "local://"):
        path = path.removeprefix(protocol)
    return path


def _local(path: str, suffixes: tuple[str, ...]) -> Iterator[_Found]:
    if os.path.isdir(path):
        yield from _below(path, (), suffixes)
    elif os.path.lexists(path):
        yield _look_at(path)._replace(empty=False)
    elif glob.has_magic(path):
        parts = Path(path).parts
        plain = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        matches = list(_below(os.path.join("", *parts[:plain]), parts[plain:], suffixes))
        if not matches:
            raise FileNotFoundError(f"{path} matches no file")
        yield from matches
    else:
        raise FileNotFoundError(f"{path} does not exist; give files, folders, patterns or URLs")


def _below(root: str, parts: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[_Found]:
    """What the parts of a pattern match below a folder, and what ends in one of `suffixes` below folders that they
    match; all else that lies there is `other`.

    Strangers nest folders as deep as they like, and link them into circles: nothing here is recursive, and no link is
    followed. Each folder comes with the places in the pattern that its own name may have led to.
    """

    def reached(places: Iterable[int]) -> set[int]:
        found = set(places)
        for place in range(len(parts)):
            if place in found and parts[place] == "**":  # any number of folders, none included
                found.add(place + 1)
        return found

    waiting = [(root, reached({0}))]
    while waiting:
        folder, places = waiting.pop()
        try:
            with os.scandir(folder or ".") as listed:
                entries = list(listed)
        except FileNotFoundError:
            continue  # one that has just been removed holds nothing
        except OSError as error:
            if folder == root:
                raise SuspectError(
                    f"{folder} cannot be listed ({error.strerror}); check its permissions, or name the folders to scan"
                ) from None
            yield _Found(folder, "", held_anywhere(folder), (folder,))
            continue
        whole = len(parts) in places
        for entry in entries:
            name = os.path.join(folder, entry.name)
            matched = {place for place in places if place == len(parts) or parts[place] == "**"} | {
                place + 1 for place in places if place < len(parts) and fnmatchcase(entry.name, parts[place])
            }
            if _is_folder(entry):
                waiting.append((name, reached(matched)))
            elif len(parts) in reached(matched) and (not whole or _is_called(name, suffixes)):
                found = _look_at(name)
                if found.file:
                    yield found
            elif whole and not _is_folder(entry, linked=True):
                yield _Found(name, "", name, (name,), other=True)


def _is_called(name: str, suffixes: tuple[str, ...]) -> bool:
    called = name.lower()
    return called.endswith(suffixes) and (not called.endswith(".bin") or is_checkpoint(name))


def _is_folder(entry: os.DirEntry[str], linked: bool = False) -> bool:
    try:
        return entry.is_dir(follow_symlinks=linked)
    except OSError:  # its row will say why
        return False


def _look_at(name: str) -> _Found:
    """A file of this machine; one without `file` is a link to a folder."""
    path = held_anywhere(name)
    try:
        status = os.lstat(path)
        link = stat.S_ISLNK(status.st_mode)
        status = os.stat(path) if link else status
    except OSError as error:
        return _Found(name, "", path, (path,), empty=error.errno in (errno.ENOENT, errno.ELOOP))
    if stat.S_ISDIR(status.st_mode):
        return _Found(name, "", path, ())
    # Size and time, as not every network's file system gives each file a number of its own.
    file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if status.st_ino else (path,)
    return _Found(name, "", path, file, status.st_size == 0, link, status.st_ino)


def _of_one_model(names: list[_Found]) -> list[list[_Found]]:
    """Names of one file that are one model: its name can make it a checkpoint, or the index of some."""
    if len(names) == 1:
        return [names]
    forms: dict[tuple[bool, bool], list[_Found]] = {}
    for each in names:
        forms.setdefault((is_checkpoint(each.path), is_index(each.path)), []).append(each)
    return [
        some
        for form, same in forms.items()
        for some in ([same] if form == (True, False) else _with_the_same_weights(same))
    ]


def _with_the_same_weights(names: list[_Found]) -> list[list[_Found]]:
    """In several folders, other weights may lie beside each of them."""
    folders: dict[str, list[_Found]] = {}
    for each in names:
        folders.setdefault(os.path.dirname(each.path), []).append(each)
    if len(folders) > 1:
        try:
            if is_index(names[0].path) or may_name_files(LocalSource(names[0].path).read(MAXIMUM_BYTES)):
                return list(folders.values())
        except (SuspectError, OSError, MemoryError):
            return list(folders.values())
    return [names]


def _remote(url: str) -> Iterator[_Found]:
    if "::" in url:
        raise SuspectError(f"{url} is a chain of stores, and a scan reads from one: copy the files out of it first")
    filesystem, path = _filesystem(url)
    found: dict[str, Any] = {}
    below: dict[str, Any] = {}
    try:
        if not url.endswith("/") and filesystem.isfile(path):  # first, as a signed URL holds what looks like a pattern
            found[path] = {}
        elif glob.has_magic(path):
            for match, about in filesystem.glob(path, detail=True).items():
                if about["type"] == "directory":
                    below |= _below_remote(filesystem, match)
                else:
                    found[match] = about
        else:
            below = _below_remote(filesystem, path)
    except Exception as error:  # every store has its own exceptions
        raise SuspectError(
            f"{url} cannot be listed ({_reason(error)}); check the address and the rights to it"
        ) from None
    found |= {name: about for name, about in below.items() if name.lower().endswith(SUFFIX)}
    if not found:
        raise FileNotFoundError(f"{url} holds no {SUFFIX} file")
    for name, about in (below | found).items():
        shown = str(filesystem.unstrip_protocol(name))
        other = name not in found
        yield _Found(shown, url, name, (shown,), empty=not other and about.get("size") == 0, other=other)


def _below_remote(filesystem: Any, path: str) -> dict[str, Any]:
    """Every object below a path of a store, with what the store says of it."""
    try:
        found: dict[str, Any] = filesystem.find(path, detail=True)
    except RecursionError:  # of fsspec's, in the folders that somebody has nested
        found, waiting = {}, [path]
        while waiting:
            for about in filesystem.ls(waiting.pop(), detail=True):
                if about["type"] == "directory":
                    waiting.append(about["name"])
                else:
                    found[about["name"]] = about
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SuspectError(f"{url} cannot be opened: {error}") from None
    return filesystem, path


class RemoteSource:
    """A file in an object store, or wherever else fsspec reads from: at exactly this path of what the URL leads to."""

    def __init__(self, name: str, store: str, path: str) -> None:
        self.name = name
        self._store, self._path = store, path

    def read(self, maximum_bytes: int) -> bytes:
        return _fetch(self.name, self._store, self._path, maximum_bytes)

    def read_beside(self, location: str, maximum_bytes: int) -> bytes:
        name = f"the file {location!r} beside {self.name}"
        if self._store.startswith(("http://", "https://")):
            location = quote(location)  # %2e%2e would lead out of the model's folder, and ? is no part of a name
        return _fetch(name, self._store, f"{self._path.rpartition('/')[0]}/{location}", maximum_bytes)


def _fetch(name: str, store: str, path: str, maximum_bytes: int) -> bytes:
    """The bytes at a path of a store; what fails is tried again, as stores fail now and then.

    Not what is missing, and not what took as long as the store's client waits, which is minutes already.
    """
    if "?versionId=" in path and not store.startswith(("http://", "https://")):
        raise SuspectError(
            f"{name} holds ?versionId= in its name, and S3's client would read another object: rename it"
        )
    filesystem, _ = _filesystem(store)
    for pause in (*PAUSES, None):
        try:
            with filesystem.open(path, "rb") as file:
                data: bytes = file.read(maximum_bytes + 1)
            break
        except (FileNotFoundError, PermissionError, IsADirectoryError, TimeoutError) as error:
            raise SuspectError(f"{name} cannot be read ({_reason(error)})") from None
        except Exception as error:  # every store has its own exceptions
            if pause is None:
                raise SuspectError(f"{name} cannot be read ({_reason(error)}), tried {len(PAUSES) + 1} times") from None
            time.sleep(pause)
    if len(data) > maximum_bytes:
        raise SuspectError(f"{name} is larger than the {maximum_bytes} bytes that a model and its weights may have")
    return data


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
