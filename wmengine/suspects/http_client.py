"""One HTTP request to a stranger's server: bounded in bytes and seconds, TLS verified, never sent on to another host.

The standard library's client, with what it lacks: a limit on the whole exchange (a socket's timeout starts anew with
every byte, and with every address of a host), a limit on its bytes (a chunk may claim a length of -1, headers may go
on for ever), and a say in redirects. Proxies are not used, and no header tells who is asking.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import ipaddress
import json
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urljoin, urlsplit

from wmengine.suspects.base import one_line
from wmengine.suspects.patience import Refused, Unavailable

MAXIMUM_ANSWER = 16 << 20
MAXIMUM_FRAME = 1 << 20  # bytes of an answer beside its body: headers, lengths of chunks, trailers
MAXIMUM_REDIRECTS = 3
_LATER = (408, 425, 429)  # and whatever is 500 or more
_NEVER = (401, 403, 404, 405, 407, 410)  # the address or the token is wrong, whatever is asked
_OURS = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")
_SECRET_HEADER = re.compile(r"auth|cookie|credential|key|password|secret|token", re.IGNORECASE)
_SHORTEST_SECRET = 6  # what is shorter would be found in any sentence


def parse_url(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Raises ValueError unless this is a URL of one of these schemes, with a host and without a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in schemes or not parts.hostname or port == 0 or parts.fragment or not url.isprintable():
        raise ValueError(f"an endpoint is {schemes[0]}://HOST[:PORT]/…, and this is {shown(url)!r}")
    if parts.username is not None:
        raise ValueError("the URL of an endpoint must hold no password; give it in headers, as ${NAME_OF_A_VARIABLE}")
    return parts


def display_name(parts: SplitResult) -> str:
    """The URL without its query, which may hold a token."""
    return parts._replace(query="").geturl()


def shown(url: str) -> str:
    """What of a URL that is none may stand in a message: no password and no query."""
    return re.sub(r"\?.*", "?…", re.sub(r"//.*@", "//***@", url, flags=re.DOTALL), flags=re.DOTALL)


def expand_headers(headers: Mapping[str, str] | None, parts: SplitResult) -> tuple[dict[str, str], tuple[str, ...]]:
    """Headers with every ${NAME} replaced by that environment variable, and the secrets, which nobody may be shown.

    Secret are the values from the environment, what a header ends with ("Bearer …") and what the URL's query holds.
    Raises ValueError for a variable that is not set, for what is no header, and where a value from the environment, or
    a header that is a token by its name, would leave this machine unencrypted.
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
        if not isinstance(template, str) or not re.fullmatch(r"[\w-]+", name, re.ASCII) or name.lower() in _OURS:
            raise ValueError(f"headers hold {name!r}, which is no header of your own with a text for its value")
        expanded[name] = re.sub(r"\$\{(\w+)\}", variable, template)
        if not expanded[name].isascii() or not expanded[name].isprintable():
            raise ValueError(f"the header {name!r} must be printable ASCII")
    tokens = bool(secrets) or any(_SECRET_HEADER.search(name) for name in expanded)
    if tokens and parts.scheme in ("http", "grpc") and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"{display_name(parts)} is not encrypted: tokens are sent by https or grpcs only")
    written = [*(value.split()[-1] for value in expanded.values() if value.split()), *_query_values(parts)]
    secrets += [value for value in written if len(value) >= _SHORTEST_SECRET]
    return expanded, tuple(sorted(set(secrets), key=len, reverse=True))


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
        self._keeps = True  # whether connections are used again; not once the server has closed one without a word

    def send(self, method: str, url: str, body: bytes | None, seconds: float) -> bytes:
        """The body of the answer, of at most `limit` bytes, within `seconds`. Raises Refused or Unavailable.

        Their messages may repeat what the server said, tokens included: see `hide`.
        """
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
        said = f"{self.name} answers with status {status}{_message(answer)}"
        if status in _LATER or status >= 500:
            raise Unavailable(said, _retry_after(headers.get("Retry-After")))
        raise Refused(said, hopeless=status in _NEVER)

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            to = urlsplit(target)
        except ValueError:
            target, to = "", urlsplit("")
        if not location or to[:2] != urlsplit(url)[:2]:
            host = one_line(Exception(to.hostname or "nowhere"), 100)
            raise Refused(f"{self.name} redirects to {host}, and nothing is sent to other hosts", True)
        return target

    def _exchange(
        self, method: str, url: str, body: bytes | None, end: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        seconds, timer, expired = end - time.monotonic(), None, threading.Event()
        kept = False
        late = f"{self.name} does not answer within {max(seconds, 0.0):.3g} seconds"
        try:
            connection, kept = self._connected(end)
            connection.sock.settimeout(max(0.001, end - time.monotonic()))
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
            if len(answer) > self.limit or response.will_close or not self._keeps:
                self.close()
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise Refused(f"{self.name} has no valid certificate ({one_line(error)})", hopeless=True) from None
        except _TooLong:
            self.close()
            raise Refused(f"{self.name} answers with more than {self.limit} bytes") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if expired.is_set() or isinstance(error, TimeoutError):
                raise Unavailable(late) from None
            lost = isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)
            self._keeps &= not (kept and lost)
            reached = lost or not isinstance(error, OSError)
            said = f"{self.name} {'closes the connection' if lost else 'cannot be asked'} ({one_line(error)})"
            raise Unavailable(
                said + ("" if reached else _proxy_hint(self.parts)), 0.0, reached, kept and lost
            ) from None
        finally:
            if timer is not None:
                timer.cancel()
        if expired.is_set():  # a body that ends where the connection does would pass for a whole one
            self.close()
            raise Unavailable(late)
        if len(answer) > self.limit:
            raise Refused(f"{self.name} answers with more than {self.limit} bytes")
        if response.length:
            self.close()
            raise Unavailable(f"{self.name} closes the connection ({response.length} bytes of its answer are missing)")
        return response.status, response.headers, answer

    def _connected(self, end: float) -> tuple[http.client.HTTPConnection, bool]:
        """The connection that was kept and True, or a new one where there is none or the server has closed it."""
        kept = self._connection
        if kept is not None and (kept.sock is None or _has_something_to_read(kept.sock)):
            self.close()
        if self._connection is not None:
            return self._connection, True
        host, standard = self.parts.hostname or "", 443 if self.parts.scheme == "https" else 80
        connection = http.client.HTTPConnection(host, self.parts.port or standard)
        connection.default_port, connection.response_class = standard, _Response
        connection.sock = _open(host, connection.port, end)
        self._connection = connection
        if self.parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        return connection, False


class _TooLong(Exception):
    """An answer has more bytes than anybody reads."""


class _Limited(io.RawIOBase):
    """What a connection brings, up to a number of bytes, whatever lengths are claimed in it. Raises _TooLong."""

    def __init__(self, raw: io.RawIOBase, limit: int) -> None:
        super().__init__()
        self._raw, self._left = raw, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise _TooLong
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Limited(self.fp.detach(), MAXIMUM_ANSWER + MAXIMUM_FRAME))


def _has_something_to_read(idle: socket.socket) -> bool:
    """Before anything was asked, that is the connection's end, or bytes that answer nothing."""
    poll = select.poll()
    poll.register(idle, select.POLLIN)
    return bool(poll.poll(0))


def _open(host: str, port: int, end: float) -> socket.socket:
    """A connection to the first address of a host that takes one, all within the time. Raises OSError."""
    failure: OSError = TimeoutError("timed out")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        seconds = end - time.monotonic()
        if seconds <= 0.0:
            break
        opened = socket.socket(family, kind, protocol)
        try:
            opened.settimeout(seconds)
            opened.connect(address)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            opened.close()
            failure = error
        else:
            opened.settimeout(max(0.001, end - time.monotonic()))
            return opened
    raise failure


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
    if re.fullmatch(r"\d+", value.strip()):
        return float(value.strip()[:300])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _query_values(parts: SplitResult) -> list[str]:
    """What a URL's query may hold in secret, as written and decoded."""
    pieces = [piece.rpartition("=")[2] for piece in parts.query.split("&")]
    return [*pieces, *(value for _, value in parse_qsl(parts.query))]


def _proxy_hint(parts: SplitResult) -> str:
    """What to add where nothing can be reached and other programs would have asked a proxy."""
    name = f"{parts.scheme}_proxy"
    found = next((each for each in (name, name.upper()) if os.environ.get(each)), None)
    return "" if found is None else f"; {found} is set, and proxies are not used"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
