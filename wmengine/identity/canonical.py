"""The one spelling of what is hashed: names in NFC without invisible characters, and JSON of integers and strings."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any

MAX_NAME_LENGTH = 200
MAX_VALUES = 1 << 22  # of a file of ours: an entry for each class or weight
# What shows nothing though Unicode counts it among letters, marks and symbols: fillers, vowels that are never written,
# the grapheme joiner, and what selects the look of the character before. (Formats and the like are not printable.)
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U00016fe4\U0001d159\U00013441\U00013442"
_SELECTORS = (("\u180b", "\u180f"), ("\ufe00", "\ufe0f"), ("\U000e0100", "\U000e01ef"))


def check_name(what: str, value: object) -> str:
    """`value` in NFC if it can name an owner, a model, a class or a customer.

    A str of 1 to 200 visible characters, no blanks at its ends and never two in a row, as pages show one. Raises
    TypeError or ValueError, naming `what`.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, and it is {type(value).__name__}")
    name = unicodedata.normalize("NFC", value)
    if not name or name != name.strip(" ") or "  " in name:
        raise ValueError(f"{what} must be text without blanks at its ends or two in a row, and it is {value[:40]!r}")
    for character in name:
        if not _shows(character):
            code = character.encode("unicode_escape").decode()
            raise ValueError(f"{what} must be of visible characters, and it holds {code}")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{what} must be at most {MAX_NAME_LENGTH} characters long, and it has {len(name)}")
    return name


def _shows(character: str) -> bool:
    unseen = character in _UNSEEN or any(first <= character <= last for first, last in _SELECTORS)
    return character.isprintable() and not unseen


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value that is hashed: JSON in ASCII, keys sorted, no blanks; only dict, list, str and int.

    A float has many spellings and True equals 1, so both raise TypeError, naming where they stand.
    """
    _require_canonical(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def read_json(text: bytes | str) -> Any:
    """JSON of at most MAX_VALUES values: a few bytes of `[[],[],…` take thirty times as much memory once they are read.

    Raises ValueError, or RecursionError for what is nested too deeply.
    """
    data = text.encode() if isinstance(text, str) else text
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values")
    return json.loads(data)


def canonical_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


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
