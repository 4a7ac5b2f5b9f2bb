# SPDX-License-Identifier: Apache-2.0
"""Ranges of one web server that one thread asks for at the same time, by connections that are open already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from selectors import EVENT_READ, DefaultSelector
from socket import socket

from rasteret_dask.net.answers import Answer, BrokenError, RefusedError
from rasteret_dask.net.gate import Gate, ThrottledError
from rasteret_dask.net.localfile import Fetched
from rasteret_dask.net.web import READ_S, Direct, Host, check_coding, ranged, refuse

__all__ = ["Wave"]

_PIECE = 256 * 1024
"""Bytes that one look at a connection brings, at most."""


@dataclass(slots=True, eq=False)
class _Request:
    """A request under way."""

    number: int
    url: str
    start: int
    length: int
    connection: Direct
    sock: socket
    """The connection's, which it forgets where the server wants to close it."""
    began: float
    """When its turn at the gate was taken."""
    answer: HTTPResponse | None = None
    pieces: list[bytes] = field(default_factory=list)
    """Of the body, as they came."""

    def go_on(self) -> Fetched | None:
        """Take what has come; return all of it when it is there."""
        answer = self.answer
        if answer is None:
            answer = self.answer = self.connection.head()
            if answer.status != 206:
                refuse(answer.status, answer.headers, b"")
            if (
                answer.length is None
            ):  # in chunks, some of which may lie in its buffer: nothing more to wait for
                raise RefusedError(answer.status, "a body without its length")
            check_coding(answer.headers, "identity")
        while True:
            piece = answer.read1(_PIECE)
            self.pieces.append(piece)
            if not piece or answer.length == 0:
                answer.read()  # the end of it, which leaves the connection fit for the next request
                return ranged(self._whole, self.url, self.start, self.length)
            pending = getattr(self.sock, "pending", None)
            if pending is None or not pending():  # TLS may have decrypted more already
                return None

    def _whole(self, *_: object) -> Answer:
        assert self.answer is not None
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        return Answer(self.answer.status, self.answer.headers, body)


class Wave:
    """Requests that are under way at one host.

    Threads that wait for an answer each cost twice the CPU of one that waits for all. Only what goes well is done here:
    who gets no answer from it asks once more, with patience.

    Parameters
    ----------
    host
        The server.
    gate
        Its gate; turns are taken only where they are free at once.
    backoff_s
        How long the gate is closed by a refusal that does not say.
    """

    def __init__(self, host: Host, gate: Gate, backoff_s: float) -> None:
        self._host, self._gate, self._backoff_s = host, gate, backoff_s
        self._selector = DefaultSelector()

    def __len__(self) -> int:
        return len(self._selector.get_map())

    def begin(self, number: int, url: str, start: int, length: int) -> bool:
        """Ask for a range, where there are a turn and a connection for it; tell whether that was so."""
        began = self._gate.free_turn()
        if began is None:
            return False
        connection = self._host.begin(url, {"Range": f"bytes={start}-{start + length - 1}"})
        if connection is None:
            self._gate.leave(began, None, self._backoff_s, answered=False)
            return False
        request = _Request(number, url, start, length, connection, connection.sock, began)
        self._selector.register(request.sock, EVENT_READ, request)
        return True

    def answers(self) -> Iterator[tuple[int, Fetched | None]]:
        """Wait for some answers, and yield them with their numbers; None for who is to ask once more."""
        ready = self._selector.select(READ_S)
        if not ready:  # none has sent a byte for so long
            for request in [key.data for key in self._selector.get_map().values()]:
                self._leave(request, None, answered=False)
                yield request.number, None
        for request in [key.data for key, _ in ready]:
            refusal, found = None, None
            try:
                found = request.go_on()
                if found is None:
                    continue
            except ThrottledError as error:
                refusal = error
            except (RefusedError, BrokenError, HTTPException, OSError, ValueError):
                pass
            self._leave(request, refusal, answered=found is not None)
            yield request.number, found

    def close(self) -> None:
        """Let go of what is under way."""
        for request in [key.data for key in self._selector.get_map().values()]:
            self._leave(request, None, answered=False)
        self._selector.close()

    def _leave(self, request: _Request, refusal: ThrottledError | None, answered: bool) -> None:
        self._selector.unregister(request.sock)
        if not answered:
            request.connection.close()
        self._host.end(request.connection)
        self._gate.leave(request.began, refusal, self._backoff_s, answered)
