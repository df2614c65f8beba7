"""Services with a JSON of their own: what a request looks like and where its answer holds scores or labels.

{"body": {"images": "${inputs}"}, "encoding": "png", "answers": "/predictions", "scores": "/probabilities"}
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.answers import ABSTAINED, Outputs
from wmengine.suspects.endpoint.model import class_of
from wmengine.suspects.endpoint.patience import Refused

ONE, MANY = "${input}", "${inputs}"


@dataclass(frozen=True)
class Template:
    """What a request looks like, and where its answer is.

    body: any JSON in which "${inputs}" stands for the list of a batch, or "${input}" for one. encoding: "list", "png"
    or "bytes". answers: a JSON pointer (RFC 6901) to the list with one entry for each input; scores or label: a
    pointer within each entry. With "${input}" the whole answer is the entry. Raises ValueError for what is no template.
    """

    body: Any = None
    method: str = "POST"
    encoding: str = "list"
    answers: str | None = None
    scores: str | None = None
    label: str | None = None

    @staticmethod
    def of(request: Mapping[str, Any]) -> Template:
        """The template of a JSON object. Raises ValueError for an unknown field too."""
        known = [field.name for field in fields(Template)]
        for name in request:
            if name not in known:
                raise ValueError(f"a request has no field {name!r}; it has {', '.join(known)}")
        return Template(**request)

    def __post_init__(self) -> None:
        if self.method not in ("POST", "PUT"):
            raise ValueError("the request's method must be POST or PUT")
        if self.encoding not in _ENCODE:
            raise ValueError(f"the request's encoding must be one of {', '.join(_ENCODE)}")
        if _count(self.body, ONE) + _count(self.body, MANY) != 1:
            raise ValueError(f'the request\'s body must hold "{ONE}" or "{MANY}" once, as a value of its own')
        if (self.scores is None) == (self.label is None):
            raise ValueError("a request needs either scores or label: the pointer to what each input is answered")
        for name in ("answers", "scores", "label"):
            pointer = getattr(self, name) or ""
            if not isinstance(pointer, str) or (pointer and not pointer.startswith("/")):
                raise ValueError(f"the request's {name} must be a JSON pointer, such as /predictions or empty")
        if self.answers is not None and self.single:
            raise ValueError(f'answers is for "{MANY}": with "{ONE}" the whole answer is that of one input')

    @property
    def single(self) -> bool:
        """Whether a request holds one input, and not a list of them."""
        return _count(self.body, ONE) == 1

    def fill(self, rows: NDArray[Any]) -> Any:
        """The body with its one placeholder replaced. Raises Refused for PNGs of what are no images."""
        if self.encoding == "png" and (rows.ndim != 4 or rows.shape[1] not in (1, 3, 4)):
            raise Refused(f"takes PNGs, and inputs {list(rows.shape[1:])} are no images", hopeless=True)
        encoded = [_ENCODE[self.encoding](row) for row in rows]
        return _filled(self.body, encoded[0] if self.single else encoded)

    def read(self, document: Any, rows: int, labels: Sequence[str] | None) -> Outputs:
        """Scores [rows, C] or labels [rows], NaN or −1 where an entry holds neither. Raises Refused and ValueError."""
        entries = [document] if self.single else resolve(document, self.answers or "")
        if not isinstance(entries, list) or len(entries) != rows:
            count = len(entries) if isinstance(entries, list) else "no list of"
            raise Refused(f"answers {rows} inputs with {count} entries at {self.answers or ''!r}")
        if self.scores is not None:
            scores = [_scores(resolve(entry, self.scores), labels) for entry in entries]
            return [("scores", np.array(scores, np.float64))]
        found = [_label(resolve(entry, self.label or ""), labels) for entry in entries]
        return [("label", np.array(found, np.int64))]


def resolve(document: Any, pointer: str) -> Any:
    """What a JSON pointer points to. Raises Refused where there is nothing."""
    for step in pointer.split("/")[1:]:
        try:
            document = document[int(step) if isinstance(document, list) else step.replace("~1", "/").replace("~0", "~")]
        except (LookupError, TypeError, ValueError):
            raise Refused(f"answers with nothing at {pointer!r}") from None
    return document


def _png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [C, H, W], C of 1 (grey), 3 (RGB) or 4 (RGBA)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)).save(file, "png")
    return file.getvalue()


_ENCODE: dict[str, Callable[[NDArray[Any]], Any]] = {
    "list": lambda row: row.tolist(),
    "png": lambda row: base64.b64encode(_png(row)).decode(),
    "bytes": lambda row: base64.b64encode(row.astype(row.dtype.newbyteorder("<")).tobytes()).decode(),
}


def _count(value: Any, placeholder: str) -> int:
    if isinstance(value, Mapping):
        return sum(_count(each, placeholder) for each in value.values())
    if isinstance(value, list):
        return sum(_count(each, placeholder) for each in value)
    return int(value == placeholder)


def _filled(value: Any, content: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(each, content) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, content) for each in value]
    return content if value in (ONE, MANY) else value


def _scores(found: Any, labels: Sequence[str] | None) -> list[float]:
    """The scores of one input, in the order of the classes; an object has them by name."""
    if isinstance(found, dict) and labels is not None:
        left_out = sorted(found.keys() - set(labels))
        if left_out:  # whoever leaves classes out chooses among more orders than there are of those named
            raise Refused(f"scores classes that labels leave out, such as {left_out[0][:40]!r}: give all names")
        found = [found.get(label) for label in labels]
    if not isinstance(found, list) or not found:
        raise Refused("answers with no list of scores where one should be")
    return [_number(score) for score in found]


def _label(found: Any, labels: Sequence[str] | None) -> int:
    """The class that a label names; −1 where it names none, as "none of these" does."""
    if isinstance(found, str) and (labels is not None or class_of(found, None) != ABSTAINED):
        return class_of(found, labels)
    number = _number(found)
    if not (number.is_integer() and abs(number) < 2**31):
        hint = "" if labels is not None else ", and no labels are given"
        raise Refused(f"answers with what is no number of a class{hint}")
    return int(number)


def _number(value: Any) -> float:
    """A JSON number; NaN for anything else, which counts as a miss."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("nan")
