# SPDX-License-Identifier: Apache-2.0
"""One request by http(s): kept connections, to addresses that are checked, through checked redirects."""

from __future__ import annotations

import atexit
import ipaddress
import logging
import os
import re
import socket
import ssl
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from http.client import HTTPConnection as DirectConnection
from http.client import HTTPException, HTTPResponse, IncompleteRead, responses
from threading import Lock, local
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)
from urllib3.util import create_urllib3_context, wait_for_read

from rasteret_dask._version import __version__
from rasteret_dask.errors import TrustError
from rasteret_dask.net.answers import Answer, BrokenError, RefusedError
from rasteret_dask.net.gate import HOST_CONNECTIONS, ThrottledError, seconds
from rasteret_dask.net.hrefs import plain_host, public, redact
from rasteret_dask.net.localfile import Fetched, Head
from rasteret_dask.net.reply import Reply
from rasteret_dask.net.trust import check_address, check_host

__all__ = [
    "CONNECT_S",
    "READ_S",
    "WHOLE_S",
    "Direct",
    "Host",
    "ask",
    "check_coding",
    "get",
    "ranged",
    "refuse",
]

_log = logging.getLogger(__name__)

CONNECT_S = 10.0
"""Seconds to connect, to each address of a host."""
READ_S = 15.0
"""Seconds without a byte."""
WHOLE_S = 300.0
"""Seconds for an answer as a whole, however it trickles."""
MOST_REDIRECTS = 5
"""One after the other."""

_AGENT = f"rasteret_dask/{__version__}"
_ERROR_BYTES = 64 * 1024  # of the body of a refusal, which may say why
_CODINGS = (
    "",
    "identity",
    "aws-chunked",
)  # the last: stored by mistake beside plain files, says S3's own documentation
_ENVIRONMENT = (
    "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SLOW_DOWN = re.compile(r"\bSlowDown\b|\bServerBusy\b|\bTooManyRequests\b")


def ask(
    url: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    read_s: float | None = None,
) -> Answer:
    """Ask once, and follow redirects.

    Parameters
    ----------
    url
        Of http or https, signed. A user and password in it are sent as Basic authentication, to this host only.
    method
        GET and HEAD follow redirects, as does POST, which becomes a GET after a 301, 302 or 303.
    headers
        To be sent, all of them to this host only but for ``Range`` and those that begin with ``Accept``.
    body
        Sent with POST.
    read_s
        Seconds without a byte; READ_S by default.

    Raises
    ------
    TrustError
        When the host, an address that its name resolves to, or a redirect's is not to be opened; nothing has been
        sent to it.
    RefusedError
        For every other status; a redirect from https to http, to another scheme, or beyond MOST_REDIRECTS.
    ThrottledError
        For 429 and 503.
    BrokenError
        When no whole answer came.
    """
    check_host(url, f"opening {public(url)[:300]}")
    return _followed(url, _Request(method, headers or {}, body, READ_S if read_s is None else read_s))


def get(url: str, headers: Mapping[str, str]) -> Answer:
    """Ask for a URL; see :func:`ask`."""
    return ask(url, headers=headers)


def ranged(
    get: Callable[[str, Mapping[str, str]], Answer], url: str, start: int, length: int | None
) -> Fetched:
    """Return a range by http, after a look whether it is the one that was asked for."""
    if start == 0 and length is None:
        answer = get(url, {})
        size = len(answer.body)
    else:
        last = "" if length is None else start + length - 1
        answer = get(url, {"Range": f"bytes={start}-{last}"})
        told = answer.headers.get("Content-Range", "")
        parts = _RANGE.fullmatch(told.strip())
        if parts is None:
            raise RefusedError(
                answer.status, f"a range without its place in the file (Content-Range {told[:80]!r})"
            )
        first, size = int(parts[1]), int(parts[3])
        due = min(size, size if length is None else start + length) - start
        if first != start or len(answer.body) > due:
            raise RefusedError(
                answer.status, f"another range than bytes {start}-{last} (Content-Range {told[:80]!r})"
            )
        if len(answer.body) < due:
            raise BrokenError("a body shorter than announced")
    return Fetched(memoryview(answer.body), Head(size, answer.headers.get("ETag")))


@dataclass(frozen=True, slots=True)
class Host:
    """A web server that was looked at once: whether it is trusted, and how it is asked now.

    For the requests of one call: the user's list and the environment may be others in the next.
    """

    origin: tuple[str, str, int]
    route: _Route

    @classmethod
    def of(cls, url: str) -> Host:
        """Look at the host of a URL; TrustError where it is not to be opened."""
        check_host(url, f"opening {public(url)[:300]}")
        origin = _Place.of(url).origin
        return cls(origin, _route(origin))

    def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Do as :func:`ask` does, with a URL of this host."""
        return _followed(url, _Request("GET", headers, None, READ_S), self)

    def fetch(self, url: str, start: int, length: int | None) -> Fetched:
        """Return a range of a URL of this host; see :func:`ranged`."""
        return ranged(self.get, url, start, length)

    def begin(self, url: str, headers: Mapping[str, str]) -> Direct | None:
        """Send a request by a connection that is open and idle, and return that; None where there is none."""
        place, direct = _Place.of(url), self.route.direct
        connection = direct.take() if direct is not None and place.origin == self.origin else None
        if connection is None:
            return None
        try:
            connection.send_off(
                place.target, _headers(place, headers), _Request("GET", headers, None, READ_S)
            )
        except (HTTPException, OSError, ValueError):
            connection.close()
            return None
        return connection

    def end(self, connection: Direct) -> None:
        """Have a connection back, whatever became of its answer."""
        assert self.route.direct is not None
        self.route.direct.put(connection)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked, wherever redirects lead."""

    method: str
    headers: Mapping[str, str]
    body: bytes | None
    read_s: float

    def after(self, status: int, elsewhere: bool) -> _Request:
        """Return what is asked after a redirect, to another host or this one."""
        method, body, headers = self.method, self.body, dict(self.headers)
        if elsewhere:
            headers = {
                k: v for k, v in headers.items() if k.lower() == "range" or k.lower().startswith("accept")
            }
        if status == 303 or (status in (301, 302) and method == "POST"):
            method, body = "GET" if method == "POST" else method, None
            headers.pop("Content-Type", None)
        return _Request(method, headers, body, self.read_s)


def _followed(url: str, request: _Request, host: Host | None = None) -> Answer:
    """Ask a URL whose host was looked at, and where that redirects to."""
    for _ in range(1 + MOST_REDIRECTS):
        place = _Place.of(url)
        route = host.route if host is not None and host.origin == place.origin else _route(place.origin)
        answer = _exchange(route, place, request)
        if isinstance(answer, Answer):
            return answer
        status, link = answer
        target = urljoin(f"{place.scheme}://{place.netloc}{place.target}", link)
        subject = f"opening {public(url)[:300]}, which redirects to {public(target)[:300]}"
        after = urlsplit(target).scheme.lower()
        if after not in ("http", "https") or (place.scheme == "https" and after == "http"):
            raise TrustError(
                subject, f"a redirect from {place.scheme} to {after or 'nothing'}", "https, or the same"
            )
        check_host(target, subject)  # before any of it is looked at closer
        request = request.after(status, elsewhere=_Place.of(target).origin != place.origin)
        url = target
    raise RefusedError(status, f"more than {MOST_REDIRECTS} redirects, the last to {public(url)[:300]}")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one request goes: the URL's own parts, its host in the one spelling that has been checked."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as they are sent."""
    user: str
    """``user:password`` or "", percent-encoded."""

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, url: str) -> _Place:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        target = _quoted(parts.path or "/") + (f"?{_quoted(parts.query)}" if parts.query else "")
        port = parts.port or (443 if scheme == "https" else 80)
        user = parts.netloc.rpartition("@")[0]
        return cls(scheme, plain_host(parts.hostname or ""), port, target, user)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


def _quoted(text: str) -> str:
    """Return a path or query with what must not stand in one percent-encoded; what is encoded already stays."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), safe="/%:@!$&'()*+,;=~?")


def _headers(place: _Place, headers: Mapping[str, str]) -> dict[str, str]:
    sent = {"Host": place.netloc, "User-Agent": _AGENT, "Accept": "*/*"}
    sent |= {"Accept-Encoding": "identity", **headers}
    if place.user:
        user = unquote(place.user if ":" in place.user else f"{place.user}:").encode()
        sent["Authorization"] = f"Basic {b64encode(user).decode()}"
    return sent


def _exchange(route: _Route, place: _Place, request: _Request) -> Answer | tuple[int, str]:
    """Return the answer to one request, or the status and target of a redirect."""
    sent = _headers(place, request.headers)
    try:
        with _reply(route, place, sent, request) as answer:
            link = answer.headers.get("Location") if answer.status in (301, 302, 303, 307, 308) else None
            if link is None and 200 <= answer.status < 300:
                if "Range" in sent and answer.status == 200:
                    # not read: a server that knows no ranges sends all of what may be gigabytes
                    raise RefusedError(200, "the whole file, for a range of it: this server knows no ranges")
                check_coding(answer.headers, sent["Accept-Encoding"])
                return Answer(answer.status, answer.headers, answer.read())
            text = answer.read(_ERROR_BYTES)
            if link is not None:
                return answer.status, link
            refuse(answer.status, answer.headers, text)
    except TrustError:  # a ValueError
        raise
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        _broken(error, place)


@contextmanager
def _reply(route: _Route, place: _Place, sent: Mapping[str, str], request: _Request) -> Iterator[Any]:
    """Send a request and give its answer, whose head has come; what is not read of its body is not waited for.

    Python's own connections take half the time of urllib3's; those know proxies and codings.
    """
    if route.direct is not None and sent["Accept-Encoding"] == "identity":
        with route.direct.connection() as connection:
            connection.send_off(place.target, sent, request)
            yield connection.head()
        return
    url = f"http://{place.netloc}{place.target}" if route.forwarded else place.target
    with _quietly():
        answer = route.pool.urlopen(
            request.method, url, request.body, sent, retries=False, redirect=False, assert_same_host=False,
            preload_content=False, decode_content="gzip" in sent["Accept-Encoding"],
            timeout=urllib3.Timeout(connect=CONNECT_S, read=request.read_s),
        )  # fmt: skip
    try:
        yield answer
    finally:
        if not answer.closed:
            answer.close()
        answer.release_conn()


def check_coding(headers: Any, asked_for: str) -> None:
    """Raise RefusedError where a body comes compressed that was asked for as it is."""
    coding = headers.get("Content-Encoding", "").strip().lower()
    if coding not in _CODINGS and "gzip" not in asked_for:
        raise RefusedError(200, f"a body compressed by {coding[:20]!r}, though it was asked for as it is")


def refuse(status: int, headers: Any, body: bytes) -> NoReturn:
    """Raise what an answer that is not good means: ThrottledError or RefusedError."""
    text = f"status {status} ({responses.get(status, 'unknown')})"
    said = body.decode("utf-8", "replace")
    if status in (429, 503):
        raise ThrottledError(
            text, seconds(headers.get("Retry-After")), sure=status == 429 or bool(_SLOW_DOWN.search(said))
        )
    words = " ".join(redact(said).split())[:300] if "json" in headers.get("Content-Type", "") else ""
    raise RefusedError(status, text + (f": {words}" if words else ""))


def _broken(error: Exception, place: _Place) -> NoReturn:
    """Raise BrokenError for what connections raise, without the URL that they tell."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = next((a for a in cause.args if isinstance(a, BaseException)), None) or cause.__cause__
    if cause is not None:
        text = (
            f"a certificate of {place.netloc} that is not trusted ({getattr(cause, 'verify_message', cause)})"
        )
        raise BrokenError(f"{text}; SSL_CERT_FILE names further ones", final=True) from None
    match error:
        case NameResolutionError():
            text = f"no address for the host {place.host}"
        case ConnectTimeoutError():
            text = f"no connection to {place.netloc}: timed out after {CONNECT_S:g} s"
        case NewConnectionError():
            text = f"no connection to {place.netloc}: {str(error).rpartition(': ')[2]}"
        case ReadTimeoutError() | TimeoutError():
            text = "no further byte: the read timed out"
        case IncompleteRead():
            text = f"a body that ends early: {error}"
        case ProxyError():
            text = f"no connection by the proxy: {redact(str(error.args[-1]))}"
        case _:
            text = f"a broken answer: {redact(str(error))}"
    raise BrokenError(text[:300]) from None


# Connections


class _Timed:
    """A socket whose bytes must all come until a moment."""

    until = float("inf")

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if time.monotonic() > self.until:
            raise TimeoutError("the answer took too long as a whole")
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]


class _Socket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    pass


def _connected(connection: Any, host: str, port: int, checked: bool) -> socket.socket:
    """Connect to an address of a host; raise what urllib3 does where there is none, which names the connection."""
    try:
        places = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise NameResolutionError(host, connection, error) from error  # type: ignore[arg-type]
    if checked:
        for *_, place in places:
            check_address(str(place[0]), host, f"connecting to {host}")
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, place in places:
        made = _Socket(family, kind, protocol)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.settimeout(CONNECT_S)
            made.connect(place)
            return made
        except OSError as error:
            made.close()
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, f"timed out after {CONNECT_S} s") from failure
    raise NewConnectionError(connection, str(failure)) from failure


class Direct(DirectConnection):
    """A connection to an address that may be connected to, without a proxy between."""

    response_class = Reply

    def __init__(self, origin: tuple[str, str, int], context: ssl.SSLContext | None) -> None:
        super().__init__(*origin[1:])
        self._tls = context
        self._answer: HTTPResponse | None = None

    def connect(self) -> None:
        """Connect to an address that is checked."""
        made = _connected(self, self.host, self.port, checked=True)
        try:
            self.sock = made if self._tls is None else self._tls.wrap_socket(made, server_hostname=self.host)
        except BaseException:
            made.close()
            raise

    def send_off(self, target: str, headers: Mapping[str, str], request: _Request) -> None:
        """Send a request."""
        self._answer, began = None, time.monotonic()
        if self.sock is None:
            self.connect()
        sock: Any = self.sock
        sock.settimeout(request.read_s)
        sock.until = began + WHOLE_S
        self.request(request.method, target, request.body, headers)
        _log.debug("%s %s:%s%s", request.method, self.host, self.port, target.partition("?")[0])

    def head(self) -> HTTPResponse:
        """Return its answer, whose head has come."""
        self._answer = answer = self.getresponse()
        return answer

    @property
    def is_done(self) -> bool:
        """Whether the last answer was read to its end, so that another request may follow."""
        return self.sock is not None and self._answer is not None and self._answer.isclosed()


@dataclass(frozen=True, slots=True)
class _Directly:
    """Connections to a host without a proxy between; its gate bounds how many are in use."""

    origin: tuple[str, str, int]
    context: ssl.SSLContext | None
    idle: deque[Direct] = field(default_factory=deque)
    """The one used last is the last."""

    @contextmanager
    def connection(self) -> Iterator[Direct]:
        """Lend a connection, which is kept where another request may follow."""
        connection = self.take() or Direct(self.origin, self.context)
        try:
            yield connection
        finally:
            self.put(connection)

    def put(self, connection: Direct) -> None:
        """Keep a connection where another request may follow."""
        if connection.is_done and len(self.idle) < HOST_CONNECTIONS:
            self.idle.append(connection)
        else:
            connection.close()

    def take(self) -> Direct | None:
        """Return an open connection; None where there is none."""
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return None
            if not wait_for_read(connection.sock, 0):
                return connection
            connection.close()  # by the server too, or there is something that nobody asked for


class _Checked:
    """A connection of urllib3 to such an address; through a proxy, whose own address the environment names."""

    def _new_conn(self: Any) -> socket.socket:
        return _connected(self, self._dns_host, self.port, checked=not self.proxy)

    def request(self: Any, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        super().request(*args, **kwargs)  # type: ignore[misc]
        self.sock.until = self.began + WHOLE_S


class _Plain(_Checked, HTTPConnection):
    pass


class _Tls(_Checked, HTTPSConnection):
    pass


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _Tls


@dataclass(frozen=True, slots=True)
class _Route:
    """How a host is asked."""

    pool: HTTPConnectionPool
    direct: _Directly | None
    """None where a proxy lies between."""
    forwarded: bool = False
    """Whether a proxy forwards plain requests of whole URLs there."""


_Routes = dict[tuple[Any, ...], _Route]
_ROUTES: _Routes = {}
_LOCK = Lock()


def _route(origin: tuple[str, str, int]) -> _Route:
    """Return the way to a host. What the environment says of proxies and certificates is looked at for each request."""
    key = (origin, *map(os.environ.get, _ENVIRONMENT))
    made = _ROUTES.get(key)
    if made is None:
        with _LOCK:
            made = _ROUTES.get(key)
            if made is None:
                made = _ROUTES[key] = _made(origin)
    return made


def _made(origin: tuple[str, str, int]) -> _Route:
    scheme, host, port = origin
    options: dict[str, Any] = {"maxsize": HOST_CONNECTIONS, "block": True}
    proxy = _proxy(scheme, host, port)
    if scheme == "https" or (proxy or "").startswith("https"):
        options["ssl_context"] = _tls(*map(os.environ.get, _ENVIRONMENT[-4:]))
    if proxy is None:
        shown = f"[{host}]" if ":" in host else host
        kept = (_TlsPool if scheme == "https" else _PlainPool)(shown, port, **options)
        return _Route(kept, _Directly(origin, options.get("ssl_context")))
    url = urllib3.util.parse_url(proxy)
    manager = urllib3.ProxyManager(
        proxy.replace(f"{url.auth}@", "", 1) if url.auth else proxy,
        proxy_headers=urllib3.make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None,
        proxy_ssl_context=options.get("ssl_context"),
        **options,
    )
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    pool = manager.connection_from_host(host, port, scheme)
    assert isinstance(pool, HTTPConnectionPool)
    return _Route(pool, None, scheme == "http")


def _proxy(scheme: str, host: str, port: int) -> str | None:
    """Return the URL of the proxy that the environment names for a host, None for none."""
    proxies = getproxies_environment()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or proxy_bypass(f"{host}:{port}") or _in_a_network(host, proxies.get("no", "")):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not proxy.lower().startswith(("http://", "https://")):
        raise BrokenError(
            f"a proxy of scheme {proxy.partition('://')[0]!r}, where http or https is served", final=True
        )
    return proxy


def _in_a_network(host: str, bypassed: str) -> bool:
    """Tell whether NO_PROXY has a network (10.0.0.0/8) that an address lies in; Python's own look knows names only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for text in bypassed.split(","):
        try:
            if "/" in text and address in ipaddress.ip_network(text.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


@cache
def _tls(file: str | None, folder: str | None, *bundles: str | None) -> ssl.SSLContext:
    """Return what certificates are checked by: those the environment names, else the system's, else certifi's."""
    context = create_urllib3_context()
    context.sslsocket_class = _TlsSocket
    context.set_alpn_protocols(["http/1.1"])
    bundle = next((b for b in bundles if b), None)
    paths = ssl.get_default_verify_paths()
    try:
        if bundle:
            context.load_verify_locations(**{"capath" if os.path.isdir(bundle) else "cafile": bundle})
        elif file or folder or paths.cafile or paths.capath:
            context.load_default_certs()  # OpenSSL itself looks at SSL_CERT_FILE and SSL_CERT_DIR
        else:
            import certifi

            context.load_verify_locations(certifi.where())
    except OSError as error:
        text = f"certificates that cannot be used ({error.strerror or error})"
        raise BrokenError(f"{text}; look at REQUESTS_CA_BUNDLE and SSL_CERT_FILE", final=True) from None
    return context


# urllib3 logs each request with its query, which may be a signature


class _Ours(local):
    inside = False


_OURS = _Ours()


@contextmanager
def _quietly() -> Iterator[None]:
    _OURS.inside = True
    try:
        yield
    finally:
        _OURS.inside = False


def _without_queries(record: logging.LogRecord) -> bool:
    if _OURS.inside and isinstance(record.args, tuple):
        record.args = tuple(redact(a) if isinstance(a, str) else a for a in record.args)
    return True


logging.getLogger("urllib3.connectionpool").addFilter(_without_queries)

_LEFT: list[_Routes] = []


def _renew() -> None:
    """Start anew in a forked child: connections are its parent's. They are kept: closing them may wait for a lock."""
    global _ROUTES, _LOCK
    _LEFT.append(_ROUTES)
    _ROUTES, _LOCK = {}, Lock()


os.register_at_fork(after_in_child=_renew)


def _close_idle() -> None:
    """Close connections that wait for a next request, as the process ends; urllib3's pools do so by themselves."""
    for route in _ROUTES.values():
        while route.direct is not None and route.direct.idle:
            route.direct.idle.pop().close()


atexit.register(_close_idle)
