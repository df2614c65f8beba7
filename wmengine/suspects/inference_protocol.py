"""The Open Inference Protocol (KServe V2) over REST: what a served model takes, and its answers to one batch.

https://github.com/kserve/open-inference-protocol. Triton, MLServer, KServe, OpenVINO's and others' servers speak it.
Many describe nothing of a model of one's own: then what the user has set counts, and the sane default otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.suspects.answers import ABSTAINED, Outputs
from wmengine.suspects.base import one_line
from wmengine.suspects.http_client import HttpClient, read_json, shown
from wmengine.suspects.patience import Refused

DTYPES = {
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
}
MAXIMUM_DIMENSIONS = 8
MODEL_PATH = re.compile(r"([^?#]*/v2/models/[^/?#]+(?:/versions/[^/?#]+)?)(?:/infer)?/?")


@dataclass(frozen=True)
class Declared:
    """One input of a served model: shape is of the whole batch, None where a size is free, empty where unknown."""

    name: str = "input"
    datatype: str = "FP32"
    shape: tuple[int | None, ...] = ()


class RestModel:
    """A model behind https://HOST/v2/models/NAME[/versions/VERSION]."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None,
        outputs: Sequence[str],
        labels: Sequence[str] | None = None,
    ) -> None:
        path = MODEL_PATH.fullmatch(url)
        if path is None:
            raise ValueError(
                f"{shown(url)!r} is no model of the Open Inference Protocol (…/v2/models/NAME): other services need a "
                "request template, and a file on the web must be downloaded first"
            )
        self.url = path[1]
        self.client = HttpClient(self.url, headers)
        self.name, self.secrets = self.client.name, self.client.secrets
        self._outputs = [{"name": output} for output in outputs]
        self._labels = labels

    def inputs(self, seconds: float) -> list[Declared]:
        """What the server says that the model takes; nothing where it does not say. Raises Refused or Unavailable."""
        document = read_json(self.name, self.client.send("GET", self.url, None, seconds))
        found = document.get("inputs") if isinstance(document, dict) else None
        if not isinstance(found, list):
            return []
        described = [each for each in found[:64] if isinstance(each, dict)]
        return [declared(each.get("name"), each.get("datatype"), each.get("shape")) for each in described]

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs:
        """The model's outputs for one batch. Raises Refused or Unavailable."""
        tensor = {"name": to.name, "shape": rows.shape, "datatype": to.datatype, "data": rows.ravel().tolist()}
        question: dict[str, Any] = {"inputs": [tensor]}
        if self._outputs:
            question["outputs"] = self._outputs
        body = json.dumps(question, allow_nan=False).encode()
        document = read_json(self.name, self.client.send("POST", f"{self.url}/infer", body, seconds))
        found = document.get("outputs") if isinstance(document, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise Refused(f"{self.name} answers without a list of outputs")
        # Truth values are no answers.
        outputs = [
            (str(each.get("name")), self._tensor(each))
            for each in found
            if str(each.get("datatype")) in (*DTYPES, "BYTES")
        ]
        return told(self.name, outputs, self._labels)

    def close(self) -> None:
        self.client.close()

    def _tensor(self, output: dict[str, Any]) -> NDArray[Any]:
        shape = output.get("shape")
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise Refused(f"{self.name} answers with a tensor without a shape")
        try:
            dtype = "object" if output["datatype"] == "BYTES" else DTYPES[output["datatype"]]
            with np.errstate(over="ignore"):
                return np.asarray(output.get("data"), dtype).reshape(shape)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(f"{self.name} answers with a tensor that cannot be read ({one_line(error, 80)})") from None


def declared(name: Any, datatype: Any, shape: Any) -> Declared:
    """One input as a server describes it; what makes no sense counts as not described."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    known = all(isinstance(size, int) for size in sizes) and len(sizes) <= MAXIMUM_DIMENSIONS
    return Declared(
        name if isinstance(name, str) and name else Declared.name,
        datatype if isinstance(datatype, str) and datatype else Declared.datatype,
        tuple(size if size > 0 else None for size in sizes) if known else (),
    )


def choose_input(name: str, inputs: Sequence[Declared], wanted: str | None) -> Declared:
    """The input that takes the triggers: the one wanted, or the only one. Raises SuspectError where there are more."""
    for each in inputs:
        if each.name == wanted:
            return each
    if len(inputs) > 1:
        names = ", ".join(each.name for each in inputs)
        raise SuspectError(f"{name} needs {len(inputs)} inputs ({names}), and a trigger is one")
    if wanted is not None:
        return Declared(wanted)
    return inputs[0] if inputs else Declared()


def told(name: str, outputs: Outputs, labels: Sequence[str] | None) -> Outputs:
    """Outputs whose texts have become numbers of classes: by their place in `labels`, or where they are numbers.

    A text that names no class is −1, an abstention. Without `labels`, texts without a number are left out. Raises
    Refused where that leaves nothing.
    """
    numbers: Outputs = []
    unknown = None
    for output, array in outputs:
        if array.dtype != object:
            numbers.append((output, array))
            continue
        found = np.array([class_of(each, labels) for each in array.ravel()], np.int64)
        if labels is None and found.size and (found == ABSTAINED).all():
            unknown = array.ravel()[0]
        else:
            numbers.append((output, found.reshape(array.shape)))
    if unknown is not None and not numbers:
        said = one_line(Exception(unknown), 40)
        raise Refused(f"{name} answers with names of classes, such as {said!r}: give their labels, in order")
    return numbers


def class_of(text: Any, labels: Sequence[str] | None) -> int:
    """The class that a name stands for; −1 where it stands for none."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        return ABSTAINED
    if labels is not None:
        return labels.index(text) if text in labels else ABSTAINED
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else ABSTAINED


def raw_texts(name: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    """Texts that stand one after the other, each behind its length. Raises Refused where they are not so many."""
    texts: list[bytes] = []
    place = 0
    while place + 4 <= len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        texts.append(data[place + 4 : end])
        place = end
    if place != len(data) or not texts or math.prod(shape) != len(texts) or min(shape, default=1) < 0:
        raise Refused(f"{name} answers with {len(data)} bytes for a tensor BYTES{list(shape)}")
    found = np.empty(len(texts), object)
    found[:] = texts
    return found.reshape(shape)


def raw_tensor(name: str, datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    """An array from little-endian bytes. Raises Refused where they are not as many as the shape says."""
    dtype = np.dtype(DTYPES[datatype]).newbyteorder("<")
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(data) or not data:
        raise Refused(f"{name} answers with {len(data)} bytes for a tensor {datatype}{list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape).astype(DTYPES[datatype])
