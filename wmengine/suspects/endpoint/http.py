"""JSON to a stranger's server and back: bounded in bytes and in seconds, TLS verified, one host, nothing unpacked.

urllib3's connections, with an end to the whole exchange: a socket's timeout starts anew with every byte and with every
address of a host, and an answer may claim any length, or have headers and trailers for ever. Redirects and proxies are
not followed, and no header tells who is asking.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
from functools import partial
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, InvalidHeader

from wmengine.suspects.base import one_line
from wmengine.suspects.endpoint import model
from wmengine.suspects.endpoint.address import Address, shown
from wmengine.suspects.endpoint.options import EndpointOptions
from wmengine.suspects.endpoint.patience import Refused, Unavailable

_LATER = (408, 425, 429)  # and whatever is 500 or more
_NEVER = (401, 403, 404, 405, 407, 410)  # the address or the token is wrong, whatever is asked
_PIECE = 1 << 14  # bytes that are sent under one timeout: a record of TLS


class HttpClient:
    """Requests to one address over one connection, which is kept between them."""

    def __init__(self, options: EndpointOptions) -> None:
        self.address = Address.of(options.url, options.headers, ("https", "http"))
        parts = self.address.parts
        if parts.scheme == "https":
            self._connection: _Bounded = _BoundedTls(
                parts.hostname or "", parts.port or 443, ssl_context=ssl.create_default_context()
            )
        else:
            self._connection = _Bounded(parts.hostname or "", parts.port or 80)
        self._headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": urllib3.util.SKIP_HEADER,
            **self.address.headers,
        }

    def send(self, method: str, target: str, question: Any, seconds: float) -> Any:
        """The JSON value of the answer; NaN and Infinity are numbers, as servers write them.

        question: a JSON value, or None for a request without a body. Raises Refused, Unavailable, and ValueError or
        RecursionError for what is no JSON.
        """
        status, headers, answer = self._exchange(method, target, question, seconds)
        if 200 <= status < 300:
            if headers.get("Content-Encoding", "identity") != "identity":
                raise Refused("compresses its answer though it was asked not to")
            return json.loads(answer)
        said = f"answers with status {status}{_reason(answer)}"
        if 300 <= status < 400:
            place = one_line(Exception(shown(headers.get("Location") or "nowhere")), 100)
            raise Refused(f"{said} and redirects to {place}, and redirects are not followed", hopeless=True)
        if status in _LATER or status >= 500:
            raise Unavailable(said, _retry_after(headers.get("Retry-After", "")))
        raise Refused(said, hopeless=status in _NEVER)

    def close(self) -> None:
        self._connection.close()

    def _exchange(
        self, method: str, target: str, question: Any, seconds: float
    ) -> tuple[int, urllib3.HTTPHeaderDict, bytes]:
        body = None if question is None else json.dumps(question, allow_nan=False).encode()
        headers = self._headers if body is None else {"Content-Type": "application/json", **self._headers}
        connection, reached, done = self._connection, False, False
        connection.end = time.monotonic() + seconds
        connection.response_class = partial(_Response, end=connection.end)  # type: ignore[assignment]
        try:
            if not connection.is_connected:
                connection.close()
                connection.connect()
            reached = True
            connection.request(method, target, body, headers, preload_content=False, decode_content=False)
            response = connection.getresponse()
            answer, done = b"".join(response.stream()), True
            return response.status, response.headers, answer
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"has no valid certificate ({one_line(error)})", hopeless=True) from None
        except (TimeoutError, urllib3.exceptions.TimeoutError):
            raise Unavailable(f"does not answer within {seconds:.3g} seconds") from None
        except (OSError, ValueError, http.client.HTTPException, HTTPError) as error:
            reason = Exception(error.args[0]) if isinstance(error, HTTPError) and error.args else error
            raise Unavailable(f"cannot be asked ({one_line(reason)})", reached=reached) from None
        finally:
            if not done:
                connection.close()


class _Bounded(HTTPConnection):
    """A connection all of whose waiting ends with TimeoutError at `end`, of time.monotonic."""

    end = 0.0

    def _new_conn(self) -> socket.socket:
        failure = OSError("its name has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(_left(self.end))
                opened.connect(address)
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                opened.settimeout(_left(self.end))
            except OSError as error:
                opened.close()
                failure = error
            else:
                return opened
        raise failure

    def send(self, data: Any) -> None:
        for start in range(0, len(data), _PIECE):
            self.sock.settimeout(_left(self.end))
            super().send(memoryview(data)[start : start + _PIECE])


class _BoundedTls(_Bounded, HTTPSConnection):
    pass


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, end: float, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock, end))


class _BoundedReader(io.RawIOBase):
    """What a socket brings, up to a time and a number of bytes, whatever lengths are claimed in it."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, end: float) -> None:
        super().__init__()
        self._raw, self._sock, self._end, self._bytes = raw, sock, end, model.MAXIMUM_ANSWER

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._end))
        count: int | None = self._raw.readinto(buffer)
        self._bytes -= count or 0
        if self._bytes < 0:
            raise Refused(f"answers with more than {model.MAXIMUM_ANSWER} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(end: float) -> float:
    """Seconds until the end. Raises TimeoutError where there are none."""
    seconds = end - time.monotonic()
    if seconds <= 0.0:
        raise TimeoutError("timed out")
    return seconds


def _reason(answer: bytes) -> str:
    """The sentence in an error's body, where it is JSON with one."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    said = document.get("error") if isinstance(document, dict) else None
    return f" ({one_line(Exception(said))})" if isinstance(said, str) and said else ""


def _retry_after(value: str) -> float:
    """Seconds from a Retry-After, which is a number of them or a date; 0 for anything else."""
    try:
        return urllib3.Retry().parse_retry_after(value)
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
