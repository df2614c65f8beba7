"""The one spelling of what is hashed: names in NFC without invisible characters, and JSON of integers and strings."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any

MAX_NAME_LENGTH = 200
# Characters that show nothing, or look like another text: controls, formats, surrogates, private use, unassigned,
# separators other than the blank, and the fillers that Unicode counts among the letters, marks and symbols.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5\U00016fe4\U0001d159\U00013441\U00013442"


def check_name(what: str, value: object) -> str:
    """`value` in NFC if it can name an owner, a model, a class or a customer.

    A str of 1 to 200 visible characters, no blanks at its ends and never two in a row, as pages show one. Raises
    TypeError or ValueError, naming `what`.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, and it is {type(value).__name__}")
    name = unicodedata.normalize("NFC", value)
    if not name or name != name.strip() or "  " in name or not name.isprintable():
        raise ValueError(
            f"{what} must be printable text without blanks at its ends or two in a row, and it is {value[:40]!r}"
        )
    hidden = [c for c in name if unicodedata.category(c) in _INVISIBLE or c in _FILLERS or _selects(c)]
    if hidden:
        raise ValueError(f"{what} holds the invisible character {hidden[0].encode('unicode_escape').decode()}")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{what} must be at most {MAX_NAME_LENGTH} characters long, and it has {len(name)}")
    return name


def _selects(character: str) -> bool:
    """Whether it is a variation selector, which changes at most how the character before it looks."""
    return (
        "\ufe00" <= character <= "\ufe0f"
        or "\u180b" <= character <= "\u180f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value that is hashed: JSON in ASCII, keys sorted, no blanks; only dict, list, str and int.

    A float has many spellings and True equals 1, so both raise TypeError, naming where they stand.
    """
    _require_canonical(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


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
