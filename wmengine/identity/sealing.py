"""Secrets at rest: a file is 0600 from its first byte, there whole or not at all, and sealed if a passphrase is given.

A sealed file is a JSON envelope around AES-256-GCM under a key that scrypt (RFC 7914) stretches from the passphrase.
The cost of scrypt belongs to the format: an envelope that asks for another (a memory bomb) is refused, not obeyed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import stat
import unicodedata
from pathlib import Path
from typing import Any

from wmengine.errors import WmengineError
from wmengine.identity.canonical import read_json

FORMAT = "wmengine/1"
MAX_FILE_BYTES = 1 << 30

_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 15, 8, 1  # 32 MiB and about a tenth of a second
_COST = {"kdf": "scrypt", "n": _SCRYPT_N, "p": _SCRYPT_P, "r": _SCRYPT_R}
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 12, 16
_FIELDS = {"ciphertext", "format", "kind", "nonce", "salt", *_COST}


def seal(payload: bytes, passphrase: str) -> bytes:
    """The envelope of `payload`; a fresh salt and nonce each time. Raises ValueError for an empty passphrase."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    header = {"format": FORMAT, "kind": "sealed", "nonce": nonce.hex(), "salt": salt.hex(), **_COST}
    ciphertext = AESGCM(_stretch(passphrase, salt)).encrypt(nonce, payload, _encode(header))
    return _encode({**header, "ciphertext": base64.b64encode(ciphertext).decode("ascii")})


def unseal(blob: bytes, passphrase: str) -> bytes:
    """The payload of an envelope. Raises ValueError: damaged, another version's, or not sealed with this passphrase."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    envelope = _envelope(blob)
    if envelope is None:
        raise ValueError("is not sealed")
    if envelope.get("format") != FORMAT:
        found = envelope.get("format")
        raise ValueError(f"has format {found!r} and this wmengine reads {FORMAT!r}; use the one that made it")
    try:
        salt, nonce = bytes.fromhex(envelope["salt"]), bytes.fromhex(envelope["nonce"])
        ciphertext = base64.b64decode(envelope.pop("ciphertext"), validate=True)
        whole = len(salt) == _SALT_BYTES and len(nonce) == _NONCE_BYTES and len(ciphertext) >= _TAG_BYTES
        header = _encode(envelope)
    except (KeyError, TypeError, ValueError, binascii.Error):
        whole = False
    if not whole or set(envelope) != _FIELDS - {"ciphertext"} or any(envelope[name] != _COST[name] for name in _COST):
        raise ValueError("is damaged (its envelope is not complete); take it from a backup")
    try:
        return AESGCM(_stretch(passphrase, salt)).decrypt(nonce, ciphertext, header)
    except InvalidTag:
        raise ValueError("does not open with this passphrase; give the one it was sealed with") from None


def is_sealed(blob: bytes) -> bool:
    """Whether these bytes are an envelope made by `seal` (of any version)."""
    return _envelope(blob) is not None


def _envelope(blob: bytes) -> dict[str, Any] | None:
    if not blob.startswith(b"{"):
        return None
    try:
        envelope = read_json(blob)
    except (ValueError, RecursionError):
        return None
    return envelope if isinstance(envelope, dict) and envelope.get("kind") == "sealed" else None


def _encode(envelope: dict[str, Any]) -> bytes:
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode("ascii")


def _stretch(passphrase: str, salt: bytes) -> bytes:
    if not isinstance(passphrase, str):
        raise TypeError(f"a passphrase is a str, not {type(passphrase).__name__}")
    if not passphrase:
        raise ValueError("an empty passphrase seals nothing; give a longer one, or none")
    # NFC: the same accented letter typed on two systems is the same passphrase.
    try:
        secret = unicodedata.normalize("NFC", passphrase).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the passphrase holds half a surrogate pair, which is no character") from None
    return hashlib.scrypt(secret, salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, maxmem=64 << 20, dklen=32)


def read_file(
    path: str | os.PathLike[str],
    what: str,
    error: type[WmengineError],
    private: bool = False,
    maximum_bytes: int = MAX_FILE_BYTES,
) -> bytes:
    """The bytes of one regular file. Raises `error`: missing, not a file, too large, or (private) open to other users.

    The checks look at the open file, not at the path, so what is checked is what is read.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: a FIFO without a writer must be an error, not a hang.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{name} is not a file; give the path of a {what}")
            if private and os.name == "posix" and status.st_mode & 0o077:
                raise error(
                    f"{name} can be read by other users; if it is a {what}, make it yours alone with: chmod 600 {name}"
                )
            data = file.read(min(status.st_size, maximum_bytes) + 1)  # which takes as much memory at once
    except FileNotFoundError:
        raise error(f"{name} does not exist; give the path of a {what}") from None
    except IsADirectoryError:
        raise error(f"{name} is not a file; give the path of a {what}") from None
    except (OSError, ValueError) as cause:
        if isinstance(cause, WmengineError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{name} cannot be read ({reason}); give the path of a {what}") from None
    if len(data) > maximum_bytes:
        raise error(f"{name} is larger than {maximum_bytes >> 10} KiB; give the path of a {what}")
    return data


def write_file(path: str | os.PathLike[str], data: bytes, error: type[WmengineError], overwrite: bool = False) -> None:
    """Writes `data` beside `path` with mode 0600 and then gives it that name in one step. Raises `error`."""
    target = Path(path)
    if not target.name:
        raise error(f"{os.fspath(path)!r} is no name of a file; choose one")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            if overwrite:
                os.replace(draft, target)
            else:
                # A hard link fails where the name is taken; a rename would replace what is there.
                os.link(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        raise error(f"{target} exists already and is not overwritten; choose another name") from None
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{target} cannot be written ({reason}); choose a folder that exists and is yours") from None
