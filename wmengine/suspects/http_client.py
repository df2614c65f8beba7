"""One HTTP request to a stranger's server: bounded in bytes and seconds, TLS verified, never sent on to another host.

The standard library's client, with what it lacks: a limit on the whole exchange (a socket's timeout starts anew with
every byte), a limit on the body, and a say in redirects. Proxies are not used, and no header tells who is asking.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from wmengine.suspects.base import one_line
from wmengine.suspects.patience import Refused, Unavailable

MAXIMUM_ANSWER = 16 << 20
MAXIMUM_REDIRECTS = 3
_LATER = (408, 425, 429)  # and whatever is 500 or more
_NEVER = (401, 403, 404, 405, 407, 410)  # the address or the token is wrong, whatever is asked
_OURS = ("host", "content-length", "transfer-encoding", "connection")


def parse_url(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Raises ValueError unless this is a URL of one of these schemes, with a host and without a password."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in schemes or not parts.hostname or port == 0 or parts.fragment or not url.isprintable():
        raise ValueError(f"an endpoint is {schemes[0]}://HOST[:PORT]/…, and this is {url!r}")
    if parts.username is not None:
        raise ValueError("the URL of an endpoint must hold no password; give it in headers, as ${NAME_OF_A_VARIABLE}")
    return parts


def display_name(parts: SplitResult) -> str:
    """The URL without its query, which may hold a token."""
    return parts._replace(query="").geturl()


def expand_headers(headers: Mapping[str, str] | None, parts: SplitResult) -> tuple[dict[str, str], tuple[str, ...]]:
    """Headers with every ${NAME} replaced by that environment variable, and the values, which nobody may be shown.

    Raises ValueError for a variable that is not set, for what is no header, and where a value from the environment
    would leave this machine unencrypted.
    """
    secrets: list[str] = []

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if not value:
            raise ValueError(f"headers need the environment variable {match[1]}, and it is not set")
        secrets.append(value)
        return value

    expanded = {}
    for name, template in (headers or {}).items():
        if not isinstance(template, str) or not re.fullmatch(r"[\w-]+", name) or name.lower() in _OURS:
            raise ValueError(f"headers hold {name!r}, which is no header of your own with a text for its value")
        expanded[name] = re.sub(r"\$\{(\w+)\}", variable, template)
        if not expanded[name].isascii() or not expanded[name].isprintable():
            raise ValueError(f"the header {name!r} must be printable ASCII")
    if secrets and parts.scheme in ("http", "grpc") and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"{display_name(parts)} is not encrypted: tokens are sent by https or grpcs only")
    return expanded, tuple(secrets)


def hide(text: str, secrets: tuple[str, ...]) -> str:
    """A stranger's message without the tokens that it may repeat."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def read_json(name: str, body: bytes) -> Any:
    """The JSON value of an answer; NaN and Infinity are numbers, as servers write them. Raises Refused."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error, 80)
        raise Refused(f"{name} answers what is no JSON ({reason})") from None


class HttpClient:
    """Requests to one origin over one connection, which is kept between them."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, limit: int = MAXIMUM_ANSWER) -> None:
        self.parts = parse_url(url, ("https", "http"))
        self.name = display_name(self.parts)
        self.limit = limit
        expanded, self.secrets = expand_headers(headers, self.parts)
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", **expanded}
        self._connection: http.client.HTTPConnection | None = None

    def send(self, method: str, url: str, body: bytes | None, seconds: float) -> bytes:
        """The body of the answer, of at most `limit` bytes, within `seconds`. Raises Refused or Unavailable."""
        end = time.monotonic() + seconds
        for _ in range(MAXIMUM_REDIRECTS + 1):
            status, headers, answer = self._exchange(method, url, body, end)
            if status not in (301, 302, 307, 308):
                return self._judged(status, headers, answer)
            url = self._redirected(url, headers.get("Location", ""))
        raise Refused(f"{self.name} redirects again and again", hopeless=True)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _judged(self, status: int, headers: http.client.HTTPMessage, answer: bytes) -> bytes:
        if 200 <= status < 300:
            if headers.get("Content-Encoding", "identity") != "identity":
                raise Refused(f"{self.name} compresses its answer though it was asked not to")
            return answer
        said = hide(f"{self.name} answers with status {status}{_message(answer)}", self.secrets)
        if status in _LATER or status >= 500:
            raise Unavailable(said, _retry_after(headers.get("Retry-After")))
        raise Refused(said, hopeless=status in _NEVER)

    def _redirected(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        if not location or urlsplit(target)[:2] != urlsplit(url)[:2]:
            to = urlsplit(target).netloc or "nowhere"
            raise Refused(
                hide(f"{self.name} redirects to {to}, and nothing is sent to other hosts", self.secrets), True
            )
        return target

    def _exchange(
        self, method: str, url: str, body: bytes | None, end: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request and its answer; once more, on a new connection, where the kept one had been closed meanwhile."""
        reused = self._connection is not None
        try:
            return self._attempt(method, url, body, end)
        except (http.client.RemoteDisconnected, ConnectionError) as error:
            self.close()
            if not reused:
                reached = not isinstance(error, ConnectionRefusedError)
                raise Unavailable(f"{self.name} closes the connection ({one_line(error)})", 0.0, reached) from None
        return self._exchange(method, url, body, end)

    def _attempt(
        self, method: str, url: str, body: bytes | None, end: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        seconds = end - time.monotonic()
        if seconds <= 0.0:
            raise Unavailable(f"{self.name} does not answer in time")
        if self._connection is None:
            self._connection = _connection(self.parts, seconds)
        connection, timer, expired = self._connection, None, threading.Event()
        connection.timeout = seconds
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(seconds)
            # A server that sends a byte now and then never runs into a socket's timeout: at the end, the socket goes.
            timer = threading.Timer(end - time.monotonic(), _cut, (connection.sock, expired))
            timer.daemon = True
            timer.start()
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = self._headers if body is None else {"Content-Type": "application/json", **self._headers}
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            answer = response.read(self.limit + 1)
            if len(answer) > self.limit or response.will_close:
                self.close()
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise Refused(f"{self.name} has no valid certificate ({one_line(error)})", hopeless=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if expired.is_set() or isinstance(error, TimeoutError):
                raise Unavailable(f"{self.name} does not answer within {seconds:.3g} seconds") from None
            if isinstance(error, http.client.RemoteDisconnected | ConnectionError):
                raise
            reached = not isinstance(error, OSError)
            raise Unavailable(f"{self.name} cannot be asked ({one_line(error)})", 0.0, reached) from None
        finally:
            if timer is not None:
                timer.cancel()
        if expired.is_set():  # a body that ends where the connection does would pass for a whole one
            self.close()
            raise Unavailable(f"{self.name} does not answer within {seconds:.3g} seconds")
        if len(answer) > self.limit:
            raise Refused(f"{self.name} answers with more than {self.limit} bytes")
        return response.status, response.headers, answer


def _connection(parts: SplitResult, seconds: float) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, parts.port, timeout=seconds)
    return http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=ssl.create_default_context())


def _cut(connected: socket.socket, expired: threading.Event) -> None:
    expired.set()
    with contextlib.suppress(OSError):
        # SSLSocket has a shutdown of its own, which must not run beside a read.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _message(answer: bytes) -> str:
    """The sentence in an error's body, where it is JSON with one."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    said = document.get("error") if isinstance(document, dict) else None
    return f" ({one_line(Exception(said))})" if isinstance(said, str) and said else ""


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After, which is a number of them or a date; 0 for anything else."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
