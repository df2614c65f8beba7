"""How an endpoint is asked and its answers are read: fixed before the first request, and told without its secrets."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any

from wmengine.errors import WmengineError
from wmengine.identity.sealing import read_file
from wmengine.suspects.adapters import LAYOUT_NAMES, SCALING_NAMES
from wmengine.suspects.base import digest_of, one_line
from wmengine.suspects.class_names import check_labels
from wmengine.suspects.endpoint.address import shown, without_secrets
from wmengine.suspects.endpoint.template import Template

# What a triggers' datatype is called where ONNX Runtime names it.
DATATYPES = {"FP32": "tensor(float)", "FP16": "tensor(float16)", "FP64": "tensor(double)", "UINT8": "tensor(uint8)"}
_KNOWN = {"datatype": (None, *DATATYPES), "layout": (None, *LAYOUT_NAMES), "scaling": ("any", *SCALING_NAMES)}
_WHOLE = ("batch", "budget", "tries")


@dataclass(frozen=True)
class EndpointOptions:
    """How to ask one endpoint.

    url: a model of the Open Inference Protocol, https://HOST/…/v2/models/NAME[/versions/V] or grpcs://HOST:PORT/NAME[/V]
    (http and grpc without TLS), or any service that `request`, a template (docs/endpoints.md), says how to ask.
    headers: sent with every request; ${NAME} stands for an environment variable. input, output: their names; datatype:
    "FP32", "FP16", "FP64" or "UINT8"; layout: "as recorded", "channels last", "flat" or "flat, channels last"; scaling:
    "as recorded", "0 to 1", "0 to 255", "-1 to 1", "ImageNet", or "any" to try and pay for all. What is not given
    is taken from what the server says of its model, and as the mark recorded it where it says nothing. labels: the
    names of all classes in their order, for a service that answers with names. batch: inputs in one request, 32 or what
    the server fixes; budget: inputs sent in all, tries included; rate: inputs per second; tries: for one request, with
    pauses between them that double; timeout: seconds for one; deadline: seconds in all.

    Raises ValueError for an option that is none.
    """

    url: str
    _: KW_ONLY
    request: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    input: str | None = None
    output: str | None = None
    datatype: str | None = None
    layout: str | None = None
    scaling: str = "as recorded"
    labels: Sequence[str] | None = None
    batch: int | None = None
    budget: int | None = None
    rate: float | None = None
    tries: int = 5
    timeout: float = 30.0
    deadline: float = 600.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def __post_init__(self) -> None:
        for name in (*_WHOLE, "rate", "timeout", "deadline"):
            self._check_number(name)
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                said = f"{', '.join(filter(None, known))}, and it is {getattr(self, name)!r}"
                raise ValueError(f"{name} must be one of {said}")
        for name in ("input", "output"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ValueError(f"{name} must be a name, and it is {getattr(self, name)!r}")
        for name in ("request", "headers"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise ValueError(f"{name} must be a JSON object")
        check_labels(self.labels)
        if self.template is not None:
            self._check_template(self.template)
        try:
            self.digest()
        except TypeError as error:
            raise ValueError(f"the request's body must be JSON ({one_line(error)})") from None

    @cached_property
    def template(self) -> Template | None:
        """What `request` says."""
        return None if self.request is None else Template.of(self.request)

    @property
    def settings(self) -> dict[str, Any]:
        """All options, as JSON values: everything that can change what is asked or how an answer is read.

        Without secrets: of the URL's query and of the headers there are only the names, and no text of the request
        whose name says that it is a token.
        """
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found |= {name: float(found[name]) for name in ("rate", "timeout", "deadline") if found[name] is not None}
        headers = sorted(name.lower() for name in self.headers or ())
        request = None if self.request is None else without_secrets(self.request)
        labels = None if self.labels is None else list(self.labels)
        return found | {"url": shown(self.url), "request": request, "headers": headers, "labels": labels}

    def digest(self) -> str:
        """That of the settings."""
        return digest_of(self.settings)

    def _check_number(self, name: str) -> None:
        value, kind = getattr(self, name), int if name in _WHOLE else int | float
        if value is None and name in ("batch", "budget", "rate"):
            return
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            whole = "whole " if name in _WHOLE else ""
            raise ValueError(f"{name} must be a {whole}number above 0, and it is {value!r}")

    def _check_template(self, template: Template) -> None:
        """Also sets what a template fixes."""
        if self.input is not None or self.output is not None:
            raise ValueError("input and output are names of the Open Inference Protocol: a request says where to look")
        if template.encoding == "png":
            if self.datatype not in (None, "UINT8") or self.layout not in (None, "as recorded"):
                raise ValueError("a PNG holds bytes, channels last: leave datatype and layout out")
            object.__setattr__(self, "datatype", "UINT8")
        if template.single:
            if self.batch not in (None, 1):
                raise ValueError("the request holds ${input}, a single one: leave batch out")
            object.__setattr__(self, "batch", 1)


def read_options(url: str, path: str | os.PathLike[str]) -> EndpointOptions:
    """The options for this URL from a JSON file. Raises ValueError for what is none."""
    try:
        options = json.loads(read_file(path, "JSON file", WmengineError), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({one_line(error)})") from None
    known = [each.name for each in fields(EndpointOptions) if each.kw_only]
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold one JSON object, with the options {', '.join(known)}")
    for name in options:
        if name not in known:
            raise ValueError(f"{path} holds {name!r}, which is no option; these are: {', '.join(known)}")
    return EndpointOptions(url, **options)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where it says something twice, as only one of the two would count."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it gives {name!r} twice")
    return dict(pairs)
