"""Facts: codes with values for machines, one sentence each for people, and no call in the package that has none."""

import ast
from pathlib import Path
from string import Formatter

import pytest

import wmengine
from wmengine.facts import SENTENCES, Fact, fact

NOTED = [
    (f"{path.name}:{call.lineno}", call.args[0].value, {keyword.arg for keyword in call.keywords})
    for path in sorted(Path(wmengine.__file__).parent.rglob("*.py"))
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(call, ast.Call)
    and isinstance(call.func, ast.Name)
    and call.func.id == "fact"
    and isinstance(call.args[0], ast.Constant)
]


def values_of(code: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(SENTENCES[code]) if name}


@pytest.mark.parametrize(("place", "code", "values"), NOTED, ids=[place for place, *_ in NOTED])
def test_what_is_noted_has_a_sentence_that_names_all_its_values(place: str, code: str, values: set[str]) -> None:
    assert values == values_of(code)


def test_a_fact_reads_as_its_sentence() -> None:
    found = fact("carriers", found=2, carriers=3)
    assert str(found) == "2 of 3 carriers matched to the suspect's tensors by shape and order"
    assert (found.code, found.values) == ("carriers", {"found": 2, "carriers": 3})


def test_equal_facts_are_one_in_a_set_whatever_the_order_of_their_values() -> None:
    first, second = fact("carriers", found=2, carriers=3), fact("carriers", carriers=3, found=2)
    assert len({first, second, Fact("no_carrier")}) == 2


def test_a_fact_that_cannot_be_said_is_refused_when_it_is_noted() -> None:
    with pytest.raises(KeyError, match="weather"):
        fact("weather")
    with pytest.raises(KeyError, match="carriers"):
        fact("carriers", found=2)
