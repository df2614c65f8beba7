"""The owner's secret, and all that is derived from it: subkeys by HKDF, generator keys, and symbols by SHAKE-256.

All that a watermark is made of comes from one hash of (secret, owner, scheme, parameters), so none of it can be chosen
to fit a model. Philox, whose key space is 2^64, only makes projections and triggers; symbols come from SHAKE-256.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import operator
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import KeyFileError
from wmengine.sealing import FORMAT, is_sealed, read_file, seal, unseal, write_file

SECRET_BYTES = 32
MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class Key:
    """An owner's 256-bit secret, which its repr never shows. `Key.generate(owner="ACME Vision")` makes one."""

    owner: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_name("owner", self.owner)
        if not isinstance(self.secret, bytes) or len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a key's secret is {SECRET_BYTES} bytes; make a key with Key.generate")

    @classmethod
    def generate(cls, owner: str) -> Key:
        """A new key from the operating system's randomness."""
        return cls(owner, secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> Key:
        """Reads a key file. Raises KeyFileError: missing, readable by others, damaged, wrong passphrase or version."""
        name = os.fspath(path)
        data = read_file(path, "key file", KeyFileError, private=True)
        if is_sealed(data):
            if passphrase is None:
                raise KeyFileError(f"{name} is sealed; give its passphrase")
            try:
                data = unseal(data, passphrase)
            except ValueError as cause:
                raise KeyFileError(f"{name} {cause}") from None
        return cls._from_document(name, data)

    @classmethod
    def _from_document(cls, name: str, data: bytes) -> Key:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("format"), str):
            raise KeyFileError(f"{name} is not a key file; give one made by wmengine keygen")
        if document["format"] != FORMAT:
            raise KeyFileError(
                f"{name} has format {document['format']!r} and this wmengine reads {FORMAT!r}; use the one that made it"
            )
        if document.get("kind") != "key":
            raise KeyFileError(f"{name} holds a {document.get('kind')!r}, not a key; give one made by wmengine keygen")
        unknown = sorted(document.keys() - {"commitment", "format", "kind", "owner", "secret"})
        if unknown:
            raise KeyFileError(f"{name} has an unknown field {unknown[0]!r}; use the wmengine that made it")
        try:
            key = cls(document["owner"], bytes.fromhex(document["secret"]))
        except (KeyError, TypeError, ValueError):
            raise KeyFileError(f"{name} is damaged (its owner or secret is not whole); take it from a backup") from None
        if document.get("commitment") != key.commitment:
            raise KeyFileError(f"{name} is damaged (its secret does not match its commitment); take it from a backup")
        return key

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Writes a key file (mode 0600), sealed if a passphrase is given. Raises KeyFileError where the file exists."""
        document = {
            "commitment": self.commitment,
            "format": FORMAT,
            "kind": "key",
            "owner": self.owner,
            "secret": self.secret.hex(),
        }
        data = canonical_json(document)
        write_file(path, data if passphrase is None else seal(data, passphrase), KeyFileError)

    @property
    def commitment(self) -> str:
        """The secret's public hash, 64 hex digits: safe to publish, and the older the better."""
        content = canonical_json({"owner": self.owner, "secret": self.secret.hex()})
        return hashlib.sha256(b"wmengine/1/key-commitment\0" + content).hexdigest()

    def subkey(self, purpose: str, scheme: str, parameters: Mapping[str, Any], carrier: str = "") -> bytes:
        """32 bytes for one purpose of one mark: HKDF-SHA256, with all that the mark depends on as its info."""
        info = canonical_json(
            {
                "carrier": carrier,
                "owner": self.owner,
                "parameters": dict(parameters),
                "purpose": purpose,
                "scheme": scheme,
            }
        )
        return hkdf_sha256(self.secret, b"wmengine/1/" + info, SECRET_BYTES)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled, lest its secret end in a checkpoint; use save and load")

    def __deepcopy__(self, memo: dict[int, Any]) -> Key:
        return self


def check_name(what: str, value: object) -> str:
    """`value` if it can name an owner or a model: a printable str of 1 to 200 characters, no blanks at its ends."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, and it is {type(value).__name__}")
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError(f"{what} must be printable text without blanks at its ends, and it is {value[:40]!r}")
    if len(value) > MAX_NAME_LENGTH:
        raise ValueError(f"{what} must be at most {MAX_NAME_LENGTH} characters long, and it has {len(value)}")
    return value


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value that is hashed: JSON in ASCII, keys sorted, no blanks; only dict, list, str and int.

    A float has many spellings and True equals 1, so both raise TypeError, naming where they stand.
    """
    _require_canonical(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _require_canonical(value: Any, place: str) -> None:
    if type(value) is dict:
        for name, member in value.items():
            if type(name) is not str:
                raise TypeError(f"{place} has the key {name!r}, and only str keys have one spelling")
            _require_canonical(member, f"{place}[{name!r}]")
    elif type(value) is list:
        for index, member in enumerate(value):
            _require_canonical(member, f"{place}[{index}]")
    elif type(value) not in (int, str):
        raise TypeError(f"{place} is a {type(value).__name__}, and only dict, list, str and int have one spelling")


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
    if not isinstance(subkey, bytes) or len(subkey) != SECRET_BYTES:
        raise ValueError(f"a subkey is {SECRET_BYTES} bytes, as Key.subkey gives")
    return subkey


def _count(count: int) -> int:
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count must not be negative, and it is {count}")
    return count
