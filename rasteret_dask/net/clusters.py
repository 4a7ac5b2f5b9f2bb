# SPDX-License-Identifier: Apache-2.0
"""Which Dask cluster is meant: the one in ``client=``, the current one, or none.

``distributed`` is imported only where there is a cluster: a process that reads by itself, such as a training
worker, starts sooner without it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, cast
from urllib.parse import urlsplit

import dask.config
from dask.utils import parse_timedelta

from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.net import remote

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "ClientLike", "address_of", "check", "meant", "resource_mark", "using", "worker_name", "workers_of",
]  # fmt: skip


ANSWERS = "a Dask scheduler that answers"

GREETING_S = 5.0
"""Seconds that a scheduler which takes a connection has to greet."""


class HasScheduler(Protocol):
    """A Dask cluster: ``LocalCluster``, ``KubeCluster``, ``GatewayCluster`` and others have no class in common."""

    @property
    def scheduler_address(self) -> str:
        """Where clients connect."""


ClientLike: TypeAlias = "Client | HasScheduler | str | None"
"""What ``client=`` takes: a client, a cluster, a scheduler's address, or None for the current client."""


def check(client: Any, subject: str) -> None:
    """Raise PlanError where ``client`` is no Dask client, no cluster, no address and not None."""
    if client is None or isinstance(client, str) or _is_cluster(client):
        return
    loaded = sys.modules.get("distributed")
    if loaded is None or not isinstance(client, loaded.Client):
        raise PlanError(subject, repr(client), "a Dask client or cluster, a scheduler's address, or None")


def _is_cluster(client: Any) -> TypeGuard[HasScheduler]:
    """Tell whether ``Client(client)`` takes it for a cluster: not all of them are distributed's own class."""
    loaded = sys.modules.get("distributed")
    is_client = loaded is not None and isinstance(client, loaded.Client)
    return not is_client and isinstance(getattr(client, "scheduler_address", None), str)


def meant(client: ClientLike) -> tuple[Client | None, bool]:
    """Return the client that is meant, and whether it was made here and is to be closed.

    Parameters
    ----------
    client
        A client; a cluster, such as ``LocalCluster``, ``KubeCluster`` or ``GatewayCluster``; a scheduler's address;
        or None: the current client, where there is one.

    Raises
    ------
    JobError
        When no scheduler answers, it wants certificates that this process does not have, or the client or cluster is
        closed.
    """
    if client is None:
        return _current(), False
    if isinstance(client, str):
        _check_gateway(client)
        _check_certificates(client)
        _check_answer(client)
        subject, expected = _named(client), ANSWERS
    elif _is_cluster(client):
        subject, expected = f"cluster {client!r:.100}", "one that runs"
    else:
        running = cast("Client", client)
        if running.status in ("closing", "closed"):
            raise JobError(
                "client", f"one that is {running.status}", "one that is connected", "Make a new Client."
            )
        return running, False
    from distributed import Client

    try:
        return Client(client, set_as_default=False), True
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cluster that is closed
        raise JobError(subject, str(error), expected) from error


def _check_gateway(address: str) -> None:
    """Raise JobError for an address of dask-gateway: only its own client has the cluster's certificate."""
    if address.startswith("gateway://"):
        name = urlsplit(address).path.strip("/") or "the cluster's name"
        raise JobError(
            f"scheduler {remote.redact(address)}", "an address of dask-gateway, which says nothing of its certificate",
            "a cluster or a client of dask-gateway",
            f"Give client=Gateway().connect({name!r}) (from dask_gateway import Gateway), or its get_client().",
        )  # fmt: skip


def _named(address: str) -> str:
    return f"scheduler {remote.redact(address)}"


def _check_answer(address: str) -> None:
    """Raise JobError where no Dask scheduler answers at an address.

    A Client that asks something else waits for ever for the answer, or takes the first bytes of it for the size of a
    message; and one that has begun without connecting keeps the process for a minute at its end.
    """
    from distributed.comm.core import connect
    from distributed.security import Security
    from distributed.utils import LoopRunner

    if address.startswith("inproc://") or dask.config.get("distributed.client.security-loader", None):
        return
    patience = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"), default="s")

    async def ask() -> None:
        asked = connect(address, patience, **Security().get_connection_args("client"))
        (await asyncio.wait_for(asked, patience + GREETING_S)).abort()

    try:
        LoopRunner(asynchronous=False).run_sync(ask)
    except TimeoutError:
        found = "something that takes connections and says nothing that Dask understands"
    except MemoryError:
        found = "something that speaks another protocol, such as HTTP"
    except (OSError, ValueError, RuntimeError) as error:
        found = str(error)
    else:
        return
    raise JobError(
        _named(address), found, ANSWERS,
        "Start one, or give the address that it logs, such as tcp://HOST:8786: port 8787 is its dashboard.",
    )  # fmt: skip


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


def address_of(client: Client) -> str:
    """Return a scheduler's address, for messages after it is gone."""
    return str(getattr(client.scheduler, "address", "that is gone"))


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """Return what the scheduler says of each worker: address -> facts.

    Raises
    ------
    JobError
        When the client has no scheduler, as after a cluster that did not start.
    """
    workers: dict[str, dict[str, Any]] | None = client.scheduler_info(n_workers=-1).get("workers")
    if workers is None:
        raise JobError(
            "client", f"one without a scheduler ({client.status})", "one that is connected",
            "Make a new Client, or close this one: the next call then does without.",
        )  # fmt: skip
    return workers


def resource_mark(name: str | None) -> dict[str, float] | None:
    """Return what tasks ask for of a resource that their workers must declare; None where any worker computes.

    It is a mark, not a share: as many tasks run side by side as a worker has threads.
    """
    return None if name is None else {name: 1e-6}


def worker_name() -> str | None:
    """Return the name of the Dask worker that runs the current task; None outside of tasks."""
    loaded = sys.modules.get("distributed")
    if loaded is None:  # a task's worker has imported it
        return None
    try:
        return str(loaded.get_worker().name)
    except ValueError:
        return None


@contextmanager
def using(client: ClientLike) -> Iterator[Client | None]:
    """Use the client that is meant, or None, for the length of a block."""
    running, made_here = meant(client)
    try:
        yield running
    finally:
        if made_here and running is not None:
            _close(running)


def _close(client: Client) -> None:
    """Close a client; one that looks for a scheduler that is gone would log a traceback of that."""
    from distributed.utils import silence_logging_cmgr

    with nullcontext() if client.status == "running" else silence_logging_cmgr("CRITICAL"):
        client.close()


def _current() -> Client | None:
    loaded = sys.modules.get("distributed")
    if loaded is None:  # whoever has a client, or runs on a worker, has imported it
        return None
    try:
        client: Client = loaded.get_client()
    except ValueError:  # there is none
        return None
    return client
