# SPDX-License-Identifier: Apache-2.0
"""What the text of an href tells: whether it is local, its path, what of it may be shown, its host."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from functools import lru_cache
from pathlib import PurePath
from urllib.parse import unquote, urlsplit, urlunsplit

from rasteret_dask.catalogs.credentials import without_credentials
from rasteret_dask.errors import TrustError

__all__ = ["SCHEMES", "host_of", "is_local", "join", "local_path", "plain_host", "public", "redact"]

SCHEMES = ("http", "https", "s3", "gs", "az")
"""Schemes of remote hrefs."""

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_LONGEST = 253  # characters of a host's name (RFC 1035, 2.3.4)
_PORTS = {"http": 80, "https": 443}


def is_local(href: str) -> bool:
    """Return whether an href is a path of this machine (or ``file://``)."""
    scheme = href.partition("://")[0].lower() if "://" in href else ""
    return scheme in ("", "file") or len(scheme) == 1  # one letter: a Windows drive


def redact(text: str) -> str:
    """Return text without query strings and user information, which may hold signatures and passwords."""
    return without_credentials(re.sub(r"(?<=://)[^/\s@]+@", "", re.sub(r"\?[^\s\"')]*", "?...", text)))


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


def local_path(href: str) -> str:
    """Return the absolute path that a local href names; TrustError for GDAL's virtual file systems."""
    path = unquote(urlsplit(href).path) if href.lower().startswith("file://") else href
    path = os.path.abspath(path)
    if path.startswith("/vsi"):
        raise TrustError(f"opening {redact(href)}", "a path of GDAL's virtual file systems", "a plain path")
    return path if os.sep == "/" else PurePath(path).as_posix()


def host_of(href: str) -> str:
    """Return where an href's bytes come from: scheme and host, or "" for local files.

    Spellings of the same host are one: ``http://HOST:80/a`` and ``http://host/b``.
    """
    if is_local(href):
        return ""
    scheme, _, rest = href.partition("://")
    return _host_of(scheme.lower(), re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2])


@lru_cache(maxsize=4096)
def _host_of(scheme: str, netloc: str) -> str:
    if scheme not in _PORTS:
        return f"{scheme}://{netloc}"
    try:
        parts = urlsplit(f"{scheme}://{netloc}")
        host, port = plain_host(parts.hostname or ""), parts.port or _PORTS[scheme]
    except ValueError:
        return f"{scheme}://{netloc}"  # its own request says what is wrong with it
    bracketed = f"[{host}]" if ":" in host else host
    return f"{scheme}://{bracketed}" + (f":{port}" if port != _PORTS[scheme] else "")


@lru_cache(maxsize=4096)
def plain_host(host: str) -> str:
    """Return the one spelling of an http host that is checked and connected to.

    Percent-encoding, case, Unicode (IDNA with its mapping of full-width digits and ideographic dots), a trailing dot,
    and the decimal, octal, hexadecimal and short forms of IPv4 addresses are undone.

    Parameters
    ----------
    host
        As a URL has it, without brackets and port.

    Returns
    -------
    str
        A name of ASCII letters, digits, dots, hyphens and underscores, an IPv4 address with four decimal parts, or an
        IPv6 address.

    Raises
    ------
    ValueError
        When it is none of these. An IPv6 address with a zone is none: it means another host on every machine.

    Examples
    --------
    >>> plain_host("%31%32%37.0.0.1"), plain_host("0x7f.1"), plain_host("Data.Example.com.")
    ('127.0.0.1', '127.0.0.1', 'data.example.com')
    """
    text = unquote(host, errors="strict")
    if len(text) > _LONGEST:
        raise ValueError(f"a host of {len(text)} characters")
    if ":" in text:
        address = ipaddress.IPv6Address(text)
        if address.scope_id is not None:
            raise ValueError(f"an IPv6 address with a zone, {text!r}")
        return str(address)
    if not text.isascii():
        import idna  # rarely needed, and its tables take a while to load

        text = idna.encode(text, uts46=True).decode()  # IDNAError is a ValueError
    text = text.lower()
    text = text[:-1] if text.endswith(".") else text
    if not _NAME.fullmatch(text) or ".." in text:
        raise ValueError(f"{text!r}, which is no name of a host")
    try:
        return socket.inet_ntoa(socket.inet_aton(text))
    except OSError:
        return text
