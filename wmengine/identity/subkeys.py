"""What a secret gives to one mark: a family of subkeys for its geometry, one for its symbols, and draws from them.

The identity of a mark is everything that scoring reads and the key does not draw: owner, preset with version, and
parameters, which hold digests of all material. Geometry (projections, triggers) follows from the identity; symbols
from the identity and the message. So a hundred thousand customers of one model share one observation of a suspect, and
nobody can choose material with the symbols in hand: other material, other symbols.
"""

from __future__ import annotations

import hashlib
import hmac
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.canonical import canonical_json
from wmengine.identity.key import SUBKEY_BYTES, Key

_CONTEXT = b"wmengine/1/"
MESSAGES = "symbols", "commitment", "record"  # the families that the message enters


@dataclass(frozen=True)
class Subkeys:
    """Subkeys of one mark. scheme: the preset's name and version, "sketch/1"; message: None where there is none."""

    key: Key
    scheme: str
    parameters: Mapping[str, Any]
    message: str | None = None

    @cached_property
    def identity(self) -> str:
        """64 hex digits that stand for owner, scheme and parameters; hashed once, however many subkeys there are."""
        content = {"owner": self.key.owner, "parameters": dict(self.parameters), "scheme": self.scheme}
        return hashlib.sha256(_CONTEXT + b"identity\0" + canonical_json(content)).hexdigest()

    def geometry(self, purpose: str, place: str = "") -> bytes:
        """32 bytes for a purpose ("projection", "triggers") and a place, such as a weight's number in digits."""
        return self._derive("geometry", purpose, place)

    @property
    def symbols(self) -> bytes:
        """32 bytes from which bits or labels are drawn."""
        return self._derive("symbols", "", "")

    @property
    def salt(self) -> bytes:
        """32 bytes that blind the mark's commitment."""
        return self._derive("commitment", "", "")

    def record(self, content: Mapping[str, Any]) -> str:
        """The key holder's word on what no derivation fixes (a date, a measurement): HMAC-SHA256, 64 hex digits."""
        return hmac.digest(self._derive("record", "", ""), canonical_json(dict(content)), "sha256").hex()

    def _derive(self, family: str, purpose: str, place: str) -> bytes:
        info: dict[str, Any] = {"family": family, "identity": self.identity, "place": place, "purpose": purpose}
        if self.message is not None and family in MESSAGES:  # an absent message is not an empty one
            info["message"] = self.message
        return hkdf_sha256(self.key.secret, _CONTEXT + canonical_json(info), SUBKEY_BYTES)


def hkdf_sha256(secret: bytes, info: bytes, length: int, salt: bytes = b"") -> bytes:
    """HKDF with SHA-256 (RFC 5869): extract, then expand to `length` <= 8160 bytes."""
    if not 0 < length <= 255 * 32:
        raise ValueError(f"HKDF-SHA256 gives 1 to 8160 bytes, not {length}")
    pseudorandom_key = hmac.digest(salt or bytes(32), secret, "sha256")
    output = block = b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudorandom_key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


def philox_key(subkey: bytes) -> int:
    """The 64-bit key of the counter-based generator: the subkey's first 8 bytes, little endian."""
    return int.from_bytes(_subkey(subkey)[:8], "little")


def keyed_bits(subkey: bytes, count: int) -> NDArray[np.uint8]:
    """`count` iid uniform bits, uint8 in {0, 1}: bit i is bit i % 8 of byte i // 8 of SHAKE-256(subkey)."""
    count = _count(count)
    stream = hashlib.shake_256(_subkey(subkey)).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=count, bitorder="little")


def keyed_labels(subkey: bytes, count: int, classes: int) -> NDArray[np.int64]:
    """`count` iid uniform labels, int64 in [0, classes), 2 <= classes <= 2^32.

    SHAKE-256(subkey) read as little-endian uint32 words; a word at or beyond the largest multiple of `classes` is
    skipped (a plain remainder would favour low labels), and the others give word % classes, in order.
    """
    count, classes = _count(count), operator.index(classes)
    if not 2 <= classes <= 1 << 32:
        raise ValueError(f"labels need 2 to 2^32 classes, not {classes}")
    limit = (1 << 32) - (1 << 32) % classes
    words = count + 64
    while True:
        # A longer digest of SHAKE-256 begins with the shorter one, so asking again changes no label.
        stream = np.frombuffer(hashlib.shake_256(_subkey(subkey)).digest(4 * words), dtype="<u4").astype(np.int64)
        accepted = stream[stream < limit]
        if len(accepted) >= count:
            return accepted[:count] % classes
        words *= 2


def _subkey(subkey: bytes) -> bytes:
    if not isinstance(subkey, bytes) or len(subkey) != SUBKEY_BYTES:
        raise ValueError(f"a subkey is {SUBKEY_BYTES} bytes, as Subkeys gives")
    return subkey


def _count(count: int) -> int:
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count must not be negative, and it is {count}")
    return count
