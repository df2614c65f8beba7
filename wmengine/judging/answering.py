"""What a suspect answers, checked, and as the source of a mark reads it: a row for each symbol."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import OtherTask, SuspectError
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Interprets
from wmengine.suspects.answers import highest
from wmengine.suspects.base import Answers, Inputs, Suspect, one_line, rows_of

Labels = NDArray[np.int64]


def reader_of(mark: Watermark) -> Interprets | None:
    """The source of a mark, where it alone can read the answers."""
    source = mark.preset.source
    return cast(Interprets, source) if offers(type(source), Interprets) else None


@cache  # what a protocol asks takes longer than most of what is done for a look
def offers(source: type[Any], protocol: type[Any]) -> bool:
    """Whether sources of this type have what a protocol asks."""
    return issubclass(source, protocol)


def members_of(mark: Watermark) -> int:
    """How many inputs are put for one symbol."""
    reader = reader_of(mark)
    return reader.members(mark.parameters) if reader else 1


def width_of(mark: Watermark) -> int:
    """How many scores the suspect is asked for."""
    reader = reader_of(mark)
    return reader.width(mark.parameters) if reader else classes_of(mark)


def classes_of(mark: Watermark) -> int:
    """Below which a mark's symbols are."""
    return mark.preset.symbols.classes(mark.parameters)


def interpreted(mark: Watermark, symbols: Labels, answers: Answers) -> Answers:
    """Answers to the questions of these symbols, one row for each."""
    reader = reader_of(mark)
    return reader.interpret(mark, symbols, answers) if reader else answers


def answers_of(suspect: Suspect, inputs: Inputs, width: int) -> Answers:
    """What the suspect answers. Whatever else it does, and an answer that does not fit, raises SuspectError."""
    count = rows_of(inputs)
    try:
        answers = suspect.answer(inputs, width)
        shape = answers.values.shape
    except SuspectError:
        raise
    except Exception as error:
        raise SuspectError(f"{suspect.name} cannot be asked ({one_line(error)})") from None
    if shape[:1] != (count,):
        raise SuspectError(f"{suspect.name} answers {count} inputs with answers {list(shape)}")
    if answers.kind == "scores" and shape[1:] != (width,):
        raise OtherTask(
            f"{suspect.name} answers with {' x '.join(map(str, shape[1:]))} classes and the watermark has "
            f"{width}; verify a suspect of the same task"
        )
    return answers


def named_by(answers: Answers) -> Labels:
    """The classes [n, R] that answers name, ABSTAINED where there is none; of scores the highest, the first."""
    if answers.kind == "scores":
        return highest(answers.values)[:, None]
    return answers.values.reshape(len(answers), -1)


def rows_between(answers: Answers, start: int, stop: int) -> Answers:
    if start == 0 and stop == len(answers):
        return answers

    def part(reasons: Mapping[int, str]) -> dict[int, str]:
        return {row - start: why for row, why in reasons.items() if start <= row < stop}

    values = answers.values[start:stop]
    return Answers(answers.kind, values, part(answers.unasked), part(answers.refused), answers.names)
