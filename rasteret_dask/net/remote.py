"""Bytes at a URL, by obstore, synchronously: local paths, http(s), s3, gs and az alike."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, S3Store

from rasteret_dask.catalogs.access import Token, environment, has_keys, remedy, rule_of, token
from rasteret_dask.catalogs.catalogfile import Store
from rasteret_dask.errors import ReadError, StoreError, TrustError

T = TypeVar("T")

__all__ = [
    "MAX_HREF",
    "SCHEMES",
    "Fetched",
    "Head",
    "MissingError",
    "delete",
    "exists",
    "fetch",
    "get",
    "head",
    "is_local",
    "join",
    "listing",
    "local_path",
    "open_href",
    "public",
    "put",
    "redact",
]

SCHEMES = ("http", "https", "s3", "gs", "az")
"""Schemes of remote hrefs."""


MAX_HREF = 16_384
"""Characters of an href. Servers refuse far shorter ones; above 65,534 obstore panics, which is no Exception."""


class _CutError(Exception):
    """A body shorter than announced."""


_FAILURES = (
    BaseError,
    OSError,
    ValueError,
    _CutError,
)  # obstore raises some as builtin OSErrors (FileNotFoundError)

ATTEMPTS = 6
"""Requests for one thing, at most. obstore retries refusals but not a body that is cut short, so we do both."""

BACKOFF_S = 0.25
"""Seconds before the first retry; each further one waits twice as long, times a random 0.5 to 1.5."""

NO_RANGE = "no such range in the file (416)"

_CLIENT = {"connect_timeout": "10s", "read_timeout": "15s", "timeout": "300s"}  # read: without a byte
_NO_RETRY = {"max_retries": 0}
_PERMANENT = re.compile(r"status code: (?:4(?!08|25|29)\d\d|501)")  # 408, 425, 429 pass; 501: no PUT
_REGION = "us-west-2"  # where the public Sentinel-2, Landsat and AEF buckets are


class MissingError(ReadError):
    """There is nothing at this URL."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a store says of an object."""

    size: int
    """Bytes."""
    etag: str | None
    """The store's version of the object, or None where it keeps none."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Some bytes of an object, with what the store says of the whole."""

    data: obstore.Bytes
    head: Head


def is_local(href: str) -> bool:
    """Return whether an href is a path of this machine (or ``file://``)."""
    scheme = href.partition("://")[0].lower() if "://" in href else ""
    return scheme in ("", "file") or len(scheme) == 1  # one letter: a Windows drive


def redact(text: str) -> str:
    """Return text without query strings and user information, which may hold signatures and passwords."""
    return re.sub(r"(?<=://)[^/\s@]+@", "", re.sub(r"\?[^\s\"')]*", "?...", text))


def public(href: str) -> str:
    """Return an href without user, password, query and fragment, fit for messages."""
    try:
        parts = urlsplit(href)
    except ValueError:
        return redact(href)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def join(base: str, *parts: str) -> str:
    """Return the URL of something below a base URL or local directory."""
    bare, mark, query = base.partition("?") if not is_local(base) else (base, "", "")
    return "/".join([bare.rstrip("/"), *(p.strip("/") for p in parts)]) + mark + query


def open_href(href: str) -> tuple[Any, str]:
    """Return the store that holds an href, and the href's path in it.

    Parameters
    ----------
    href
        A local path, or a URL of scheme file, http, https, s3, gs or az. Credentials and endpoints come from
        the environment (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``); without keys there, requests are not signed. What
        the catalog says of the store holds (see :mod:`rasteret_dask.catalogs.access`).

    Raises
    ------
    TrustError
        When it is none of these.
    ReadError
        When it must be signed and cannot be.
    """
    if len(href) > MAX_HREF:
        raise ReadError(
            f"opening {redact(href[:100])}...", f"{len(href):,} characters", f"at most {MAX_HREF:,}"
        )
    try:
        url = urlsplit(href)
    except ValueError as error:
        raise ReadError(f"opening {redact(href)}", str(error), "a URL or a path") from None
    if is_local(href):
        return _store("file", "", "", (), None), local_path(href).lstrip("/")
    if url.scheme.lower() not in SCHEMES or not url.netloc:
        raise TrustError(
            f"opening {redact(href)}",
            f"scheme {url.scheme!r}",
            f"a local path or one of {', '.join(s + '://' for s in SCHEMES)}",
        )
    # obstore percent-encodes paths itself
    path = (unquote(url.path) if url.scheme.startswith("http") else url.path).lstrip("/")
    rule = rule_of(href)
    try:
        if rule is not None and rule.access == "planetary-computer":
            container, _, path = path.partition("/")
            token(_account(url.netloc), container)  # asked for here, where its failure can be told
            return _signed_store(url.scheme.lower(), url.netloc, container), path
        return _store(url.scheme.lower(), url.netloc, url.query, environment(), rule), path
    except _FAILURES as error:
        raise _failure(href, error) from None


def fetch(href: str, start: int = 0, length: int | None = None) -> Fetched:
    """Return bytes of an object; fewer than ``length`` only where the object ends.

    Raises
    ------
    MissingError
        When there is no such object.
    ReadError
        When the store refuses, times out, or cuts the body short, ATTEMPTS times; never with a query string.
    """
    store, path = open_href(href)
    options: Any = None if length is None and start == 0 else {"range": _range(start, length)}

    def once() -> Fetched:
        answer = obstore.get(store, path, options=options)
        meta, data = answer.meta, answer.bytes()
        due = max(0, meta["size"] - start)
        if len(data) < (due if length is None else min(due, length)):
            raise _CutError("a body shorter than announced")
        return Fetched(data, Head(meta["size"], meta["e_tag"]))

    try:
        return _retried(once)
    except _FAILURES as error:
        raise _failure(href, error) from None


def get(href: str, start: int = 0, length: int | None = None) -> bytes:
    """Return bytes of an object: all of it, or ``length`` bytes from ``start``. See :func:`fetch`."""
    return bytes(fetch(href, start, length).data)


def head(href: str) -> Head:
    """Return size and ETag of an object; MissingError where there is none."""
    store, path = open_href(href)
    try:
        meta = _retried(lambda: obstore.head(store, path))
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


def put(href: str, data: bytes | Sequence[Any]) -> str | None:
    """Write an object as a whole, atomically, and return its ETag; local directories are made as needed.

    Pieces (buffers) are sent one after another, without being joined before.

    Raises
    ------
    StoreError
        When the store refuses.
    """
    store, path = open_href(href)
    try:
        answer = _retried(lambda: obstore.put(store, path, data, use_multipart=False))
    except _FAILURES as error:
        raise StoreError(f"writing {redact(href)}", _reason(error)) from None
    return answer["e_tag"]


def delete(href: str) -> None:
    """Remove an object; there being none is not an error."""
    store, path = open_href(href)
    try:
        _retried(lambda: obstore.delete(store, path))
    except FileNotFoundError:
        return
    except _FAILURES as error:
        raise StoreError(f"deleting {redact(href)}", _reason(error)) from None


def listing(url: str) -> dict[str, int]:
    """Return {path relative to ``url``: size in bytes} of every object below a base URL, sorted by path.

    Plain HTTP servers do not list: a ReadError says so.
    """
    store, prefix = open_href(url)
    prefix = prefix.rstrip("/")
    if is_local(url) and not os.path.isdir("/" + prefix):
        return {}

    def once() -> dict[str, int]:
        found = (meta for batch in obstore.list(store, prefix=prefix or None) for meta in batch)
        return {meta["path"][len(prefix) :].lstrip("/"): meta["size"] for meta in found}

    try:
        return dict(sorted(_retried(once).items()))
    except _FAILURES as error:
        raise _failure(url, error) from None


def _retried(call: Callable[[], T]) -> T:
    """Call until it works: refusals that pass, broken connections and cut bodies, a bounded number of times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except (GenericError, _CutError) as error:
            if _PERMANENT.search(str(error)):
                raise
        time.sleep(BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    return call()


def _range(start: int, length: int | None) -> tuple[int, int] | dict[str, int]:
    return {"offset": start} if length is None else (start, start + length)


def local_path(href: str) -> str:
    """Return the absolute path that a local href names; TrustError for GDAL's virtual file systems."""
    path = unquote(urlsplit(href).path) if href.lower().startswith("file://") else href
    path = os.path.abspath(path)
    if path.startswith("/vsi"):
        raise TrustError(f"opening {redact(href)}", "a path of GDAL's virtual file systems", "a plain path")
    return PurePath(path).as_posix()


def _account(netloc: str) -> str:
    return netloc.rpartition("@")[2].partition(".")[0]


@lru_cache(maxsize=64)
def _signed_store(scheme: str, netloc: str, container: str) -> Any:
    """Return the one store of a container: it asks for a token when it needs one, and keeps its connections."""
    options: dict[str, Any] = {
        "account_name": _account(netloc),
        "endpoint": f"{scheme}://{netloc}",
        "client_options": {**_CLIENT, "allow_http": scheme == "http"},
        "retry_config": dict(_NO_RETRY),
    }
    return AzureStore(container, credential_provider=Token(_account(netloc), container), **options)


@lru_cache(maxsize=64)
def _store(
    scheme: str, netloc: str, query: str, variables: tuple[tuple[str, str], ...], rule: Store | None
) -> Any:
    # the environment is part of the key, so that keys set later are seen
    names = dict(variables)
    options: dict[str, Any] = {"client_options": dict(_CLIENT), "retry_config": dict(_NO_RETRY)}
    anonymous = not has_keys(scheme, names)
    match scheme:
        case "file":
            return LocalStore("/")
        case "http" | "https":
            options["client_options"]["allow_http"] = scheme == "http"
            # the query (a signature) is kept by the store and sent with every path below it
            return HTTPStore.from_url(f"{scheme}://{netloc}/" + (f"?{query}" if query else ""), **options)
        case "s3":
            if names.get("AWS_ENDPOINT_URL", names.get("AWS_ENDPOINT", "")).startswith("http://"):
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


def _failure(href: str, error: BaseException) -> ReadError:
    kind = MissingError if isinstance(error, FileNotFoundError | NotADirectoryError) else ReadError
    denied = isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError)
    return kind(f"reading {redact(href)}", _reason(error), "", remedy(href) if denied else "")


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "nothing there (404)"
    if isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError):
        return "access denied (401 or 403)"
    if "status code: 416" in str(error):
        return NO_RANGE
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # without the seconds it took: the same failure reads the same
    return re.sub(r" in [\d.]+\S*s,? after.*?(?= - )", "", redact(lines[0]))[:300]
