"""The operator of dask-kubernetes as it is, in a process that knows where the services of kube_server.py are."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


def main(namespace: str) -> None:
    import aiohttp.connector
    import aiohttp.resolver
    from kopf.cli import main as kopf

    resolve = socket.getaddrinfo

    def answer(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        """Answer for the services of the cluster, and for this machine; no other name is asked for anywhere."""
        names = Path(os.environ["KUBE_NAMES"])
        services = json.loads(names.read_text()) if names.exists() else {}
        text = host.decode() if isinstance(host, bytes) else str(host)
        if text in services:
            return resolve("127.0.0.1", services[text][str(port)], *rest, **more)
        if text in ("localhost", "127.0.0.1", "None"):
            return resolve(host, port, *rest, **more)
        raise socket.gaierror(socket.EAI_NONAME, f"no service {text}")

    socket.getaddrinfo = answer
    # aiohttp's own resolver, where one is installed, would ask a name server
    vars(aiohttp.connector)["DefaultResolver"] = aiohttp.resolver.ThreadedResolver
    kopf(["run", "--standalone", "--namespace", namespace, "--module", "dask_kubernetes.operator.controller"])


if __name__ == "__main__":
    main(sys.argv[1])
