"""An ONNX file's bytes, and those of its external weights: each read once, capped and hashed, and looked at by nobody.

External weights are read only from regular files with a single link inside the model's own directory, or its own blobs
in a cache of Hugging Face's: a model must not be able to name a file that its sender could not read, whatever he does
to the directory meanwhile. Which files it names is for an engine to say, that may live in a sandbox: here no byte of a
stranger's file is interpreted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

from wmengine.errors import SuspectError

MAXIMUM_BYTES = 4 << 30
MAXIMUM_FILES, MAXIMUM_LOCATION = 10_000, 4096  # a path's length on Linux
_BLOB = re.compile(r"blobs/([0-9a-f]{40}|[0-9a-f]{64})")
HOLES = 64 << 20  # bytes that nobody has written, more than which are refused where they are most of a file


class Source(Protocol):
    """Where a model lies: its name for messages, its bytes, and the bytes of a file beside it.

    Both raise SuspectError, one sentence, for what cannot be read, is no regular file, or is larger than maximum_bytes.
    """

    name: str

    def read(self, maximum_bytes: int) -> bytes: ...

    def read_beside(self, location: str, maximum_bytes: int) -> bytes: ...


@dataclass(frozen=True)
class ModelFile:
    """What was read: the model's bytes, every external file it names (location → bytes), and the hash over all of it.

    sha256 covers the model's bytes, then for each location in order: NUL, location, NUL, length in digits, NUL, bytes.
    Without external files it is the file's own SHA-256. With them no single file can have the same bytes and be a
    model, as NUL begins no protobuf field.
    """

    name: str
    data: bytes = field(repr=False)
    external: dict[str, bytes] = field(repr=False)
    sha256: str


def read_model(
    source: Source, locations: Callable[[str, bytes], Iterable[str]], maximum_bytes: int = MAXIMUM_BYTES
) -> ModelFile:
    """Read a model and the external files that `locations(name, data)` finds in it, each once.

    Raises SuspectError for what is larger than maximum_bytes in all, or names weights where they may not be.
    """
    data = source.read(maximum_bytes)
    if not data:
        raise SuspectError(f"{source.name} is empty; copy the file again")
    external: dict[str, bytes] = {}
    left = maximum_bytes - len(data)
    digest = hashlib.sha256(data)
    named = list(locations(source.name, data))
    if len(named) > MAXIMUM_FILES:
        raise SuspectError(f"{source.name} names {len(named)} external files, and at most {MAXIMUM_FILES} are read")
    for location in named:
        if len(location) > MAXIMUM_LOCATION:
            raise SuspectError(f"{source.name} names an external file in {len(location)} characters; export it again")
        parts = PurePosixPath(location).parts
        if not parts or location.startswith("/") or ".." in parts or "\0" in location:
            raise SuspectError(
                f"{source.name} names the external file {location!r}, which is not inside the model's directory"
            )
        external[location] = source.read_beside(location, left)
        left -= len(external[location])
        digest.update(b"\0%s\0%d\0" % (location.encode(), len(external[location])))
        digest.update(external[location])
    return ModelFile(source.name, data, external, digest.hexdigest())


class LocalSource:
    """A file on this machine, shown by its path or another name. FileNotFoundError for a path that does not exist.

    inode: the number of the file that it must be, 0 for any. sparse: a file that is holes for the most part is read.
    """

    def __init__(
        self, path: str | os.PathLike[str], name: str | None = None, inode: int = 0, sparse: bool = False
    ) -> None:
        self.path, self._inode, self._sparse = os.fsdecode(path), inode, sparse
        self.name = (self.path or repr(self.path)) if name is None else name

    def read(self, maximum_bytes: int) -> bytes:
        return _all_of(self.open(maximum_bytes), self.name, maximum_bytes)

    def read_beside(self, location: str, maximum_bytes: int) -> bytes:
        return _all_of(self.open_beside(location, maximum_bytes), self._beside(location), maximum_bytes)

    def open(self, maximum_bytes: int) -> BinaryIO:
        """The file itself, for what is read in parts."""
        try:
            # O_NONBLOCK: a pipe must not hold us up. A path that ends in a slash names the folder itself.
            file = os.path.basename(self.path) or "."
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._folder)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.name} does not exist; give the path of an ONNX file") from None
        except OSError as error:
            raise SuspectError(
                f"{self.name} cannot be read ({error.strerror}); check the path and its permissions"
            ) from None
        if self._inode not in (0, os.fstat(descriptor).st_ino):
            os.close(descriptor)
            raise SuspectError(f"{self.name} is another file than the one that was listed; scan it again")
        return self._checked(descriptor, self.name, maximum_bytes, links_allowed=True)

    def open_beside(self, location: str, maximum_bytes: int) -> BinaryIO:
        """Part by part below the model's directory, no part of it through a symbolic link."""
        name = self._beside(location)
        parts = self._in_cache(location) or PurePosixPath(location).parts
        descriptor = os.dup(self._folder)
        try:
            for depth, part in enumerate(parts, start=1):
                flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if depth == len(parts) else os.O_DIRECTORY)
                above, descriptor = descriptor, os.open(part, flags, dir_fd=descriptor)
                os.close(above)
        except FileNotFoundError:
            os.close(descriptor)
            raise SuspectError(f"{name} holds weights of it and is missing; copy it there") from None
        except (OSError, ValueError):
            os.close(descriptor)
            raise SuspectError(f"{name} must be a regular file and no link; copy the weights there") from None
        return self._checked(descriptor, name, maximum_bytes, links_allowed=False)

    def _beside(self, location: str) -> str:
        return f"the file {location!r} beside {self.name}"

    def _checked(self, descriptor: int, name: str, maximum_bytes: int, links_allowed: bool) -> BinaryIO:
        status = os.fstat(descriptor)
        regular, single = stat.S_ISREG(status.st_mode), status.st_nlink == 1
        if not regular:
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            wrong = f"is {kind}; give an ONNX file, its weights beside it"
        elif not (single or links_allowed):
            wrong = "is also linked from elsewhere; copy the weights beside the model"
        elif status.st_size > maximum_bytes:  # a hole of a terabyte costs its sender nothing
            wrong = f"is larger than the {maximum_bytes} bytes that a model and its weights may have"
        elif (holes := 0 if self._sparse else _holes(descriptor, status.st_size)) > max(HOLES, status.st_size // 2):
            # gigabytes that cost their sender nothing, and us many seconds
            wrong = f"holds no data in {holes} of its {status.st_size} bytes; copy it again, whole"
        else:
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        raise SuspectError(f"{name} {wrong}")

    @cached_property
    def _folder(self) -> int:
        """Opened once: whatever is led elsewhere after that, model and weights are of one folder."""
        descriptor = os.open(os.path.dirname(self.path) or ".", os.O_PATH | os.O_DIRECTORY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _in_cache(self, location: str) -> tuple[str, ...] | None:
        """Where a link in a cache of Hugging Face's leads, part by part from the model's directory; or None.

        There snapshots/REVISION/… are links to ../…/blobs/HASH of the same model. No other link is followed.
        """
        _, found, below = os.path.dirname(os.path.abspath(self.path)).rpartition("/snapshots/")
        try:
            target = os.readlink(location, dir_fd=self._folder) if found else ""
        except (OSError, ValueError):  # no link
            return None
        up = 2 + below.count("/")  # from the model's directory
        blob = _BLOB.fullmatch(target.removeprefix("../" * (up + location.count("/"))))
        return None if blob is None else (*[".."] * up, "blobs", blob[1])


def _all_of(file: BinaryIO, name: str, maximum_bytes: int) -> bytes:
    with file:
        size = min(maximum_bytes, os.fstat(file.fileno()).st_size)
        try:
            data = file.read(size + 1)
        except OSError as error:
            raise SuspectError(f"{name} cannot be read to its end ({error.strerror}); copy it again") from None
    if data is None or len(data) != size:  # None: nothing yet, from a file that waits for its writer
        raise SuspectError(f"{name} changes while it is read; copy it first")
    return data


def _holes(descriptor: int, size: int) -> int:
    """How many bytes of an open file nobody has written; 0 where the file system cannot say."""
    holes = place = 0
    try:
        while size > HOLES and place < size:
            data = os.lseek(descriptor, place, os.SEEK_DATA)
            holes += data - place
            place = os.lseek(descriptor, data, os.SEEK_HOLE)
    except OSError as error:
        holes += size - place if error.errno == errno.ENXIO else 0  # there is no data behind this place
    os.lseek(descriptor, 0, os.SEEK_SET)
    return holes
