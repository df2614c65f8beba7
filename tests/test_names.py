"""Names: what people read as one name is one name, and nothing that they cannot see tells two names apart."""

import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmengine.identity.canonical import check_name
from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec

INVISIBLE = {
    "zero width space": "\u200b",
    "zero width joiner": "\u200d",
    "right to left override": "\u202e",
    "right to left isolate": "\u2067",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "variation selector": "\ufe0f",
    "variation selector 17": "\U000e0100",
    "Mongolian variation selector": "\u180b",
    "Hangul filler": "\u3164",
    "half width Hangul filler": "\uffa0",
    "grapheme joiner": "\u034f",
    "Khmer inherent vowel": "\u17b4",
    "blank of Braille": "\u2800",
    "tag": "\U000e0041",
    "no-break space": "\u00a0",
    "line separator": "\u2028",
    "newline": "\n",
    "NUL": "\0",
    "half of a surrogate pair": "\ud800",
    "private use": "\ue000",
    "not assigned": "\U000e0fff",
}


def mark(
    owner: str = "ACME", name: str = "detector", message: str | None = None, first_class: str = "cat"
) -> Watermark:
    task = Task({"input": InputSpec((1, 4, 4), "float32")}, 2, [[0.0, 1.0]], [first_class, "dog"])
    preset = scheme("adi", count=3)
    return Watermark.create(Key(owner, bytes(32)), preset, preset.describe(task, name), message=message)


MAKERS: dict[str, Callable[[str], Watermark]] = {
    "owner": lambda text: mark(owner=text),
    "name": lambda text: mark(name=text),
    "message": lambda text: mark(message=text),
    "a class name": lambda text: mark(first_class=text),
}


@pytest.mark.parametrize("what", MAKERS)
@pytest.mark.parametrize("character", INVISIBLE.values(), ids=list(INVISIBLE))
def test_what_nobody_sees_is_refused_in_every_name(what: str, character: str) -> None:
    code = character.encode("unicode_escape").decode()
    with pytest.raises(ValueError, match="must be of visible characters, and it holds ") as raised:
        MAKERS[what](f"do{character}g")
    assert str(raised.value).endswith(code)
    assert what in str(raised.value)


@pytest.mark.parametrize("what", MAKERS)
def test_two_spellings_of_one_name_make_one_mark(what: str) -> None:
    composed, decomposed = MAKERS[what]("Caf\u00e9"), MAKERS[what]("Cafe\u0301")
    assert composed.commitment == decomposed.commitment
    assert composed.commitment != MAKERS[what]("Cafe").commitment


@pytest.mark.parametrize("what", MAKERS)
@pytest.mark.parametrize("text", ["", " ", "dog ", " dog", "x" * 201])
def test_a_name_is_text_of_sensible_length_without_blanks_at_its_ends(what: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must be (text without blanks|at most 200 characters)"):
        MAKERS[what](text)


@pytest.mark.parametrize("what", MAKERS)
@pytest.mark.parametrize("value", [7, b"dog", ["dog"]])
def test_a_name_is_a_str(what: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{what} must be a str, and it is {type(value).__name__}"):
        MAKERS[what](value)  # type: ignore[arg-type]


def test_an_absent_message_is_not_an_empty_one() -> None:
    assert mark(message=None).message is None
    with pytest.raises(
        ValueError, match="message must be text without blanks at its ends or two in a row, and it is ''"
    ):
        mark(message="")


def test_classes_of_one_name_are_refused_however_they_are_spelled() -> None:
    task = Task({"input": InputSpec((1, 4, 4), "float32")}, 2, [[0.0, 1.0]], ["Caf\u00e9", "Cafe\u0301"])
    with pytest.raises(ValueError, match="class_names must be none, or one name for each of the 2 classes, all diff"):
        scheme("adi").describe(task, "detector")


@pytest.mark.parametrize("field", ["owner", "message"])
def test_a_mark_holds_names_in_one_spelling_only(field: str) -> None:
    with pytest.raises(ValueError, match=f"the {field} 'Cafe\u0301' is not in NFC"):
        replace(mark(), **{field: "Cafe\u0301"})


@given(st.text(max_size=30))
def test_a_name_that_is_taken_is_taken_as_it_stands(text: str) -> None:
    try:
        name = check_name("name", text)
    except ValueError:
        return
    assert check_name("name", name) == name == unicodedata.normalize("NFC", text)
    assert name.isprintable()
