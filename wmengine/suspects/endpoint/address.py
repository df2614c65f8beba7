"""Where an endpoint is, and what goes with every request to it: headers, and the secrets that nobody may be shown."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

_OURS = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")
_SECRET_NAME = re.compile(r"auth|cookie|credential|key|password|secret|token", re.IGNORECASE)
_SHORTEST_SECRET = 6  # what is shorter would be found in any sentence


@dataclass(frozen=True)
class Address:
    """A URL's parts, the headers that go there, and the secrets among both.

    Secret are the values from the environment, what a header ends with ("Bearer …") and what the URL's query holds.
    """

    parts: SplitResult
    headers: dict[str, str]
    secrets: tuple[str, ...]

    @staticmethod
    def of(url: str, headers: Mapping[str, str] | None, schemes: tuple[str, ...]) -> Address:
        """The address, every ${NAME} in its headers replaced by that environment variable.

        Raises ValueError for a URL of other schemes, without a host or with a password, for a variable that is not set,
        for what is no header, and where a value from the environment, or a header that is a token by its name, would
        leave this machine unencrypted.
        """
        parts = _parts(url, schemes)
        secrets: list[str] = []

        def variable(match: re.Match[str]) -> str:
            value = os.environ.get(match[1])
            if not value:
                raise ValueError(f"headers need the environment variable {match[1]}, and it is not set")
            secrets.append(value)
            return value

        expanded = {}
        for name, template in (headers or {}).items():
            if not isinstance(template, str) or not re.fullmatch(r"[\w-]+", name, re.ASCII) or name.lower() in _OURS:
                raise ValueError(f"headers hold {name!r}, which is no header of your own with a text for its value")
            expanded[name] = re.sub(r"\$\{(\w+)\}", variable, template)
            if not expanded[name].isascii() or not expanded[name].isprintable():
                raise ValueError(f"the header {name!r} must be printable ASCII")
        tokens = bool(secrets) or any(_SECRET_NAME.search(name) for name in expanded)
        if tokens and parts.scheme in ("http", "grpc") and not _is_loopback(parts.hostname or ""):
            raise ValueError(f"{shown(url)} is not encrypted: tokens are sent by https or grpcs only")
        pieces = [piece.rpartition("=")[2] for piece in parts.query.split("&")]
        written = [*pieces, *(value for _, value in parse_qsl(parts.query))]
        written += [value.split()[-1] for value in expanded.values() if value.split()]
        secrets += [value for value in written if len(value) >= _SHORTEST_SECRET]
        return Address(parts, expanded, tuple(sorted(set(secrets), key=len, reverse=True)))

    @property
    def name(self) -> str:
        """The URL without its query, which may hold a token."""
        return self.parts._replace(query="").geturl()

    def hide(self, text: str) -> str:
        """A stranger's message without the tokens that it may repeat."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def shown(url: str) -> str:
    """What of a URL may stand in a message or a verdict: no password, and of its query only the names."""
    place, mark, query = re.sub(r"//.*@", "//***@", url, flags=re.DOTALL).partition("?")
    return place + mark + re.sub(r"(^|&)([^=&]*=)?[^&]+", r"\1\2…", query)


def without_secrets(value: Any) -> Any:
    """A JSON value without the texts whose names say that they are secret."""
    if isinstance(value, Mapping):
        secret = {name for name, each in value.items() if isinstance(each, str) and _SECRET_NAME.search(name)}
        return {name: "***" if name in secret else without_secrets(each) for name, each in value.items()}
    return [without_secrets(each) for each in value] if isinstance(value, list | tuple) else value


def _parts(url: str, schemes: tuple[str, ...]) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    written = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in schemes or not parts.hostname or port == 0 or parts.fragment or not written:
        raise ValueError(f"an endpoint is {schemes[0]}://HOST[:PORT]/…, and this is {shown(url)!r}")
    if parts.username is not None:
        raise ValueError("the URL of an endpoint must hold no password; give it in headers, as ${NAME_OF_A_VARIABLE}")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
