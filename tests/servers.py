"""A range server on loopback for tests: notes every request, and deals faults as it is told."""

from __future__ import annotations

import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import cast
from urllib.parse import unquote

__all__ = ["Asked", "Fault", "RangeServer", "serving"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as it was answered."""

    method: str
    path: str
    """Decoded, without the query."""
    first: int | None
    """First byte asked for; None without a range."""
    last: int | None
    """Last byte asked for, inclusive and cut at the file's end; None without a range."""
    status: int

    @property
    def nbytes(self) -> int:
        """Length of the range, 0 without one."""
        return 0 if self.first is None or self.last is None else self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with an answer. The fields can be combined; a status leaves the body out."""

    status: int | None = None
    """Answered instead of bytes: 403, 404, 429, 503, ..."""
    retry_after: str | None = None
    """The header of that name: seconds or an HTTP date."""
    delay_s: float = 0.0
    """Waited before the first byte."""
    together: int = 0
    """No answer begins before so many requests have waited for theirs at once."""
    hold: Event | None = None
    """No answer begins before it is set."""
    cut: bool = False
    """The whole length is announced, half of it is sent, and the connection is closed."""
    stall_s: float = 0.0
    """Half of the body is sent, then nothing for so long, then the connection is closed."""
    short: bool = False
    """Half of the body is announced and sent, as if that were all: a wrong length that looks right."""
    whole: bool = False
    """All of the file is sent, with status 200, whatever the range: what servers do that know no ranges."""
    etag: str | None = None
    """Said to be the file's version, as if it had been replaced by one of the same size."""
    times: int | None = None
    """Hits only the first so many requests that end at the same byte; None: all of them. (Who resumes a cut body
    begins later, and ends at the same byte.)"""
    share: float = 1.0
    """Hits only this share of requests, by a hash of seed, last byte and attempt: whatever the threads do."""
    seed: int = 0

    def hits(self, path: str, last: int | None, attempt: int) -> bool:
        """Tell whether the given attempt (from 1) at a range goes wrong."""
        if self.times is not None and attempt > self.times:
            return False
        return random.Random(f"{self.seed} {path} {last} {attempt}").random() < self.share


class RangeServer:
    """Serves a folder over HTTP/1.1: HEAD, GET, single ranges, ETag, Last-Modified and If-Match.

    Parameters
    ----------
    folder
        What is served. Files may be replaced meanwhile; their ETag then changes.
    address
        Where it listens: host, and port or 0.
    """

    def __init__(self, folder: Path, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.folder, self.address = folder, address
        self.log: list[Asked] = []
        """Every request, in the order in which they came in."""
        self.most = 0
        """The largest number of requests that waited for their answers at the same time."""
        self.connections = 0
        """How many connections were opened."""
        self._open: set[socket.socket] = set()
        self._faults: dict[str, Fault] = {}
        self._attempts: Counter[tuple[str, int | None]] = Counter()
        self._busy = 0
        self._lock = Lock()
        self._stopping = Event()
        self._server = _Server(self)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def host(self) -> str:
        """Address and port."""
        return f"127.0.0.1:{self._server.server_port}"

    def url(self, name: str = "") -> str:
        """Return the URL of a file below the folder."""
        return f"http://{self.host}/{name}"

    def fault(self, pattern: str, fault: Fault) -> None:
        """Let the files of a pattern (``*.tif``) go wrong from now on; the last pattern told wins."""
        with self._lock:
            self._faults = {pattern: fault, **{p: f for p, f in self._faults.items() if p != pattern}}
            self._attempts.clear()

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._faults.clear()
            self._attempts.clear()

    def forget(self) -> None:
        """Begin a new log and new counts."""
        with self._lock:
            self.log.clear()
            self._attempts.clear()
            self.most = self._busy

    def asked(self, pattern: str = "*") -> list[Asked]:
        """Return the requests for the files of a pattern."""
        with self._lock:
            return [a for a in self.log if fnmatchcase(a.path.lstrip("/"), pattern)]

    def attempts(self, pattern: str = "*") -> Counter[tuple[str, int | None, int | None]]:
        """Return how often each (path, first, last) of a pattern was asked for."""
        return Counter((a.path, a.first, a.last) for a in self.asked(pattern))

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more, and let go of those who wait."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    # What a handler asks for

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request from its coming in until its answer begins: never more than a client has in flight."""
        with self._lock:
            self._busy += 1
            self.most = max(self.most, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def connected(self, connection: socket.socket) -> None:
        """Count a connection, to be closed with the server."""
        with self._lock:
            self.connections += 1
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self._open.discard(connection)

    def due(self, path: str, last: int | None) -> Fault:
        """Count an attempt at a range, and return what is to go wrong with it."""
        with self._lock:
            self._attempts[path, last] += 1
            attempt = self._attempts[path, last]
            faults = [f for p, f in self._faults.items() if fnmatchcase(path.lstrip("/"), p)]
        return faults[0] if faults and faults[0].hits(path, last, attempt) else Fault()

    def note(self, asked: Asked) -> None:
        with self._lock:
            self.log.append(asked)

    def wait(self, seconds: float) -> None:
        """Wait, but not longer than the server runs."""
        self._stopping.wait(seconds)

    def wait_for(self, fault: Fault) -> None:
        """Wait for all that an answer has to wait for, but not longer than the server runs."""
        while self.most < fault.together and not self._stopping.is_set():
            self._stopping.wait(0.01)
        while fault.hold is not None and not self._stopping.is_set() and not fault.hold.wait(0.05):
            pass
        self.wait(fault.delay_s)


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder for the length of a block."""
    server = RangeServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256  # of 5, a connection that finds no place comes back after a second

    def __init__(self, owner: RangeServer) -> None:
        self.owner = owner
        super().__init__(owner.address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    @property
    def owner(self) -> RangeServer:
        return cast(_Server, self.server).owner

    def setup(self) -> None:
        super().setup()
        self.owner.connected(self.connection)

    def log_message(self, *_: object) -> None:
        return

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away, as some tests mean it to
            super().handle()

    def finish(self) -> None:
        self.owner.closed(self.connection)
        with suppress(ConnectionError):
            super().finish()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        file = self.owner.folder / path.lstrip("/")
        there = file.is_file() and file.resolve().is_relative_to(self.owner.folder.resolve())
        size = file.stat().st_size if there else 0
        first, last = _range(self.headers.get("Range"), size)
        with self.owner.answering():
            fault = self.owner.due(path, last)
            if fault.whole:
                first = last = None
            version = fault.etag or (f'"{file.stat().st_mtime_ns:x}-{size:x}"' if there else "")
            status = fault.status or self._status(there, first, size, version)
            self.owner.note(Asked(self.command, path, first, last, status))
            self.owner.wait_for(fault)
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            self._refuse(status, fault, size)
            return
        low, high = (0, size - 1) if first is None or last is None else (first, last)
        if fault.short:
            high = low + (high - low) // 2
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "image/tiff")
        self.send_header("ETag", version)
        self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
        self.send_header("Content-Length", str(high - low + 1))
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {low}-{high}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._send(file, low, high, fault)

    def _status(self, there: bool, first: int | None, size: int, version: str) -> int:
        if not there:
            return HTTPStatus.NOT_FOUND
        if self.headers.get("If-Match", version) not in (version, "*"):
            return HTTPStatus.PRECONDITION_FAILED
        if first is None:
            return HTTPStatus.OK
        return HTTPStatus.PARTIAL_CONTENT if first < size else HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE

    def _refuse(self, status: int, fault: Fault, size: int) -> None:
        self.send_response(status)
        if fault.retry_after is not None:
            self.send_header("Retry-After", fault.retry_after)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.send_header("Content-Range", f"bytes */{size}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path, low: int, high: int, fault: Fault) -> None:
        with file.open("rb") as opened:
            opened.seek(low)
            body = opened.read(high - low + 1)
        if not (fault.cut or fault.stall_s):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.owner.wait(fault.stall_s)
        self.close_connection = True


def _range(asked: str | None, size: int) -> tuple[int | None, int | None]:
    """Return first and last byte of a single range, as RFC 9110 (14.1.2) reads it."""
    parts = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if parts is None or parts[0] == "bytes=-":
        return None, None
    if not parts[1]:
        return max(0, size - int(parts[2])), size - 1
    return int(parts[1]), min(int(parts[2]), size - 1) if parts[2] else size - 1
