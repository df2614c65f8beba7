"""The owner's secret: 256 bits in a file that only he can read, whole or not at all.

All that a watermark is made of comes from one hash of (secret, identity, message), so none of it can be chosen to fit a
model: see `subkeys`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from typing import Any, NoReturn

from wmengine.errors import KeyFileError
from wmengine.identity.canonical import canonical_json, check_name, read_json
from wmengine.identity.sealing import FORMAT, is_sealed, read_file, seal, unseal, write_file

SECRET_BYTES = SUBKEY_BYTES = 32
FILE_BYTES = 1 << 16  # of a key's, sealed or not


@dataclass(frozen=True)
class Key:
    """An owner's 256-bit secret, which its repr never shows. `Key.generate(owner="ACME Vision")` makes one."""

    owner: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "owner", check_name("owner", self.owner))
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
        data = read_file(path, "key file", KeyFileError, private=True, maximum_bytes=FILE_BYTES)
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
            document = read_json(data)
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
        """The secret's public hash, 64 hex digits, safe to publish: it tells keys apart.

        It dates no mark: names and parameters could still be tried under it. A watermark's commitment does.
        """
        content = canonical_json({"owner": self.owner, "secret": self.secret.hex()})
        return hashlib.sha256(b"wmengine/1/key-commitment\0" + content).hexdigest()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled, lest its secret end in a checkpoint; use save and load")

    def __deepcopy__(self, memo: dict[int, Any]) -> Key:
        return self
