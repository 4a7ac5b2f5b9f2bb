# SPDX-License-Identifier: Apache-2.0
"""Whether scheduler and workers can run the tasks of this process, asked before the first one is sent."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import cloudpickle
from dask._task_spec import DataNode
from dask.utils import key_split
from distributed.protocol.pickle import dumps

from rasteret_dask._version import __version__
from rasteret_dask.errors import JobError
from rasteret_dask.lists import first_of
from rasteret_dask.net import probe
from rasteret_dask.net.clusters import workers_of

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["LIBRARIES", "Readiness", "is_this_process"]

LIBRARIES = (
    "google-crc32c", "imagecodecs", "numcodecs", "numpy", "obstore", "pandas", "pyarrow", "pyproj", "rasterio",
    "stackstac", "xarray", "zarr",
)  # fmt: skip
"""Distributions that touch bytes, beside Dask's own."""

_DASK = ("cloudpickle", "dask", "distributed", "msgpack", "toolz", "tornado")
_SCHEDULER = ("cloudpickle", "dask", "distributed", "toolz")  # it opens graphs, and computes nothing

BULKY = 2**16
"""Bytes beside its pickle from which a task is left out of the question: a job's tables, a user's arrays."""

MAX_NAMED = 5
"""Hosts and differences that a message names."""

_hosts_that_open: WeakKeyDictionary[Client, set[tuple[str, int]]] = WeakKeyDictionary()
"""Client -> the hosts that have opened tasks, and which."""


def is_this_process(client: Client) -> bool:
    """Tell whether a client's scheduler runs in this process, whose versions are the same."""
    return str(getattr(client.scheduler, "address", "")).startswith("inproc://")


@dataclass(frozen=True)
class Readiness:
    """Whether a cluster can run tasks, one of each kind of a graph.

    Parameters
    ----------
    client
        The cluster's client.
    subject
        What is to be done on it: goes into messages.
    tasks
        Pickled tasks that a host must be able to open.
    """

    client: Client
    subject: str
    tasks: tuple[bytes, ...]

    @classmethod
    def of(cls, client: Client, subject: str, graph: Mapping[Hashable, Any]) -> Readiness:
        """Take one task of each kind of a graph, and all small roots, such as the user's functions."""
        kinds = {key if isinstance(node, DataNode) else key_split(key): node for key, node in graph.items()}
        pickled = []
        for node in kinds.values():
            apart: list[Any] = []
            data = dumps(node, buffer_callback=apart.append)
            if sum(memoryview(buffer).nbytes for buffer in apart) < BULKY:
                pickled.append(dumps(node) if apart else data)
        return cls(client, subject, tuple(pickled))

    @property
    def question(self) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
        """The arguments of :func:`rasteret_dask.net.probe.look`."""
        return self.tasks, LIBRARIES

    def check(self) -> frozenset[str]:
        """Ask the scheduler and every worker; return the workers' addresses.

        Raises
        ------
        JobError
            When one of them has another Python, lacks the package, a module of the user's or a dependency, or would
            make other pixels. All are named.

        Warns
        -----
        UserWarning
            When versions differ that need not matter, once for all of them.
        """
        token = hash(self.question)
        asked = _hosts_that_open.setdefault(self.client, set())
        workers = frozenset(workers_of(self.client))
        scheduler = str(getattr(self.client.scheduler, "address", ""))
        if {(address, token) for address in (scheduler, *workers)} <= asked:
            return workers
        theirs: Any = self.client.get_versions()
        here = theirs["client"]["packages"]
        self._same_python(here["python"], theirs)
        by_value()
        answers: dict[str, Any] = self.client.run(probe.look, *self.question, on_error="return")
        answers = {
            address: answer if isinstance(answer, dict) else _silent(answer)
            for address, answer in answers.items()
            if not isinstance(answer, OSError)  # gone meanwhile
        }
        answers[scheduler] = self.client.run_on_scheduler(probe.look, *self.question)
        versions, meaning = probe.versions_here(LIBRARIES)
        broken = {
            f"{_role(address, scheduler)} {address} ({answer['host']})": trouble
            for address, answer in answers.items()
            if (trouble := probe.obstacle(answer, str(meaning)))
        }
        packages = {address: dict(own["packages"]) for address, own in theirs["workers"].items() if own}
        wanted = {**{name: here.get(name) for name in _DASK}, **versions}
        differences = _differences(wanted, {a: packages.get(a, {}) | b["versions"] for a, b in answers.items()
                                            if a != scheduler})  # fmt: skip
        dask = {name: here.get(name) for name in _SCHEDULER}
        differences += _differences(dask, {scheduler: theirs["scheduler"]["packages"]})
        if broken:
            raise self._error(broken, len(answers), differences)
        if differences:
            warnings.warn(
                f"{self.subject}: versions differ from this process's; that the job runs does not say that its pixels "
                f"or its store are the same: {first_of(differences, MAX_NAMED, '; ')}",
                stacklevel=2,
            )
        asked.update((address, token) for address in answers)
        return frozenset(answers) - {scheduler}

    def _same_python(self, here: str, theirs: Mapping[str, Any]) -> None:
        """Raise where another Python would read this one's bytecode: functions travel as such."""
        minor = _minor(here)
        hosts = {"scheduler": theirs["scheduler"], **theirs["workers"]}
        other = {
            address: f"Python {_minor(own['packages']['python'])}, here {minor}"
            for address, own in hosts.items()
            if own and _minor(own["packages"]["python"]) != minor
        }
        if other:
            raise self._error(other, len(hosts), [])

    def _error(self, broken: Mapping[str, str], hosts: int, differences: Sequence[str]) -> JobError:
        lines = [f"{host}: {trouble}" for host, trouble in sorted(broken.items())]
        also = f"\nversions that differ: {first_of(differences, MAX_NAMED, '; ')}" if differences else ""
        return JobError(
            self.subject,
            f"{len(broken)} of {hosts} hosts that cannot run its tasks:\n"
            + first_of(lines, MAX_NAMED, "\n")
            + also
            + "\n",
            f"a scheduler and workers with what this process has (rasteret_dask {__version__})",
            "Start them in the same environment or image as this process (each needs the package, its dependencies "
            "and the modules of your own functions), then call this again.",
        )


def by_value() -> None:
    """Have what :mod:`rasteret_dask.net.probe` defines pickled by value: hosts may lack the module."""
    cloudpickle.register_pickle_by_value(probe)


def _silent(error: BaseException) -> dict[str, Any]:
    """Return the answer of a worker that gave none."""
    return {
        "host": "no answer",
        "versions": {},
        "meaning": None,
        "obstacle": f"{type(error).__name__}: {error}",
    }


def _role(address: str, scheduler: str) -> str:
    return "scheduler" if address == scheduler else "worker"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _differences(
    wanted: Mapping[str, str | None], hosts: Mapping[str, Mapping[str, str | None]]
) -> list[str]:
    """Return a line for each version of a library that is not this process's."""
    other: dict[tuple[str, str], list[str]] = defaultdict(list)
    for address, versions in hosts.items():
        for name, version in wanted.items():
            theirs = versions.get(name)
            # GDAL is loaded only where it is needed
            if theirs != version and (name != "gdal" or (theirs and version)):
                other[name, str(theirs)].append(address)
    return [
        f"{name} {version} at {first_of(addresses, MAX_NAMED)} (here {wanted[name]})"
        for (name, version), addresses in sorted(other.items())
    ]
