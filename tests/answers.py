"""A web server on loopback that answers each request as a function tells, for tests of redirects and refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

__all__ = ["Answers", "Asked", "Said", "answering", "ranged"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    method: str
    path: str
    """With its query."""
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


Respond = Callable[[Asked], Said]


class Answers:
    """A server, and what it was asked."""

    def __init__(self, respond: Respond, host: str = "127.0.0.1", port: int = 0) -> None:
        self.respond = respond
        self.log: list[Asked] = []
        self.clients: set[tuple[str, int]] = set()
        """Addresses of connections."""
        self._server = _Server((host, port), _Handler)
        self._server.owner = self
        self.host, self.port = host, int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def url(self, path: str = "/") -> str:
        """Return the URL of a path."""
        return f"http://{self.host}:{self.port}{path}"

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def answering(respond: Respond, host: str = "127.0.0.1", port: int = 0) -> Iterator[Answers]:
    """Serve for the length of a block."""
    running = Answers(respond, host, port)
    try:
        yield running
    finally:
        running.stop()


def ranged(data: bytes, asked: Asked, **headers: str) -> Said:
    """Return the answer of a server that knows ranges."""
    text = asked.headers.get("range")
    if text is None:
        return Said(200, headers, data)
    first, _, last = text.removeprefix("bytes=").partition("-")
    low, high = int(first), min(int(last or len(data)), len(data) - 1)
    if low >= len(data):
        return Said(416, {"Content-Range": f"bytes */{len(data)}"})
    return Said(206, {"Content-Range": f"bytes {low}-{high}/{len(data)}", **headers}, data[low : high + 1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    owner: Answers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        return

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def _answer(self) -> None:
        owner = cast(_Server, self.server).owner
        length = int(self.headers.get("Content-Length") or 0)
        names = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, names, self.rfile.read(length))
        owner.clients.add(cast(Any, self.client_address))
        owner.log.append(asked)
        said = owner.respond(asked)
        self.send_response(said.status)
        for name, value in said.headers.items():
            self.send_header(name, value)
        if not {"content-length", "transfer-encoding"} & {name.lower() for name in said.headers}:
            self.send_header("Content-Length", str(len(said.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said.body)

    do_GET = do_HEAD = do_POST = do_CONNECT = _answer  # noqa: N815
