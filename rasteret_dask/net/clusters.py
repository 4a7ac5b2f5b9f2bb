"""Which Dask cluster is meant: the one that is given, the current one, or none.

``distributed`` is imported only where there is a cluster: a process that reads by itself, such as a training
worker, starts sooner without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask.config

from rasteret_dask.errors import JobError, PlanError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["check", "meant", "using"]


def check(client: Any, subject: str) -> None:
    """Raise PlanError where ``client`` is no Dask client, no address and not None."""
    if client is None or isinstance(client, str):
        return
    known = sys.modules.get("distributed")
    if known is None or not isinstance(client, known.Client):
        raise PlanError(subject, repr(client), "a Dask client, a scheduler's address, or None")


def meant(client: Client | str | None) -> tuple[Client | None, bool]:
    """Return the client that is meant, and whether it was made here and is to be closed.

    Parameters
    ----------
    client
        A client, a scheduler's address, or None: the current client, where there is one.

    Raises
    ------
    JobError
        When no scheduler answers, it wants certificates that this process does not have, or the client is closed.
    """
    if client is None:
        return _current(), False
    if not isinstance(client, str):
        if client.status in ("closing", "closed"):
            raise JobError(
                "client", f"one that is {client.status}", "one that is connected", "Make a new Client."
            )
        return client, False
    from distributed import Client

    _check_certificates(client)
    try:
        return Client(client, set_as_default=False), True
    except (OSError, ValueError) as error:
        raise JobError(f"scheduler {client}", str(error), "a Dask scheduler that answers") from error


def _check_certificates(address: str) -> None:
    """Raise JobError where a TLS scheduler would find no certificate here: a Client only half begins without one."""
    from distributed.security import Security

    if not address.startswith("tls://") or dask.config.get("distributed.client.security-loader", None):
        return
    try:
        found = "no certificate" if Security().get_connection_args("client")["ssl_context"] is None else ""
    except (OSError, ValueError) as error:  # a file that is missing, or holds something else
        found = f"certificates that cannot be used: {error}"
    if found:
        raise JobError(
            f"scheduler {address}", found, "those of the cluster, in Dask's configuration",
            "Set distributed.comm.tls.ca-file, .client.cert and .client.key (DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
            "...), or give a Client; a task on a Dask worker gives None: its worker's client has them.",
        )  # fmt: skip


@contextmanager
def using(client: Client | str | None) -> Iterator[Client | None]:
    """Use the client that is meant, or None, for the length of a block."""
    found, own = meant(client)
    try:
        yield found
    finally:
        if own and found is not None:
            found.close()


def _current() -> Client | None:
    known = sys.modules.get("distributed")
    if known is None:  # whoever has a client, or runs on a worker, has imported it
        return None
    try:
        client: Client = known.get_client()
    except ValueError:  # there is none
        return None
    return client
