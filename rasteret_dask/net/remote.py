# SPDX-License-Identifier: Apache-2.0
"""Bytes at a URL, synchronously: http and https by urllib3; s3, gs, az and what is written by obstore."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from rasteret_dask.catalogs.access import environment, has_keys, remedy
from rasteret_dask.catalogs.catalogfile import Store
from rasteret_dask.catalogs.signing import renew, rule_of, signed, signs_below
from rasteret_dask.errors import CredentialsError, ReadError, StoreError, TrustError
from rasteret_dask.net import gate, localfile
from rasteret_dask.net.answers import Answer, BrokenError, RefusedError
from rasteret_dask.net.gate import ROUNDS, ThrottledError
from rasteret_dask.net.hrefs import SCHEMES, host_of, is_local, join, local_path, public, redact
from rasteret_dask.net.localfile import Fetched, Head
from rasteret_dask.net.refusals import FIND_BUCKET, is_refusal, keys_refusal, lacks_bucket, refusal
from rasteret_dask.net.trust import check_host

if TYPE_CHECKING:
    from rasteret_dask.net.wave import Wave
    from rasteret_dask.net.web import Host

T = TypeVar("T")

__all__ = [
    "MAX_HREF",
    "SCHEMES",
    "Fetched",
    "Folder",
    "Head",
    "MissingError",
    "delete",
    "delete_all",
    "exists",
    "fetch",
    "get",
    "head",
    "is_local",
    "join",
    "listing",
    "local_path",
    "modified",
    "open_href",
    "public",
    "put",
    "put_new",
    "put_stream",
    "redact",
    "request",
]

MAX_HREF = 16_384
"""Characters of an href. Servers refuse far shorter ones; above 65,534 obstore panics, which is no Exception."""

_FAILURES = (  # obstore raises some as builtin OSErrors (FileNotFoundError)
    BaseError, OSError, ValueError, BrokenError, RefusedError, ThrottledError,
)  # fmt: skip

ATTEMPTS = 6
"""Requests for one thing, at most, whatever goes wrong with it."""

BACKOFF_S = 0.25
"""Seconds before the first retry; each further one waits twice as long, times a random 0.5 to 1.5."""

NO_RANGE = "no such range in the file (416)"

_CLIENT = {"connect_timeout": "10s", "read_timeout": "15s", "timeout": "300s"}  # read: without a byte
_NO_RETRY = {"max_retries": 0}
_STATUS = re.compile(r"status code: (\d+)")
_LASTING = re.compile(r"4(?!08|25|29)\d\d|501|507")  # 408, 425, 429 pass; 501: no PUT; 507: no room
_REGION = "us-west-2"  # where the public Sentinel-2, Landsat and AEF buckets are


class MissingError(ReadError):
    """There is nothing at this URL."""


def open_href(href: str) -> tuple[Any, str]:
    """Return the obstore store that holds an href, and the href's path in it.

    Parameters
    ----------
    href
        A local path, or a URL of scheme file, s3, gs or az. Credentials and endpoints come from the environment
        (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``); without keys there, requests are not signed. What the catalog says of
        the store holds (see :mod:`rasteret_dask.catalogs.access`).

    Raises
    ------
    TrustError
        When it is none of these, or its bucket is not on the user's list (:func:`rasteret_dask.trust`).
    ReadError
        When it is a URL of http or https, which is no store.
    """
    _check_length(href)
    if is_local(href):
        return _store("file", "", (), None), local_path(href).lstrip("/")
    check_host(href, f"opening {redact(href)[:300]}")
    if _is_web(href):
        raise ReadError(
            f"opening {public(href)}", "a web server", "a store: a local path, s3://, gs:// or az://",
            "Web servers are only read from; they neither list nor take files.",
        )  # fmt: skip
    url = urlsplit(href)
    try:
        return _store(url.scheme.lower(), url.netloc, environment(), rule_of(href)), url.path.lstrip("/")
    except _FAILURES as error:
        raise _failure(href, error) from None


def fetch(
    href: str, start: int = 0, length: int | None = None, *, memory: NDArray[np.uint8] | None = None
) -> Fetched:
    """Return bytes of an object, and its size and ETag as the same answer tells them.

    Parameters
    ----------
    href
        A local path, or a URL of scheme file, http, https, s3, gs or az.
    start
        First byte.
    length
        Bytes; None for all that follow. Fewer come where the object ends.
    memory
        Where a local file's bytes go, at least ``length`` of them; other stores bring memory of their own.

    Raises
    ------
    MissingError
        When there is no such object.
    TrustError
        When its host, or one that it redirects to, is not to be opened.
    ReadError
        When the store refuses, times out, or cuts the body short, ATTEMPTS times; never with a query string.
    """
    _check_length(href)
    if length == 0:
        return Fetched(memoryview(b""), head(href))
    try:
        if is_local(href):
            return localfile.read(local_path(href), start, length, memory)
        if _is_web(href):
            from rasteret_dask.net import web  # urllib3: local files and stores do without

            return _retried(href, lambda url: web.ranged(web.get, url, start, length))
        store, path = open_href(href)
        options: Any = None if length is None and start == 0 else {"range": _range(start, length)}
        return _retried(href, lambda _: _gotten(store, path, options, start, length))
    except _FAILURES as error:
        raise _failure(href, error) from None


@dataclass(frozen=True, slots=True)
class Folder:
    """Objects below one URL, or the one there, for the reads of one call: what all share is looked at once."""

    url: str
    _host: Host | None
    """Its web server; None where there is none, or each URL is signed."""

    @classmethod
    def of(cls, url: str) -> Folder:
        """Look at a URL; TrustError where its host is not to be opened."""
        _check_length(url)
        if not _is_web(url) or signs_below(url):
            return cls(url, None)
        from rasteret_dask.net import web

        try:
            return cls(url, web.Host.of(url))
        except BrokenError:  # certificates, a proxy: whoever reads is told
            return cls(url, None)

    def fetch(
        self, path: str, start: int, length: int, *, memory: NDArray[np.uint8] | None = None
    ) -> Fetched:
        """Return bytes of an object below it, "" for itself; see :func:`fetch`."""
        href, host = join(self.url, path) if path else self.url, self._host
        if host is None or length == 0:
            return fetch(href, start, length, memory=memory)
        try:
            return _retried(href, lambda url: host.fetch(url, start, length), unsigned=True)
        except _FAILURES as error:
            raise _failure(href, error) from None

    def wave(self) -> Wave | None:
        """Return what asks its web server for many ranges at the same time; None where there is none."""
        if self._host is None:
            return None
        from rasteret_dask.net.wave import Wave

        return Wave(self._host, gate.at(host_of(self.url)), BACKOFF_S)


def get(href: str, start: int = 0, length: int | None = None) -> bytes:
    """Return bytes of an object: all of it, or ``length`` bytes from ``start``. See :func:`fetch`."""
    return bytes(fetch(href, start, length).data)


def head(href: str) -> Head:
    """Return size and ETag of an object; MissingError where there is none."""
    _check_length(href)
    try:
        if _is_web(href):
            return _retried(href, _web_head)
        store, path = open_href(href)
        meta = _retried(href, lambda _: obstore.head(store, path))
    except _FAILURES as error:
        raise _failure(href, error) from None
    return Head(meta["size"], meta["e_tag"])


def exists(href: str) -> bool:
    """Return whether there is an object at this URL (a directory is none)."""
    try:
        head(href)
    except MissingError:
        return False
    return True


def request(
    url: str, method: str, headers: Mapping[str, str], body: bytes | None, read_s: float | None = None
) -> Answer:
    """Ask a web service, with patience; see :func:`rasteret_dask.net.web.ask`.

    Raises
    ------
    TrustError, RefusedError, ThrottledError, BrokenError
        As ``ask`` does, when patience has ended.
    """
    from rasteret_dask.net import web

    return _retried(url, lambda full: web.ask(full, method, headers, body, read_s))


def put(href: str, data: bytes | Sequence[Any]) -> str | None:
    """Write an object as a whole, atomically, and return its ETag; local directories are made as needed.

    Pieces (buffers) are sent one after another, without being joined before.

    Raises
    ------
    StoreError
        When the store refuses, or is a web server; an UnwritableStoreError, at once, where trying again cannot help.
    """
    store, path = _writable(href, "writing")
    try:
        answer = _retried(href, lambda _: obstore.put(store, path, data, use_multipart=False))
    except _FAILURES as error:
        raise _unwritten(
            href, path, error, len(data) if isinstance(data, bytes) else sum(map(len, data))
        ) from None
    return answer["e_tag"]


def put_new(href: str, data: bytes) -> bool:
    """Write an object where there is none, in one step with looking; tell whether it was written.

    S3, Google Cloud Storage, Azure and local disks look and write in one step. Of an S3 server that does not know
    ``If-None-Match``, it either refuses, and the object is looked for before it is put, or writes over what is there:
    whoever puts what others may put too, puts the same bytes.

    Raises
    ------
    StoreError
        As :func:`put`.
    """
    store, path = _writable(href, "writing")
    try:
        _retried(href, lambda _: obstore.put(store, path, data, use_multipart=False, mode="create"))
    except AlreadyExistsError:
        return False
    except _FAILURES as error:
        if not (isinstance(error, NotSupportedError) or _status(error) == 501):
            raise _unwritten(href, path, error, len(data)) from None
        if exists(href):
            return False
        put(href, data)
    return True


def put_stream(href: str, pieces: Callable[[], Iterator[bytes]]) -> None:
    """Write a large object piece by piece, in several requests; it is there when all are, as :func:`put` says.

    Parameters
    ----------
    href
        Where.
    pieces
        Returns its bytes in pieces, the same each time: it is called again where the store fails for a moment.

    Raises
    ------
    StoreError
        As :func:`put`.
    """
    store, path = _writable(href, "writing")
    try:
        _retried(href, lambda _: obstore.put(store, path, pieces(), use_multipart=True))
    except _FAILURES as error:
        raise _unwritten(href, path, error, 0) from None


def _unwritten(href: str, path: str, error: BaseException, nbytes: int) -> StoreError:
    """Return the error of an object that could not be written: a lasting one where trying again cannot help."""
    folder = os.path.dirname("/" + path) if is_local(href) else None
    lasting = refusal(f"writing {redact(href)}", error.__cause__ or error, folder, nbytes)
    return lasting or StoreError(f"writing {redact(href)}", _reason(error))


def delete(href: str) -> None:
    """Remove an object; there being none is not an error."""
    store, path = _writable(href, "deleting")
    try:
        _retried(href, lambda _: obstore.delete(store, path))
    except FileNotFoundError:
        return
    except _FAILURES as error:
        subject = f"deleting {redact(href)}"
        refused = keys_refusal(subject, error.__cause__ or error)
        raise refused or StoreError(subject, _reason(error)) from None


def delete_all(url: str, paths: Sequence[str]) -> None:
    """Remove objects below a base URL, a thousand a request where the store can; those that are not there are not told.

    Raises
    ------
    StoreError
        When the store refuses.
    """
    if not paths:
        return
    store, base = _writable(url, "deleting below")
    names = [join(base, path) for path in paths]
    try:
        _retried(url, lambda _: obstore.delete(store, names))
    except FileNotFoundError:  # of the others, none is left
        return
    except _FAILURES as error:
        subject = f"deleting {len(paths)} objects below {redact(url)}"
        refused = keys_refusal(subject, error.__cause__ or error)
        raise refused or StoreError(subject, _reason(error)) from None


def listing(url: str) -> dict[str, int]:
    """Return {path relative to ``url``: size in bytes} of every object below a base URL, sorted by path.

    Web servers do not list: a ReadError says so.
    """
    return _listed(url, lambda meta: int(meta["size"]))


def modified(url: str) -> dict[str, float]:
    """Return {path relative to ``url``: when it was written, in seconds since 1970 by the store's own clock}."""
    return _listed(url, lambda meta: float(meta["last_modified"].timestamp()))


def _listed(url: str, fact: Callable[[Any], T]) -> dict[str, T]:
    """Return path -> a fact of each object: what else is told of it is not held, as there may be a million."""
    store, prefix = open_href(url)
    prefix = prefix.rstrip("/")
    if is_local(url) and not os.path.isdir("/" + prefix):
        return {}

    def once(_: str) -> dict[str, T]:
        objects = (meta for batch in obstore.list(store, prefix=prefix or None) for meta in batch)
        return {meta["path"][len(prefix) :].lstrip("/"): fact(meta) for meta in objects}

    try:
        return dict(sorted(_retried(url, once).items()))
    except _FAILURES as error:
        raise _failure(url, error) from None


def _check_length(href: str) -> None:
    if len(href) > MAX_HREF:
        raise ReadError(
            f"opening {redact(href[:100])}...", f"{len(href):,} characters", f"at most {MAX_HREF:,}"
        )


def _is_web(href: str) -> bool:
    return href[:8].lower().startswith(("http://", "https://"))


def _writable(href: str, doing: str) -> tuple[Any, str]:
    try:
        return open_href(href)
    except ReadError as error:
        raise StoreError(f"{doing} {redact(href)}", error.found, error.expected, error.remedy) from None


def _web_head(url: str) -> Head:
    from rasteret_dask.net import web

    answer = web.ask(url, "HEAD")
    size = answer.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise RefusedError(answer.status, "an answer to HEAD that does not tell the size")
    return Head(int(size), answer.headers.get("ETag"))


def _gotten(store: Any, path: str, options: Any, start: int, length: int | None) -> Fetched:
    answer = obstore.get(store, path, options=options)
    meta, data = answer.meta, memoryview(answer.bytes())
    due = max(0, meta["size"] - start)
    if len(data) < (due if length is None else min(due, length)):
        raise BrokenError("a body shorter than announced")
    return Fetched(data, Head(meta["size"], meta["e_tag"]))


def _retried(href: str, call: Callable[[str], T], unsigned: bool = False) -> T:
    """Call with the URL to request until it works, a bounded number of times, in the host's turns.

    Refusals that pass, broken connections and cut bodies are tried again after a pause of this thread's; a host that
    refuses everybody is waited for at its gate; after 401 and 403 an href whose access is signed is signed anew, once.
    """
    host = host_of(href)
    refusals: list[ThrottledError] = []
    renewed = False
    attempt = 1
    while True:
        url = href if unsigned else signed(href)
        try:
            if not host:
                return call(url)
            with gate.at(host).turn(BACKOFF_S, refusals):
                return _with_status(call, url)
        except RefusedError as error:
            if error.status in (401, 403) and not renewed and renew(href, url):
                renewed = True
                continue
            if attempt >= ATTEMPTS or error.status < 400 or _LASTING.fullmatch(str(error.status)):
                raise
        except ThrottledError as error:
            if attempt >= ATTEMPTS or gate.at(host).rounds >= ROUNDS:
                raise
            refusals.append(ThrottledError(*error.args))  # without the frames that it went through
            if error.sure or error.wait_s is not None:
                attempt += 1
                continue  # the gate makes it wait
        except BrokenError as error:
            if attempt >= ATTEMPTS or error.final:
                raise
        except GenericError as error:
            if attempt >= ATTEMPTS or is_refusal(error):
                raise
        time.sleep(BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        attempt += 1


def _with_status(call: Callable[[str], T], url: str) -> T:
    """Call; what obstore tells of a status in words is told apart as the web's is."""
    try:
        return call(url)
    except GenericError as error:
        status = _STATUS.search(str(error))
        if status is None:
            raise
        code = int(status[1])
        if code in (429, 503):
            raise ThrottledError(_reason(error), None, code == 429 or "SlowDown" in str(error)) from None
        raise RefusedError(code, _reason(error)) from error  # whose text may hold the store's own code


def _range(start: int, length: int | None) -> tuple[int, int] | dict[str, int]:
    return {"offset": start} if length is None else (start, start + length)


@lru_cache(maxsize=64)
def _store(scheme: str, netloc: str, variables: tuple[tuple[str, str], ...], rule: Store | None) -> Any:
    # the environment is part of the key, so that keys set later are seen
    names = dict(variables)
    options: dict[str, Any] = {"client_options": dict(_CLIENT), "retry_config": dict(_NO_RETRY)}
    anonymous = not has_keys(scheme, names)
    match scheme:
        case "file":
            return LocalStore("/")
        case "s3":
            endpoint = names.get("AWS_ENDPOINT_URL", names.get("AWS_ENDPOINT", ""))
            if rule is not None and rule.endpoint is not None:
                endpoint = options["endpoint"] = rule.endpoint
            if endpoint.startswith("http://"):
                options["client_options"]["allow_http"] = True
            if rule is not None and rule.region:
                options["region"] = rule.region
            elif "AWS_REGION" not in names and "AWS_DEFAULT_REGION" not in names:
                options["region"] = _REGION
            if anonymous or (rule is not None and rule.access == "anonymous"):
                options["skip_signature"] = True
            elif (rule is not None and rule.access == "requester-pays") or (
                names.get("AWS_REQUEST_PAYER", "").lower() == "requester"
            ):
                options["request_payer"] = True
            return S3Store(netloc, **options)
        case "gs":
            return GCSStore(netloc, skip_signature=anonymous, **options)
        case _:
            return AzureStore(netloc, **options)


def _failure(href: str, error: BaseException) -> ReadError | TrustError | CredentialsError:
    if isinstance(error, TrustError):  # a ValueError
        return error
    subject, cause = f"reading {redact(href)[:300]}", error.__cause__ or error
    refused = None if _is_web(href) else keys_refusal(subject, cause)
    if refused is not None:
        return refused
    if lacks_bucket(cause):
        return MissingError(subject, "no such bucket (404)", "one that is there", FIND_BUCKET)
    gone = isinstance(error, FileNotFoundError | NotADirectoryError) or _status(error) == 404
    return (MissingError if gone else ReadError)(
        subject, _reason(error), "", remedy(href) if _is_denied(error) else ""
    )


def _status(error: BaseException) -> int | None:
    return error.status if isinstance(error, RefusedError) else None


def _is_denied(error: BaseException) -> bool:
    refused = isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError)
    return refused or _status(error) in (401, 403)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError) or _status(error) == 404:
        return "nothing there (404)"
    if _is_denied(error):
        return "access denied (401 or 403)"
    if "status code: 416" in str(error) or _status(error) == 416:
        return NO_RANGE
    if isinstance(error, RefusedError | ThrottledError | BrokenError):
        return redact(error.text)[:300]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # without the seconds it took: the same failure reads the same
    return re.sub(r" in [\d.]+\S*s,? after.*?(?= - )", "", redact(lines[0]))[:300]
