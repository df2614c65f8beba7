"""A checkpoint as a suspect: the weights of a safetensors or GGUF file or of a torch state dict, which hold no graph.

Nothing of it is run: names and places are read from the header of a safetensors or GGUF file or from the pickle of a
torch archive, by a machine that can call nothing, and of the numbers only those of weights that a mark's carriers could
be, one weight at a time, however large the file is. No graph tells the order of execution: both the order of the file
and that of the names, numbers in them by their size, are tried and paid for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask, SuspectError, printable
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import Adapter, Range
from wmengine.suspects.base import Answers, Inputs, Signature, Tensor, Weight, one_line
from wmengine.suspects.checkpoint_files import MAXIMUM_HEADER, UnreadableError, begins_as_checkpoint, entries_of
from wmengine.suspects.checkpoint_weights import Entry, weights_of
from wmengine.suspects.model_file import LocalSource

MAXIMUM_BYTES = 64 << 30  # all are hashed
MAXIMUM_FILES = 1000
_BLOCK = 1 << 22
_INDEX = ".index.json"
# What they are called; torch's are called anything.
SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".bin", ".ckpt", _INDEX)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file begins as safetensors, GGUF or a torch archive do, or is an index of such files.

    One that is named .onnx is none: a model can begin with any bytes, as numbers that ONNX Runtime does not know.
    """
    try:
        if os.fsdecode(path).lower().endswith(".onnx") or not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb", opener=_at_once) as file:
            return is_index(path) or begins_as_checkpoint(file.read(9))
    except OSError:
        return False


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file by its name is an index, and so speaks for files beside it."""
    return os.fsdecode(path).lower().endswith(_INDEX)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what has just become a pipe must not hold us up


class CheckpointSuspect:
    """A file of safetensors or GGUF, or what torch.save wrote: a state dict, a dict that has one in it, or a module; or
    the index (.index.json) of several such files beside it.

    It shows its weights and gives no answers. Raises FileNotFoundError for a path that does not exist, SuspectError for
    what is no such file.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, source: str | os.PathLike[str] | LocalSource) -> None:
        if not isinstance(source, LocalSource):
            source = LocalSource(source, sparse=True)
        self.name = source.name
        self.facts: list[Fact] = []
        self._files = [source.open(MAXIMUM_BYTES)]
        self._entries: dict[str, Entry] = {}
        try:
            shards = _shards(self._files[0]) if is_index(source.path) else []
            for shard in shards:
                self._files.append(source.open_beside(shard, MAXIMUM_BYTES))
            self._status = [*map(_status, self._files)]
            if sum(size for size, _ in self._status) > MAXIMUM_BYTES:
                raise UnreadableError(f"it is larger than {MAXIMUM_BYTES} bytes")
            for file in self._files[1:] if shards else self._files:
                self._entries.update(entries_of(file))
            if not self._entries:
                raise UnreadableError("no tensor of floating point is in it")
            self.sha256: str | None = _digest(dict(zip(["", *shards], self._files, strict=True)))
        except Exception as error:  # a hostile file can fail anywhere in there
            self.close()
            raise SuspectError(f"{self.name} is no checkpoint that can be read ({one_line(error)})") from None

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        """The weights in the order of the file, each with its place in the order of names."""
        weights = weights_of(self._entries)
        kinds = [each.kind for each in weights]
        self.facts = [
            fact("stored_as", count=kinds.count(kind), of=len(kinds), kind=kind)
            for kind in dict.fromkeys(kinds)
            if kind != "float32"
        ]
        self.facts.append(fact("no_graph"))
        by_name = sorted(range(len(weights)), key=lambda number: _by_size(weights[number].name))
        places = {number: place for place, number in enumerate(by_name)}
        return [
            Tensor.unread(each.shape, printable(each.name), partial(self._read, each.read), places[number])
            for number, each in enumerate(weights)
        ]

    def _read(self, read: Callable[[], Weight]) -> Weight:
        try:
            found = read()
        except Exception as error:  # as above
            raise SuspectError(f"{self.name} has a weight that cannot be read ({one_line(error)})") from None
        if [*map(_status, self._files)] != self._status:
            raise SuspectError(f"{self.name} changes while it is read; verify a copy of it")
        return found

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        self._refuse()

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        self._refuse()

    def limit(self, inputs: Inputs, count: int) -> int:
        return count

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        self._refuse()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _refuse(self) -> NoReturn:
        raise OtherTask(f"{self.name} holds weights and no network that could answer; export it to ONNX")


def _by_size(name: str) -> list[tuple[int, str]]:
    """A name's parts, numbers in it by their size: layer2 before layer10."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)  # every second one is a number
    return [(int(part[:18]), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]


def _status(file: Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _shards(index: Any) -> list[str]:
    """The names of the files that hold the tensors, in the order in which an index names them."""
    names = list(dict.fromkeys(json.loads(index.read(MAXIMUM_HEADER))["weight_map"].values()))
    if len(names) > MAXIMUM_FILES or any(name in ("", ".", "..") or "/" in name for name in names):
        raise UnreadableError("it names files that are not beside it, or too many")
    return names


def _digest(files: Mapping[str, Any]) -> str:
    """SHA-256 of a file, and behind an index of NUL, name, NUL, length in digits, NUL, bytes for each file it names."""
    digest = hashlib.sha256()
    for name, file in files.items():
        if name:
            digest.update(b"\0%s\0%d\0" % (name.encode(), _status(file)[0]))
        file.seek(0)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
