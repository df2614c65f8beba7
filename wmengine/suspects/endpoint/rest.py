"""Served models over HTTP: the Open Inference Protocol (KServe V2), and any other JSON service by its template.

https://github.com/kserve/open-inference-protocol. Triton, MLServer, KServe, OpenVINO's and others' servers speak it.
Many describe nothing of a model of one's own: then what the user has set counts, and the sane default otherwise.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.suspects.answers import Outputs
from wmengine.suspects.endpoint.address import shown
from wmengine.suspects.endpoint.http import HttpClient
from wmengine.suspects.endpoint.model import DTYPES, Declared, declared
from wmengine.suspects.endpoint.options import EndpointOptions
from wmengine.suspects.endpoint.patience import Refused
from wmengine.suspects.endpoint.template import Template

_PATH = re.compile(r"(.*/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?/?")


class RestModel(HttpClient):
    """A model behind https://HOST/…/v2/models/NAME[/versions/VERSION]."""

    def __init__(self, options: EndpointOptions) -> None:
        super().__init__(options)
        path = None if self.address.parts.query else _PATH.fullmatch(self.address.parts.path)
        if path is None:
            raise ValueError(
                f"{shown(options.url)!r} is no model of the Open Inference Protocol (…/v2/models/NAME): other "
                "services need a request template, and a file on the web must be downloaded first"
            )
        self._path = path[1]
        self._wanted = {} if options.output is None else {"outputs": [{"name": options.output}]}

    def inputs(self, seconds: float) -> list[Declared]:
        found = self.send("GET", self._path, None, seconds)["inputs"]
        return [declared(each.get("name"), each.get("datatype"), each.get("shape")) for each in found[:64]]

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs:
        tensor = {"name": to.name, "shape": rows.shape, "datatype": to.datatype, "data": rows.ravel().tolist()}
        document = self.send("POST", f"{self._path}/infer", {"inputs": [tensor], **self._wanted}, seconds)
        found = document.get("outputs") if isinstance(document, dict) else None
        if not isinstance(found, list):
            raise Refused("answers without a list of outputs")
        return [(str(each.get("name")), _array(each)) for each in found if each.get("datatype") in tuple(DTYPES)]


class TemplateModel(HttpClient):
    """A service that takes JSON made from a template, and describes nothing."""

    def __init__(self, options: EndpointOptions, template: Template) -> None:
        super().__init__(options)
        self._template, self._labels = template, options.labels
        parts = self.address.parts
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def inputs(self, seconds: float) -> list[Declared]:
        return []

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs:
        document = self.send(self._template.method, self._target, self._template.fill(rows), seconds)
        return self._template.read(document, len(rows), self._labels)


def _array(output: dict[str, Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return np.asarray(output["data"], DTYPES[output["datatype"]]).reshape(tuple(output["shape"]))
