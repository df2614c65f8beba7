"""Large material, which lies in a file of its own beside the `.wm` files of the marks that are made of it.

The file is called by what it holds, so that no mark's pool is ever replaced by another, marks of one pool share it, and
a `.wm` may be renamed. Where the mark is sealed its pool is too, under the mark's own salt, which opens with the mark.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import save as serialize

from wmengine.errors import WatermarkError
from wmengine.identity.canonical import canonical_digest
from wmengine.identity.sealing import is_sealed, read_file, seal, unseal, write_file

MOST_INSIDE = 72 << 20  # bytes of material that a .wm file holds itself


class PoolError(WatermarkError):
    """Of the pool's file, which it names."""


def write_pool(path: str | os.PathLike[str], material: Mapping[str, NDArray[Any]], digests: Any, salt: str) -> None:
    """Beside the .wm at `path`; salt: of a sealed mark, "" of another. Raises PoolError."""
    data = serialize(dict(material))
    file = os.path.join(os.path.dirname(os.fspath(path)), _name_of(digests, salt))
    write_file(file, seal(data, salt) if salt else data, PoolError, overwrite=True)  # by the same, if by anything


def read_pool(path: str | os.PathLike[str], digests: Any, salt: str) -> bytes:
    """What `write_pool` wrote beside a .wm, or beside the file that it is a link to. Raises PoolError."""
    name = _name_of(digests, salt)
    folders = dict.fromkeys(os.path.dirname(each) for each in (os.fspath(path), os.path.realpath(path)))
    there = [file for folder in folders if os.path.lexists(file := os.path.join(folder, name))]
    if not there:
        raise PoolError(
            f"{os.fspath(path)} needs {name} beside it, which holds what it asks; put it back, or take both from a "
            "backup"
        )
    data = read_file(there[0], "watermark's pool", PoolError, private=True)
    try:
        return unseal(data, salt) if salt and is_sealed(data) else data
    except ValueError:
        raise PoolError(f"{there[0]} is damaged; take it from a backup") from None


def _name_of(digests: Any, salt: str) -> str:
    return f"{canonical_digest({'material': digests, 'salt': salt})[:16]}.pool"
