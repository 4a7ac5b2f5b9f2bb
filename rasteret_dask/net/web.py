"""One request by http(s): pooled connections of urllib3, to addresses that are checked, through checked redirects."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import responses
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
    IncompleteRead,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)
from urllib3.util import create_urllib3_context

from rasteret_dask._version import __version__
from rasteret_dask.errors import TrustError
from rasteret_dask.net.answers import Answer, BrokenError, RefusedError
from rasteret_dask.net.gate import HOST_CONNECTIONS, ThrottledError, seconds
from rasteret_dask.net.hrefs import plain_host, public, redact
from rasteret_dask.net.trust import check_address, check_host

__all__ = ["CONNECT_S", "READ_S", "WHOLE_S", "ask"]

CONNECT_S = 10.0
"""Seconds to connect, to each address of a host."""
READ_S = 15.0
"""Seconds without a byte."""
WHOLE_S = 300.0
"""Seconds for an answer as a whole, however it trickles."""
MOST_REDIRECTS = 5
"""One after the other."""

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
    subject, sent = f"opening {public(url)[:300]}", dict(headers or {})
    check_host(url, subject)
    for _ in range(1 + MOST_REDIRECTS):
        place = _Place.of(url)
        with _quietly():
            answer = _exchange(place, method, sent, body, READ_S if read_s is None else read_s)
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
        if _Place.of(target).origin != place.origin:
            sent = {k: v for k, v in sent.items() if k.lower() == "range" or k.lower().startswith("accept")}
        if status == 303 or (status in (301, 302) and method == "POST"):
            method, body = "GET" if method == "POST" else method, None
            sent.pop("Content-Type", None)
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


def _exchange(
    place: _Place, method: str, headers: Mapping[str, str], body: bytes | None, read_s: float
) -> Answer | tuple[int, str]:
    """Return the answer to one request, or the status and target of a redirect."""
    sent = {"Host": place.netloc, "User-Agent": f"rasteret_dask/{__version__}", "Accept": "*/*"}
    sent |= {"Accept-Encoding": "identity", **headers}
    if place.user:
        user = unquote(place.user if ":" in place.user else f"{place.user}:").encode()
        sent["Authorization"] = f"Basic {b64encode(user).decode()}"
    try:
        pool, forwarded = _pool(place.origin)
        url = f"http://{place.netloc}{place.target}" if forwarded else place.target
        answer = pool.urlopen(
            method, url, body, sent, retries=False, redirect=False, assert_same_host=False, preload_content=False,
            decode_content=False, timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
        )  # fmt: skip
    except TrustError:  # a ValueError
        raise
    except (HTTPError, OSError, ValueError) as error:
        _broken(error, place)
    try:
        link = answer.headers.get("Location") if answer.status in (301, 302, 303, 307, 308) else None
        if link is None and 200 <= answer.status < 300:
            if "Range" in sent and answer.status == 200:
                # not read: a server that knows no ranges sends all of what may be gigabytes
                raise RefusedError(200, "the whole file, for a range of it: this server knows no ranges")
            return Answer(answer.status, answer.headers, _body(answer, "gzip" in sent["Accept-Encoding"]))
        text = answer.read(_ERROR_BYTES)
        if link is not None:
            return answer.status, link
        _refuse(answer.status, answer.headers, text)
    except TrustError:  # a ValueError
        raise
    except (HTTPError, OSError, ValueError) as error:
        _broken(error, place)
    finally:
        if not answer.closed:
            answer.close()  # what is left of its body is not waited for
        answer.release_conn()


def _body(answer: urllib3.BaseHTTPResponse, unpack: bool) -> bytes:
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
    if coding not in _CODINGS and not unpack:
        raise RefusedError(
            answer.status, f"a body compressed by {coding[:20]!r}, though it was asked for as it is"
        )
    return answer.read(decode_content=unpack)


def _refuse(status: int, headers: Mapping[str, str], body: bytes) -> NoReturn:
    text = f"status {status} ({responses.get(status, 'unknown')})"
    said = body.decode("utf-8", "replace")
    if status in (429, 503):
        raise ThrottledError(
            text, seconds(headers.get("Retry-After")), sure=status == 429 or bool(_SLOW_DOWN.search(said))
        )
    words = " ".join(redact(said).split())[:300] if "json" in headers.get("Content-Type", "") else ""
    raise RefusedError(status, text + (f": {words}" if words else ""))


def _broken(error: Exception, place: _Place) -> NoReturn:
    """Raise BrokenError for what urllib3 raises, without the URL that it tells."""
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
        case ReadTimeoutError():
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


class _Checked:
    """A connection to an address that may be connected to; through a proxy, whose own address the environment names."""

    def _new_conn(self: Any) -> socket.socket:
        host = self._dns_host
        try:
            places = socket.getaddrinfo(host, self.port, 0, socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(host, self, error) from error  # type: ignore[arg-type]
        if not self.proxy:
            for *_, place in places:
                check_address(str(place[0]), host, f"connecting to {host}")
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, place in places:
            made = _Socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    made.setsockopt(*option)
                made.settimeout(self.timeout)
                made.connect(place)
                return made
            except OSError as error:
                made.close()
                failure = error
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, f"timed out after {self.timeout} s") from failure
        raise NewConnectionError(self, str(failure)) from failure

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


_Pools = dict[tuple[Any, ...], tuple[HTTPConnectionPool, bool]]
_POOLS: _Pools = {}
_LOCK = Lock()


def _pool(origin: tuple[str, str, int]) -> tuple[HTTPConnectionPool, bool]:
    """Return the connections to a host, and whether a proxy forwards plain requests of whole URLs there.

    What the environment says of proxies and certificates is looked at anew for each request.
    """
    key = (origin, *map(os.environ.get, _ENVIRONMENT))
    made = _POOLS.get(key)
    if made is None:
        with _LOCK:
            made = _POOLS.get(key)
            if made is None:
                made = _POOLS[key] = _made(origin)
    return made


def _made(origin: tuple[str, str, int]) -> tuple[HTTPConnectionPool, bool]:
    scheme, host, port = origin
    options: dict[str, Any] = {"maxsize": HOST_CONNECTIONS, "block": True}
    proxy = _proxy(scheme, host, port)
    if scheme == "https" or (proxy or "").startswith("https"):
        options["ssl_context"] = _tls(*map(os.environ.get, _ENVIRONMENT[-4:]))
    if proxy is None:
        shown = f"[{host}]" if ":" in host else host
        return (_TlsPool if scheme == "https" else _PlainPool)(shown, port, **options), False
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
    return pool, scheme == "http"


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

_LEFT: list[_Pools] = []


def _renew() -> None:
    """Start anew in a forked child: connections are its parent's. They are kept: closing them may wait for a lock."""
    global _POOLS, _LOCK
    _LEFT.append(_POOLS)
    _POOLS, _LOCK = {}, Lock()


os.register_at_fork(after_in_child=_renew)
