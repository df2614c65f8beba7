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
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import one_line
from wmengine.suspects.http_client import HttpClient, read_json
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
MODEL_PATH = re.compile(r"([^?#]*/v2/models/[^/?#]+(?:/versions/[^/?#]+)?)(?:/infer)?/?")


@dataclass(frozen=True)
class Declared:
    """One input of a served model: shape is of the whole batch, None where a size is free, empty where unknown."""

    name: str = "input"
    datatype: str = "FP32"
    shape: tuple[int | None, ...] = ()


class RestModel:
    """A model behind https://HOST/v2/models/NAME[/versions/VERSION]."""

    def __init__(self, url: str, headers: Mapping[str, str] | None, outputs: Sequence[str]) -> None:
        path = MODEL_PATH.fullmatch(url)
        if path is None:
            raise ValueError(
                f"{url!r} is no model of the Open Inference Protocol (…/v2/models/NAME): for other services say with "
                "request= what they take, and a file on the web must be downloaded first"
            )
        self.url = path[1]
        self.client = HttpClient(self.url, headers)
        self.name = self.client.name
        self._outputs = [{"name": output} for output in outputs]

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
        # Texts and truth values are no answers.
        return [(str(each.get("name")), self._tensor(each)) for each in found if str(each.get("datatype")) in DTYPES]

    def close(self) -> None:
        self.client.close()

    def _tensor(self, output: dict[str, Any]) -> NDArray[Any]:
        shape = output.get("shape")
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise Refused(f"{self.name} answers with a tensor without a shape")
        try:
            with np.errstate(over="ignore"):
                return np.asarray(output.get("data"), DTYPES[output["datatype"]]).reshape(shape)
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(f"{self.name} answers with a tensor that cannot be read ({one_line(error, 80)})") from None


def declared(name: Any, datatype: Any, shape: Any) -> Declared:
    """One input as a server describes it; what makes no sense counts as not described."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    known = all(isinstance(size, int) for size in sizes) and len(sizes) <= 8
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


def raw_tensor(name: str, datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    """An array from little-endian bytes. Raises Refused where they are not as many as the shape says."""
    dtype = np.dtype(DTYPES[datatype]).newbyteorder("<")
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise Refused(f"{name} answers with {len(data)} bytes for a tensor {datatype}{list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape).astype(DTYPES[datatype])
