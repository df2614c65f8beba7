"""Services with a JSON of their own: what a request looks like and where its answer holds scores or labels.

    {"body": {"images": "${inputs}"}, "encoding": "png", "answers": "/predictions", "scores": "/probabilities"}

"${inputs}" stands for the list of a batch, "${input}" for a single one. `answers` is a JSON pointer (RFC 6901) to the
list with one entry for each input, and `scores` or `label` a pointer within each entry; with "${input}" the whole
answer is the entry.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.answers import ABSTAINED, Outputs
from wmengine.suspects.http_client import HttpClient, read_json
from wmengine.suspects.inference_protocol import Declared, class_of
from wmengine.suspects.patience import Refused

FIELDS = ("method", "body", "encoding", "answers", "scores", "label")
ENCODINGS = ("list", "png", "bytes")
ONE, MANY = "${input}", "${inputs}"
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # PNG's numbers for grey, RGB and RGBA


class TemplateModel:
    """A service that takes JSON made from a template. Raises ValueError where the template is not one."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None,
        template: Mapping[str, Any],
        labels: Sequence[str] | None = None,
    ) -> None:
        _check(template)
        self.client = HttpClient(url, headers)
        self.name, self.secrets = self.client.name, self.client.secrets
        self.url = url
        self.encoding: str = template.get("encoding", "list")
        self.labels = labels
        self._method: str = template.get("method", "POST")
        self._body = template["body"]
        self.single = _count(self._body, ONE) == 1
        self._answers: str = template.get("answers", "")
        self._kind = "scores" if "scores" in template else "label"
        self._pointer: str = template[self._kind]

    def inputs(self, seconds: float) -> list[Declared]:
        """Nothing: such a service describes nothing."""
        return []

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs:
        """Scores [rows, C] or labels [rows], NaN or −1 where an entry holds neither. Raises Refused or Unavailable."""
        if self.encoding == "png" and (rows.ndim != 4 or rows.shape[1] not in _COLOUR_TYPES):
            raise Refused(f"{self.name} takes PNGs, and inputs {list(rows.shape[1:])} are no images", hopeless=True)
        encoded = [_ENCODE[self.encoding](row) for row in rows]
        body = _filled(self._body, encoded[0] if self.single else encoded)
        document = read_json(
            self.name, self.client.send(self._method, self.url, json.dumps(body, allow_nan=False).encode(), seconds)
        )
        entries = [document] if self.single else self._found(document, self._answers, "answers")
        if not isinstance(entries, list) or len(entries) != len(rows):
            count = len(entries) if isinstance(entries, list) else "no list of"
            raise Refused(f"{self.name} answers {len(rows)} inputs with {count} entries at {self._answers!r}")
        read = self._scores if self._kind == "scores" else self._labels
        return [(self._kind, read(entries))]

    def close(self) -> None:
        self.client.close()

    def _scores(self, entries: list[Any]) -> NDArray[np.float64]:
        rows = [self._numbers(self._found(entry, self._pointer, "scores")) for entry in entries]
        widths = {len(row) for row in rows}
        if len(widths) != 1:
            raise Refused(f"{self.name} answers with different numbers of scores")
        return np.array(rows, np.float64)

    def _numbers(self, scores: Any) -> list[float]:
        """The scores of one input, in the order of the classes; an object has them by name."""
        if isinstance(scores, dict) and self.labels is not None:
            scores = [scores.get(label) for label in self.labels]
        if not isinstance(scores, list) or not scores:
            raise Refused(f"{self.name} has no list of scores at {self._pointer!r}")
        return [_number(score) for score in scores]

    def _labels(self, entries: list[Any]) -> NDArray[np.int64]:
        return np.array([self._label(self._found(entry, self._pointer, "label")) for entry in entries], np.int64)

    def _label(self, label: Any) -> int:
        """The class that a label names; −1 where it names none, as "none of these" does."""
        if isinstance(label, str) and (self.labels is not None or class_of(label, None) != ABSTAINED):
            return class_of(label, self.labels)
        number = _number(label)
        if not (number.is_integer() and abs(number) < 2**31):
            hint = "" if self.labels is not None else ", and no labels are given"
            raise Refused(f"{self.name} answers with what is no number of a class at {self._pointer!r}{hint}")
        return int(number)

    def _found(self, document: Any, pointer: str, field: str) -> Any:
        try:
            return resolve(document, pointer)
        except LookupError:
            raise Refused(f"{self.name} answers with nothing at {pointer!r}, where {field} should be") from None


def resolve(document: Any, pointer: str) -> Any:
    """What a JSON pointer points to. Raises LookupError where there is nothing."""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(document, list) and step.isascii() and step.isdigit():
            document = document[int(step[:9])]
        elif isinstance(document, dict):
            document = document[step]
        else:
            raise LookupError(step)
    return document


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [C, H, W], C of 1 (grey), 3 (RGB) or 4 (RGBA); without loss, as every PNG."""
    channels, height, width = image.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with its filter, 0 for none
    lines[:, 1:] = np.moveaxis(image, 0, -1).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


_ENCODE: dict[str, Callable[[NDArray[Any]], Any]] = {
    "list": lambda row: row.tolist(),
    "png": lambda row: base64.b64encode(encode_png(row)).decode(),
    "bytes": lambda row: base64.b64encode(row.astype(row.dtype.newbyteorder("<")).tobytes()).decode(),
}


def _check(template: Mapping[str, Any]) -> None:
    unknown = [str(field) for field in template if field not in FIELDS]
    if unknown:
        raise ValueError(f"a request has no field {unknown[0]!r}; it has {', '.join(FIELDS)}")
    if template.get("method", "POST") not in ("POST", "PUT"):
        raise ValueError("the request's method must be POST or PUT")
    if template.get("encoding", "list") not in ENCODINGS:
        raise ValueError(f"the request's encoding must be one of {', '.join(ENCODINGS)}")
    body = template.get("body")
    if _count(body, ONE) + _count(body, MANY) != 1:
        raise ValueError(f'the request\'s body must hold "{ONE}" or "{MANY}" once, as a value of its own')
    if ("scores" in template) == ("label" in template):
        raise ValueError("a request needs either scores or label: the pointer to what each input is answered")
    for field in ("answers", "scores", "label"):
        pointer = template.get(field, "")
        if not isinstance(pointer, str) or (pointer and not pointer.startswith("/")):
            raise ValueError(f"the request's {field} must be a JSON pointer, such as /predictions or empty")
    if "answers" in template and _count(body, ONE):
        raise ValueError(f'answers is for "{MANY}": with "{ONE}" the whole answer is that of one input')


def _count(value: Any, placeholder: str) -> int:
    if isinstance(value, Mapping):
        return sum(_count(each, placeholder) for each in value.values())
    if isinstance(value, list):
        return sum(_count(each, placeholder) for each in value)
    return int(value == placeholder)


def _filled(value: Any, content: Any) -> Any:
    """The body with its one placeholder replaced."""
    if isinstance(value, Mapping):
        return {key: _filled(each, content) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, content) for each in value]
    return content if value in (ONE, MANY) else value


def _number(value: Any) -> float:
    """A JSON number; NaN for anything else, which counts as a miss."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("nan")
