# SPDX-License-Identifier: Apache-2.0
"""Which hosts and paths this package may open: by what an item's origin is, and by the user's list of hosts."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import dask.config

from rasteret_dask.errors import PlanError, TrustError
from rasteret_dask.net.hrefs import SCHEMES, host_of, is_local, plain_host, redact

__all__ = ["FORBIDDEN", "check_address", "check_host", "checked", "resolve", "trust"]

FORBIDDEN: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",  # link-local; on clouds the metadata service, which hands out credentials
        "fe80::/10",
        "fd00:ec2::254/128",  # AWS
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure
        "192.0.0.192/32",  # Oracle
    )
)
"""Addresses that are never connected to. Tests add one of loopback, to see what would have reached them."""

_FORBIDDEN_NAMES = ("metadata.google.internal", "metadata.goog", "metadata", "instance-data")
_EMBEDS_IPV4 = tuple(
    map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48"))
)  # RFC 4291, 6052, 8215
_HOSTS = "rasteret_dask.trust.hosts"
_ONE_OF = f"one of {', '.join(s + '://' for s in SCHEMES)}"


def trust(hosts: Iterable[str] | None) -> Any:
    """Open URLs of these hosts and buckets only; every other one is refused with a TrustError.

    Without a list, every host is open but those that nobody may open: link-local addresses and the metadata services
    of clouds. The list holds for everything that this process opens by URL: assets, STAC APIs and the links of their
    pages, tables, stores that are read or written, and each redirect. It does not hold for what the environment
    names: proxies, ``AWS_ENDPOINT_URL``, and the services that hand out tokens and keys.

    Parameters
    ----------
    hosts
        Patterns: ``"data.example.com"``, ``"*.example.com"`` (any depth, not the domain itself), with or without a
        port, for http and https; ``"https://data.example.com"`` for one of them; ``"s3://bucket"``, ``"gs://team-*"``,
        ``"az://container"`` for buckets. None: no list.

    Returns
    -------
    context manager
        Leaving it brings the former list back. Used as a plain call, the list stays.

    Raises
    ------
    PlanError
        When a pattern is empty or no text.

    Notes
    -----
    This is Dask's configuration ``rasteret_dask.trust.hosts``. A worker process has its own: set it in the workers'
    ``~/.config/dask/*.yaml`` or environment (``DASK_RASTERET_DASK__TRUST__HOSTS='["*.example.com"]'``), or by
    ``client.run(rd.trust, hosts)``. Processes of a LocalCluster made afterwards have it from here.

    Examples
    --------
    >>> import rasteret_dask as rd
    >>> with rd.trust(hosts=["*.example.com", "s3://sentinel-cogs"]):
    ...     rd.load("https://elsewhere.org/records.parquet")
    Traceback (most recent call last):
    rasteret_dask.errors.TrustError: ...
    """
    return dask.config.set({_HOSTS: None if hosts is None else list(_patterns(hosts))})


def resolve(href: str, base: str | None) -> str:
    """Return an href as an absolute URL or local path.

    Parameters
    ----------
    href
        Relative or absolute, as an item or a link gives it.
    base
        The URL or path of the document it stands in, or None.
    """
    if href.lower().startswith("file://"):
        return os.path.abspath(unquote(urlsplit(href).path))
    if not is_local(href):
        return href
    if os.path.isabs(href) or base is None:
        return os.path.abspath(href)
    if is_local(base):
        return os.path.abspath(os.path.join(os.path.dirname(resolve(base, None)), href))
    if base.lower().startswith("http"):
        return urljoin(base, href)
    scheme, _, path = base.partition("://")  # urljoin knows no s3, gs, az
    return f"{scheme}://" + urljoin("http://" + path, href).removeprefix("http://")


def checked(href: str, *, local: bool, subject: str) -> str:
    """Return the href, or refuse it.

    Parameters
    ----------
    href
        As :func:`resolve` returns it.
    local
        True where the item came from this machine: only then it may name local paths.
    subject
        Who names it, for the message: ``item 'a', asset 'red'``.

    Raises
    ------
    TrustError
        When it names VRT text, GDAL's virtual file systems, an address that only this machine's network
        answers for (link-local, cloud metadata), a host that the user's list (:func:`trust`) does not have, or, from a
        remote catalog, a local path.
    """
    lower = href.strip().lower()
    if "<vrt" in lower or lower.startswith(("vrt:", "/vsi")) or "\0" in href:
        raise TrustError(subject, f"href {redact(href)[:120]!r}", "a plain path or URL", "Remove the asset.")
    if is_local(href):
        if not local:
            raise TrustError(
                subject,
                f"local path {redact(href)[:120]!r}, named by a remote catalog",
                _ONE_OF,
                "Save the items beside their files and read them from there.",
            )
        return href
    check_host(href, subject)
    return href


def check_host(href: str, subject: str) -> None:
    """Raise TrustError where a URL's host, by its one spelling, is forbidden or not on the user's list.

    Names are resolved when they are connected to: see :func:`check_address`.
    """
    try:
        url = urlsplit(href)
        scheme, host = url.scheme.lower(), url.netloc.rpartition("@")[2]
        if scheme.startswith("http"):
            host = plain_host(url.hostname or "")
            _ = url.port  # a ValueError where it is no number
    except ValueError as error:  # UnicodeError too
        raise TrustError(subject, f"{_shown(href)}: {str(error)[:120]}", "a URL with a host") from None
    if scheme not in SCHEMES or not url.netloc:
        raise TrustError(subject, _shown(href), _ONE_OF)
    if scheme.startswith("http"):
        if host in _FORBIDDEN_NAMES:
            raise TrustError(
                subject, f"host {host!r}, a link-local or metadata address", "a host that serves files"
            )
        try:
            ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            check_address(host, host, subject)
    allowed = _listed()
    if allowed is not None and not _fits(scheme, host, host_of(href), allowed):
        raise TrustError(
            subject,
            f"host {host!r}" if scheme.startswith("http") else f"bucket {scheme}://{host}",
            f"one of rasteret_dask.trust.hosts: {', '.join(allowed) or 'none'}",
            "Add it by rd.trust(hosts=[...]), here and on every worker, if you trust it.",
        )


def _shown(href: str) -> str:
    return f"href {redact(href)[:120]!r}"


def check_address(address: str, host: str, subject: str) -> None:
    """Raise TrustError where an IP address, which a host's name was resolved to, must not be connected to."""
    found = ipaddress.ip_address(address.partition("%")[0])
    faces = [found]
    if isinstance(found, ipaddress.IPv6Address):
        # all of these reach the IPv4 address inside of them, some through a gateway
        if found.ipv4_mapped is not None:
            faces.append(found.ipv4_mapped)
        if found.sixtofour is not None:
            faces.append(found.sixtofour)
        if any(found in network for network in _EMBEDS_IPV4):
            faces.append(ipaddress.IPv4Address(found.packed[-4:]))
    if any(face in network for face in faces for network in FORBIDDEN):
        named = f"host {host!r}" + (f" at {address}" if address != host else "")
        raise TrustError(subject, f"{named}, a link-local or metadata address", "a host that serves files")


def _listed() -> tuple[str, ...] | None:
    hosts = dask.config.get(_HOSTS, None)
    return None if hosts is None else _patterns(hosts)


def _patterns(hosts: Any) -> tuple[str, ...]:
    if isinstance(hosts, str):  # an environment variable: a,b
        hosts = hosts.replace(",", " ").split()
    patterns = tuple(hosts) if isinstance(hosts, Iterable) else (hosts,)
    if not all(isinstance(pattern, str) and pattern.strip() for pattern in patterns):
        raise PlanError(
            "trust", f"hosts={hosts!r}", 'patterns such as "*.example.com" and "s3://bucket", or None'
        )
    return tuple(pattern.strip().rstrip("/") for pattern in patterns)


def _fits(scheme: str, host: str, place: str, allowed: Sequence[str]) -> bool:
    """Tell whether a host (``place``: with its scheme, and its port where that is not the usual one) is listed."""
    web, port = scheme.startswith("http"), place.partition("://")[2]
    for pattern in allowed:
        lower = pattern.lower() if web else pattern
        spellings = (f"{scheme}://{host}", place) if "://" in pattern else (host, port) if web else ()
        if any(fnmatchcase(spelling, lower) for spelling in spellings):
            return True
    return False
