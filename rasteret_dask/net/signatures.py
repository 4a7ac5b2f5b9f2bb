# SPDX-License-Identifier: Apache-2.0
"""What a cluster's workers need to sign hrefs is sent to them before they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rasteret_dask.catalogs.signing import Carried, carried, check_expired, lacking_hosts, signed_hosts
from rasteret_dask.errors import PlanError
from rasteret_dask.net import clusters

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["send", "send_place", "send_to_current"]

_SENT: WeakKeyDictionary[Client, Carried] = WeakKeyDictionary()


def send(client: Client | None, hrefs: Iterable[str], hosts: tuple[str, ...]) -> None:
    """Send a cluster's workers what this process signs hrefs by, before they read; those that join later get it too.

    Signatures that hrefs arrived with and ready-made query strings travel over the cluster's connections (encrypted
    where it uses TLS) and stay in the memory of scheduler and workers. Of a signer only the name travels.

    Parameters
    ----------
    client
        The cluster; None: this process reads, and is only looked at.
    hrefs
        Of the hosts that want a signature.
    hosts
        Where hrefs arrived signed; none: nothing is sent.

    Raises
    ------
    PlanError
        When a signature has expired, or a worker has none for a host and no signer.
    """
    if not hosts:
        return
    every = list(hrefs)
    check_expired(every)
    if client is None:
        left = lacking_hosts(hosts)
        _check({"this process": left} if left else {})
        return
    grants, places = carried(every)
    before = _SENT.get(client, ({}, ()))
    told = ({**before[0], **grants}, tuple(dict.fromkeys((*before[1], *places))))
    from rasteret_dask.net.signatureplugin import register  # imports distributed

    lacking = register(client, told, hosts)
    _SENT[client] = told
    _check(lacking)


def _check(lacking: Mapping[str, tuple[str, ...]]) -> None:
    """Raise PlanError where there are workers that cannot sign for some hosts."""
    if lacking:
        worker, missing = min(lacking.items())
        raise PlanError(
            f"reading from {', '.join(missing)}",
            f"{len(lacking)} workers without a signature ({worker})",
            "a signer that workers can import, or signatures to send them",
            f"Install the signer's package on the workers and name it: rd.sign('https://{missing[0]}', 'module:name'). "
            "A callable stays in this process. See docs/credentials.md.",
        )


def send_place(client: Client | None, *urls: str) -> None:
    """Send a cluster's workers what they need to read and write below URLs, as :func:`send`."""
    send(client, urls, signed_hosts(urls))


def send_to_current(hrefs: Iterable[str], hosts: tuple[str, ...]) -> None:
    """Send the current client's workers what they need, where there is one: lazy arrays are read by whom is there."""
    client = clusters.meant(None)[0] if hosts else None
    if client is not None and not client.asynchronous:
        send(client, hrefs, hosts)
