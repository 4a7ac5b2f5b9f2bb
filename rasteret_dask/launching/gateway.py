# SPDX-License-Identifier: Apache-2.0
"""A cluster of dask-gateway, as a JupyterHub has it: submitted, waited for, and shut down at the end."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config

from rasteret_dask.errors import JobError, PlanError, user_level
from rasteret_dask.extras import needs
from rasteret_dask.launching.request import ClusterRequest, seconds_of
from rasteret_dask.net import remote

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import HasScheduler

__all__ = ["OPTIONS", "most_workers", "started", "where_to_look"]

OPTIONS: Mapping[str, str] = MappingProxyType({
    "address": "of the gateway, such as 'https://hub.lab/services/dask-gateway'; by default Dask's gateway.address",
    "proxy_address": "where clients reach schedulers, if not at the address; by default Dask's gateway.proxy-address",
    "auth": "'jupyterhub', 'basic', 'kerberos' or an object of dask_gateway.auth; by default Dask's gateway.auth.type",
    "cluster_options": "what this gateway lets its users choose, by its own names, such as {'profile': 'large'}",
    "memory_unit": "what its option worker_memory counts: 'GiB', 'MiB' or 'B'; by default what its default must mean",
    "start_timeout": "how long its scheduler may take to start: '10 minutes'",
})  # fmt: skip
"""What only this kind takes -> what it is."""

START_TIMEOUT_S = 600.0
"""A node that is started for the cluster, and an image of 1 GB that is pulled, take five minutes."""

A_GATEWAY = "a dask-gateway server"

GIB = 2**30

UNITS: Mapping[str, int] = MappingProxyType({"GiB": 2**30, "MiB": 2**20, "B": 1})
"""What gateways count memory in -> bytes. They do not tell: their documentation has GiB, their own settings bytes."""

LEAST_DEFAULT, MOST_DEFAULT = 2**28, 2**38
"""A gateway gives workers at least 256 MiB, and less than 256 GiB, where nobody asks for more: whatever the default is,
it can then be meant in one of the units only."""

_CLOSED: list[object] = []
"""Gateways after their use, kept until the process ends: one that is collected closes itself once more, which prints an
error, or waits for itself for ever where that happens on the thread of an event loop (dask-gateway 2026.3)."""

Answer = TypeVar("Answer")


@contextmanager
def started(request: ClusterRequest) -> Iterator[HasScheduler]:
    """Start a cluster; it is shut down at the end of the block.

    Raises
    ------
    PlanError
        When no gateway is named, or it refuses the options.
    JobError
        When no gateway answers, it refuses the login, or the cluster does not start.
    """
    with needs("gateway", "a cluster of dask-gateway"):
        import dask_gateway  # noqa: F401
    patience = seconds_of(
        "cluster option 'start_timeout'", request.options.get("start_timeout", START_TIMEOUT_S)
    )
    if (unit := request.options.get("memory_unit", "GiB")) not in UNITS:
        raise PlanError("cluster option 'memory_unit'", repr(unit), f"one of {', '.join(map(repr, UNITS))}")
    with _closed_at_the_end(_gateway(request)) as gateway:
        _answer(gateway, gateway.get_versions, A_GATEWAY)
        name = _submitted(gateway, _chosen(gateway, request))
        cluster = None
        try:
            _await(gateway, name, patience)
            cluster = _answer(gateway, lambda: gateway.connect(name), f"cluster {name}")
            yield cluster
        finally:
            _shut_down(gateway, name, cluster)


def most_workers(threads: int, memory_bytes: int) -> int:
    """Return how many workers there may be where nobody says how many: the gateway has limits of its own."""
    return sys.maxsize


def _gateway(request: ClusterRequest) -> Any:
    """Return a client of the gateway that is meant; nothing is asked yet."""
    from dask_gateway import Gateway

    options = request.options
    address = options.get("address") or dask.config.get("gateway.address", None)
    if address is None:
        raise PlanError(
            "cluster 'gateway'", "no address of a gateway", "the URL of a dask-gateway server",
            "Give options={'address': 'https://...'}, in a recipe address under [cluster.options], or set Dask's "
            "gateway.address (DASK_GATEWAY__ADDRESS), as a JupyterHub with dask-gateway does for its users.",
        )  # fmt: skip
    if "://" not in str(address):
        raise PlanError(f"gateway {address}", "no URL", f"one such as 'https://{address}'")
    try:
        return Gateway(options.get("address"), options.get("proxy_address"), auth=options.get("auth"))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        # a hub's login without a token, a class that is none, a template that names an unset variable
        raise PlanError(
            f"gateway {remote.redact(str(address))}", f"no login: {error}",
            "'jupyterhub', 'basic', 'kerberos', or an object of dask_gateway.auth", _how_to_log_in(options.get("auth")),
        ) from error  # fmt: skip


@contextmanager
def _closed_at_the_end(gateway: Any) -> Iterator[Any]:
    try:
        yield gateway
    finally:
        gateway.close()
        _CLOSED.append(gateway)


def _how_to_log_in(auth: object) -> str:
    kind = (
        auth if isinstance(auth, str) else type(auth).__name__.removesuffix("Auth").lower() if auth else None
    )
    match kind or dask.config.get("gateway.auth.type", "basic"):
        case "jupyterhub":
            return (
                "Restart your server on the hub (File > Hub Control Panel), which renews JUPYTERHUB_API_TOKEN; outside "
                "of a hub, set that variable to a token from its page /hub/token."
            )
        case "kerberos":
            return "Renew your ticket: kinit."
        case _:
            return (
                "Set gateway.auth.type ('jupyterhub' on a hub) and gateway.auth.kwargs in Dask's configuration, such "
                "as {username: ..., password: ...}, or give options={'auth': ...}."
            )


def _answer(gateway: Any, ask: Callable[[], Answer], what: str) -> Answer:
    """Return what a gateway answers; its refusals, and those of networks and of other servers, become one error."""
    from aiohttp import ClientError, ClientResponseError, ContentTypeError
    from dask_gateway import GatewayClusterError, GatewayServerError

    subject = f"gateway {remote.redact(gateway.address)}"
    another = JobError(
        subject, "a server that is no dask-gateway", "the address of a gateway",
        "Ask who runs it; where it is a service of a hub, its address ends with /services/dask-gateway.",
    )  # fmt: skip
    try:
        return ask()
    except ContentTypeError as error:
        raise another from error
    except ClientResponseError as error:
        if error.status not in (401, 403):
            raise JobError(subject, f"{error.status} {error.message}", f"an answer for {what}") from error
        raise _refused_login(gateway, f"{error.status} {error.message}") from error
    except (ClientError, OSError) as error:
        raise JobError(
            subject, f"no answer: {error}", A_GATEWAY,
            "Compare the address with Dask's gateway.address on a machine where it works, and look whether a proxy or "
            "VPN is needed.",
        ) from error  # fmt: skip
    except (GatewayServerError, GatewayClusterError) as error:
        if "API token" in str(error):  # of a hub, which does not know it (any more)
            raise _refused_login(gateway, str(error)) from error
        raise JobError(subject, str(error), what, "Its log, and its administrator, know more.") from error
    except json.JSONDecodeError as error:
        raise another from error
    except ValueError as error:  # 404 and 422
        raise another if what == A_GATEWAY else JobError(subject, str(error), what) from error


def _refused_login(gateway: Any, reason: str) -> JobError:
    return JobError(
        _subject(gateway),
        f"a login that it refuses ({reason})",
        "one that it takes",
        _how_to_log_in(gateway.auth),
    )


def _chosen(gateway: Any, request: ClusterRequest) -> Any:
    """Return the options of a gateway, as they are to be submitted.

    What users may choose differs from gateway to gateway. A size goes to the option that the gateway's documentation
    names for it, where this gateway has that one.
    """
    options, defaults = _offered(gateway)
    chosen = request.options.get("cluster_options") or {}
    size = request.size
    wishes = {"image": size.image, "environment": size.environment, "lifetime": size.lifetime}
    for name, wish in wishes.items():
        option = "environment" if name == "lifetime" else name  # Dask's own setting, as a variable
        if wish and option not in options:
            raise PlanError(
                _subject(gateway), f"WorkerSize({name}=), which it lets nobody choose", _listed(defaults),
                f"Leave {name}= out, or ask its administrator for an option {option!r}.",
            )  # fmt: skip
    for name, value in _sizes(request, defaults).items():
        if name not in chosen:
            _size(gateway, request, options, name, value)
    for name, value in chosen.items():
        try:
            options[name] = value
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                _subject(gateway), f"cluster option {name}={value!r}: {error.args[0]}", _listed(defaults),
                "Correct options={'cluster_options': ...}.",
            ) from error  # fmt: skip
    return options


def _offered(gateway: Any) -> tuple[Any, dict[str, Any]]:
    """Return the options of a gateway, with the defaults of Dask's configuration, and these defaults."""
    try:
        options = _answer(gateway, gateway.cluster_options, "its options")
    except (KeyError, TypeError, JobError) as error:
        if isinstance(error, JobError) and not isinstance(error.__cause__, ValueError):
            raise
        options = _answer(gateway, lambda: gateway.cluster_options(use_local_defaults=False), "its options")
        refused = error.__cause__ if isinstance(error, JobError) else error
        raise PlanError(
            _subject(gateway), f"gateway.cluster.options in Dask's configuration: {refused}", _listed(dict(options)),
            "Correct it there, or in the environment (DASK_GATEWAY__CLUSTER__OPTIONS__...).",
        ) from error  # fmt: skip
    return options, dict(options)


def _listed(defaults: Mapping[str, Any]) -> str:
    texts = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
    return (
        f"options that it has (here with their defaults): {texts}" if texts else "none, as it has no options"
    )


def _unit(request: ClusterRequest, default: float) -> int:
    """Return how many bytes a gateway's option ``worker_memory`` counts as one, given its default."""
    word = request.options.get("memory_unit")
    units = [unit for unit in UNITS.values() if LEAST_DEFAULT <= default * unit < MOST_DEFAULT]
    if word is None and not units:
        raise PlanError(
            "cluster 'gateway'", f"a gateway whose default is worker_memory={default!r}, in a unit that is not clear",
            f"the unit: one of {', '.join(map(repr, UNITS))}",
            "Give options={'memory_unit': 'GiB'}, or set the option yourself: options={'cluster_options': "
            "{'worker_memory': ...}}.",
        )  # fmt: skip
    return units[0] if word is None else UNITS[word]


def _sizes(request: ClusterRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a request a gateway has options for, in the units of its defaults."""
    numbers: dict[str, float] = {
        "worker_cores": request.size.threads,
        "worker_threads": request.size.threads,
        "idle_timeout": request.idle_timeout_s,
    }
    memory, chosen = defaults.get("worker_memory"), request.options.get("cluster_options") or {}
    if isinstance(memory, int | float) and "worker_memory" not in chosen:
        numbers["worker_memory"] = request.memory_bytes / _unit(request, memory)
    sizes: dict[str, Any] = {}
    for name, number in numbers.items():
        match defaults.get(name):
            case bool():
                pass
            case int():
                sizes[name] = math.ceil(number)
            case float():
                sizes[name] = number
    if isinstance(defaults.get("environment"), Mapping):
        settings = request.scheduler_environment
        if request.size.lifetime is not None:
            settings["DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION"] = f"{request.size.lifetime} s"
        sizes["environment"] = {**defaults["environment"], **settings, **request.environment}
    if request.size.image:
        sizes["image"] = request.size.image
    return sizes


def _size(gateway: Any, request: ClusterRequest, options: Any, name: str, value: Any) -> None:
    """Set an option to what is needed; where the gateway does not go so low, its default stays."""
    default = options[name]
    try:
        options[name] = value
    except (TypeError, ValueError) as error:
        if name == "idle_timeout" or (isinstance(value, int | float) and value < default):
            return
        raise JobError(
            _subject(gateway), str(error),
            f"workers of {request.size.threads} threads and {request.memory_bytes / GIB:.2f} GiB, which the tasks need",
            "Fewer threads need less memory: size=rd.WorkerSize(threads=1). Its administrator may allow larger ones.",
        ) from error  # fmt: skip


def _subject(gateway: Any) -> str:
    return f"gateway {remote.redact(gateway.address)}"


def _submitted(gateway: Any, options: Any) -> str:
    """Return the name of a new cluster."""
    try:
        name: str = _answer(gateway, lambda: gateway.submit(options), "a new cluster")
    except JobError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise PlanError(
            _subject(gateway), f"a cluster that it refuses: {error.found}", _listed(dict(options)),
            "Change what it names with options={'cluster_options': ...}.",
        ) from error  # fmt: skip
    return name


def _await(gateway: Any, name: str, patience_s: float) -> None:
    """Wait until the scheduler of a cluster runs."""
    end = time.monotonic() + patience_s
    while True:
        status: str = _answer(gateway, lambda: gateway.get_cluster(name).status.name, f"cluster {name}")
        if status == "RUNNING":
            return
        late = time.monotonic() > end
        if late or status != "PENDING":
            raise JobError(
                f"cluster {name} of {_subject(gateway)}",
                f"status {status}{f' after {patience_s:.0f} s' if late else ''}", "a scheduler that runs",
                "Mostly its image cannot be pulled or has no dask-gateway in it, a quota is used up, or no node has "
                f"room. {where_to_look(name)}",
            )  # fmt: skip
        time.sleep(0.5)


def where_to_look(name: str) -> str:
    """Return how somebody finds out why a cluster does not start."""
    namespace, dot, cluster = name.rpartition(".")
    if dot:  # the gateway's name for a cluster on Kubernetes
        selector = f"--selector gateway.dask.org/cluster={cluster}"
        return f"See why: kubectl --namespace {namespace} describe pods {selector}"
    return "The gateway's log names this cluster and says why."


def _shut_down(gateway: Any, name: str, cluster: Any) -> None:
    """Shut a cluster down: by the gateway, or, where that lets nobody in any more, by the cluster's scheduler."""
    try:
        _answer(gateway, lambda: gateway.stop_cluster(name), f"cluster {name}")
    except JobError as error:
        if cluster is None or not _terminated(gateway, cluster):
            warnings.warn(
                f"Cluster {name} may still run: {error} It ends by itself after the gateway's idle time-out; to end it "
                f"now: dask_gateway.Gateway().stop_cluster({name!r}).",
                stacklevel=user_level(),
            )
    finally:
        if cluster is not None:
            cluster.close(shutdown=False)
            _CLOSED.append(cluster.gateway)


def _terminated(gateway: Any, cluster: Any) -> bool:
    """Ask the scheduler of a cluster to end, which takes the cluster's certificate and no login."""
    from distributed.comm.core import CommClosedError

    try:
        gateway.sync(cluster.scheduler_comm.terminate)
    except CommClosedError:  # it went before it answered
        return True
    except OSError:
        return False
    return True
