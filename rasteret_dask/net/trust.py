"""Which places an item may name, by where the item itself came from."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import unquote, urljoin, urlsplit

from rasteret_dask.errors import TrustError
from rasteret_dask.net.remote import SCHEMES, is_local, redact

__all__ = ["checked", "resolve"]

_METADATA_HOSTS = ("metadata.google.internal", "metadata.goog", "metadata", "instance-data")
_METADATA_ADDRESSES = ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")


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
        answers for (link-local, cloud metadata), or, from a remote catalog, a local path.
    """
    lower = href.strip().lower()
    if "<vrt" in lower or lower.startswith(("vrt:", "/vsi")) or "\0" in href:
        raise TrustError(subject, f"href {redact(href)[:120]!r}", "a plain path or URL", "Remove the asset.")
    if is_local(href):
        if not local:
            raise TrustError(
                subject,
                f"local path {redact(href)[:120]!r}, named by a remote catalog",
                f"one of {', '.join(s + '://' for s in SCHEMES)}",
                "Save the items beside their files and read them from there.",
            )
        return href
    url = urlsplit(href)
    if url.scheme.lower() not in SCHEMES or not url.netloc:
        raise TrustError(
            subject, f"href {redact(href)[:120]!r}", f"one of {', '.join(s + '://' for s in SCHEMES)}"
        )
    if url.scheme.lower().startswith("http") and _is_metadata(url.hostname or ""):
        raise TrustError(
            subject, f"host {url.hostname!r}, a link-local or metadata address", "a host that serves files"
        )
    return href


def _is_metadata(host: str) -> bool:
    if host.rstrip(".") in _METADATA_HOSTS:
        return True
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            # http clients also take 2852039166 and 0xA9FEA9FE for 169.254.169.254
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_link_local or str(address) in _METADATA_ADDRESSES
