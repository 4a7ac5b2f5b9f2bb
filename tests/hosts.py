"""Several hosts on one machine: network namespaces on a switch of their own, and containers on them, as kubelet has.

No address of them is in the machine's own network, and no packet leaves the switch. Disks are shared. Namespaces are
called by the process that makes them: what a process that was killed has left behind, the next one removes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from waiting import PATIENCE_S, until

__all__ = ["Command", "Container", "Host", "Network", "network", "obstacle", "remove_stale"]

PREFIX = "rasteret-test"
NAMES = Path("/etc/netns")
"""``ip netns exec`` lays the files of ``/etc/netns/NAMESPACE`` over those of ``/etc``, such as ``hosts``."""

_COUNT = itertools.count()
_STALE = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\d+-")


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def obstacle() -> str:
    """Say why there can be no hosts on this machine; "" where there can."""
    if shutil.which("ip") is None:
        return "no command `ip` (Debian: iproute2), which makes network namespaces"
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    name = f"{_prefix()}-{next(_COUNT)}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"
    finally:
        _remove(name)
    return ""


@dataclass(frozen=True, slots=True)
class Command:
    """What a container runs."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    """All of it: nothing comes from the environment of the tests."""
    folder: Path
    """Where it runs."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host on a switch."""

    name: str
    """As its neighbours call it."""
    address: str
    namespace: str
    port: str
    """Of the switch, where its cable ends."""
    switch: str

    def start(self, command: Command, log: Path) -> subprocess.Popen[bytes]:
        """Start a command, in a process group and with a log of its own."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command.words],
                env=dict(command.environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, cwd=command.folder,
            )  # fmt: skip

    def output(self, command: Command) -> str:
        """Run a command to its end, which must be good, and return what it has written."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command.words],
            env=dict(command.environment), capture_output=True, text=True, timeout=PATIENCE_S, cwd=command.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[int]:
        """Return the processes that run on it."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).stdout.split()]

    def cut(self) -> None:
        """Pull its cable out: packets are lost, and nobody is told."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        """Plug its cable in again."""
        _ip("-n", self.switch, "link", "set", self.port, "up")


@dataclass(frozen=True, slots=True)
class Network:
    """Hosts that reach each other, and nothing else."""

    hosts: Mapping[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def processes(self) -> list[int]:
        """Return all processes of all hosts."""
        return [pid for host in self.hosts.values() for pid in host.processes()]


@contextmanager
def network(*names: str, aliases: Mapping[str, str] | None = None) -> Iterator[Network]:
    """Make hosts, for the length of a block; at its end their processes are killed and they are gone.

    Parameters
    ----------
    names
        Of the hosts, by which they know each other.
    aliases
        Further names -> the host that is meant, such as those of Kubernetes' services.
    """
    remove_stale()
    prefix = f"{_prefix()}-{next(_COUNT)}"
    switch = f"{prefix}-switch"
    hosts = {
        name: Host(name, f"10.77.0.{number}", f"{prefix}-{number}", f"port{number}", switch)
        for number, name in enumerate(names, 1)
    }
    known = [(host.address, host.name) for host in hosts.values()]
    known += [(hosts[host].address, alias) for alias, host in (aliases or {}).items()]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for host in hosts.values():
            _make(host, known)
        yield Network(hosts)
    finally:
        for namespace in (*(host.namespace for host in hosts.values()), switch):
            _remove(namespace)


def _make(host: Host, known: Sequence[tuple[str, str]]) -> None:
    _ip("netns", "add", host.namespace)
    here, switch = ("-n", host.namespace), ("-n", host.switch)
    _ip(*here, "link", "add", "eth0", "type", "veth", "peer", "name", host.port, "netns", host.switch)
    _ip(*switch, "link", "set", host.port, "master", "br0")
    _ip(*switch, "link", "set", host.port, "up")
    _ip(*here, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip(*here, "link", "set", "eth0", "up")
    _ip(*here, "link", "set", "lo", "up")
    _ip(*here, "route", "add", "default", "dev", "eth0")  # Dask asks which way it would go, and sends nothing
    folder = NAMES / host.namespace
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("".join(f"{a} {n}\n" for a, n in [("127.0.0.1", "localhost"), *known]))
    (folder / "resolv.conf").write_text("")  # nobody is asked for a name


def _prefix() -> str:
    """Return what names of this process begin with: its number, and when it began, in hundredths of a second."""
    return f"{PREFIX}-{os.getpid()}-{round(psutil.Process().create_time() * 100)}"


def remove_stale() -> None:
    """Remove the namespaces of processes that are gone, with whatever still runs there."""
    listed = [line.split()[0] for line in _ip("netns", "list").stdout.splitlines() if line.strip()]
    left = [path.name for path in NAMES.iterdir()] if NAMES.is_dir() else []
    for name in dict.fromkeys([*listed, *left]):
        match = _STALE.match(name)
        if match is not None and not _runs(int(match[1]), int(match[2])):
            _remove(name)


def _runs(pid: int, begun: int) -> bool:
    try:
        return round(psutil.Process(pid).create_time() * 100) == begun
    except psutil.NoSuchProcess:
        return False


def _remove(namespace: str) -> None:
    """Remove a namespace; another process may be about it too."""
    shutil.rmtree(NAMES / namespace, ignore_errors=True)  # containers are not started again without it
    with suppress(subprocess.CalledProcessError):
        while pids := _ip("netns", "pids", namespace).stdout.split():
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        _ip("netns", "del", namespace)
    with suppress(OSError):  # others have theirs there
        NAMES.rmdir()


Policy = Literal["Always", "OnFailure", "Never"]


class Container:
    """A command on a host, started again as kubelet does: at once, then after a pause.

    Parameters
    ----------
    host
        Where.
    command
        What.
    log
        Where its output goes, all starts after another.
    policy
        When it is started again.
    """

    def __init__(self, host: Host, command: Command, log: Path, policy: Policy = "Always") -> None:
        self.host, self.command, self.log, self.policy = host, command, log, policy
        self.codes: list[int] = []
        """What each start has ended with; minus the signal's number where one has ended it."""
        self._stopping = threading.Event()
        self._starting = threading.Lock()
        self._process = host.start(command, log)
        self._thread = threading.Thread(target=self._tend, daemon=True)
        self._thread.start()

    def _tend(self) -> None:
        while True:
            code = self._process.wait()
            _kill_group(self._process.pid)  # with the first process of a container, all of it ends
            self.codes.append(code)
            again = self.policy == "Always" or (self.policy == "OnFailure" and code != 0)
            if not again or self._stopping.wait(PAUSE_S if len(self.codes) > 1 else 0):
                return
            with self._starting:
                if self._stopping.is_set() or not (NAMES / self.host.namespace).is_dir():
                    return
                self._process = self.host.start(self.command, self.log)

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill all of its processes at once, as if their memory was needed."""
        ended = len(self.codes)
        _kill_group(self._process.pid)
        until(lambda: len(self.codes) > ended)

    def wait(self) -> int:
        """Wait until it is not started again; return what it has ended with."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"it did not end:\n{self.text}"
        return self.codes[-1]

    def terminate(self) -> None:
        """Ask it to end, as kubelet asks what is deleted: by SIGTERM to its first process."""
        with self._starting:
            self._stopping.set()
            self._process.terminate()


PAUSE_S = 1.0
"""Between the end of a container that has been started again and its next start; kubelet's pauses grow from 10 s."""


def _kill_group(number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)
