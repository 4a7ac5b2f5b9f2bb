# SPDX-License-Identifier: Apache-2.0
"""The plugin by which a cluster's workers get signatures: in memory, over the cluster's own connections."""

from __future__ import annotations

from uuid import uuid4

from distributed import Client, Worker, WorkerPlugin

from rasteret_dask.catalogs.signing import Carried, adopt, lacking_hosts

__all__ = ["Signatures", "register"]

_NAME = (
    f"rasteret-dask-signatures-{uuid4().hex[:12]}"  # of this process: two clients of a cluster keep theirs
)


class Signatures(WorkerPlugin):
    """Keeps signatures in the memory of each worker's process; the scheduler hands it to workers that join later."""

    def __init__(self, signatures: Carried) -> None:
        self._signatures = signatures

    def __repr__(self) -> str:
        return f"<Signatures of {len(self._signatures[0])} hrefs and {len(self._signatures[1])} places>"

    def setup(self, worker: Worker) -> None:
        """Keep them in this process."""
        adopt(self._signatures)


def register(client: Client, signatures: Carried, hosts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Give every worker, now and later, what it needs to sign; return {worker: hosts that it still cannot sign for}."""
    client.register_plugin(Signatures(signatures), name=_NAME)
    answers = client.run(lacking_hosts, hosts)
    return {worker: left for worker, left in answers.items() if left}
