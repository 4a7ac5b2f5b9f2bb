"""Ports of tests: no server gets one that another has had, and a process that comes back finds its own free."""

from __future__ import annotations

import os
import random
import socket
import socketserver

__all__ = ["free_port", "no_port_twice"]

_FREE = range(15_000, 32_000)
"""Below those that Linux gives to whoever asks for none, connections included (ip_local_port_range)."""
_CHOICE = random.Random(os.getpid())


def free_port() -> int:
    """Return a port for a server that is started later, or again: nobody is given it meanwhile by chance."""
    while True:
        port = _CHOICE.choice(_FREE)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def no_port_twice() -> None:
    """Give each server of this process a port that none has had before.

    A process knows hosts by name and port: how often they refused, who signs for them, which headers their files had.
    Of a thousand servers some get a port again, and with it what was known of another one.
    """
    bind, had = socketserver.TCPServer.server_bind, set[int]()

    def bind_new(server: socketserver.TCPServer) -> None:
        wanted = server.server_address
        bind(server)
        while wanted[1] == 0 and server.server_address[1] in had:
            server.socket.close()
            server.socket = socket.socket(server.address_family, server.socket_type)
            server.server_address = wanted
            bind(server)
        had.add(int(server.server_address[1]))

    socketserver.TCPServer.server_bind = bind_new  # type: ignore[assignment, method-assign]
