"""Whatever ``Client()`` takes is taken: clients, clusters of any class, addresses; only what is opened is closed."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from distributed import Client, LocalCluster
from streams import until
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.compacting import compact
from rasteret_dask.errors import JobError, PlanError
from rasteret_dask.net import clusters


class Like:
    """A cluster that is none of distributed's, as dask-gateway's: it has an address, a loop, security and a status."""

    def __init__(self, inner: LocalCluster) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("scheduler_address", "status", "loop", "security"):
            return getattr(self.inner, name)
        raise AttributeError(name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as running:
        yield running


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    return s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(20)


@pytest.mark.parametrize("how", ["cluster", "like"])
def test_every_exit_takes_a_cluster_and_leaves_it_open(
    chips: rd.Chips, cluster: LocalCluster, how: str, tmp_path: Path
) -> None:
    where: Any = cluster if how == "cluster" else Like(cluster)
    wanted = [b["chip_id"].tolist() for b in chips.stream(4)]
    chips.to_zarr(tmp_path / "store", client=where, progress=False)
    stored = rd.open_chips(tmp_path / "store")
    assert [b["chip_id"].tolist() for b in chips.stream(4, client=where)] == wanted
    assert [b["chip_id"].tolist() for b in rd.stream_from(where, tmp_path / "store", 4)] == wanted
    assert chips.stats(client=where).chips == stored.stats(client=where).chips == 20
    compact(tmp_path / "store", tmp_path / "compact", client=where)
    assert len(rd.open_chips(tmp_path / "compact")) == 20
    scheduler: Any = cluster.scheduler
    until(lambda: not [name for name in scheduler.clients if name.startswith("Client")])
    assert scheduler.workers
    assert cluster.status.name == "running"


def test_the_client_of_a_cluster_is_made_here_and_closed_here(cluster: LocalCluster) -> None:
    with clusters.using(cluster) as client:
        assert client is not None
        made = client
        assert made.status == "running"
    assert made.status == "closed"
    with Client(cluster, set_as_default=False) as mine:
        with clusters.using(mine) as same:
            assert [same] == [mine]
        assert mine.status == "running"


def test_a_cluster_that_is_closed_is_named(chips: rd.Chips, tmp_path: Path) -> None:
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as gone:
        pass
    with pytest.raises(JobError, match=r"cluster LocalCluster\(.*closed.*one that runs"):
        chips.to_zarr(tmp_path / "store", client=gone, progress=False)


def test_an_address_of_a_gateway_says_what_to_give(chips: rd.Chips, tmp_path: Path) -> None:
    address = "gateway://user:secret@gateway.example:8786/abc123"
    for leave in (
        lambda: chips.to_zarr(tmp_path / "store", client=address, progress=False),
        lambda: next(chips.stream(4, client=address)),
        lambda: chips.stats(client=address),
    ):
        with pytest.raises(
            JobError, match=r"dask-gateway.*certificate.*Gateway\(\)\.connect\('abc123'\)"
        ) as raised:
            leave()
        assert "secret" not in str(raised.value)


@pytest.fixture
def others() -> Iterator[dict[str, str]]:
    """Serve what is no scheduler: one says nothing, and one speaks HTTP, as a scheduler's dashboard does."""

    class Dashboard(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            self.request.recv(1)

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dashboard) as web,
    ):
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield {
            "says nothing": f"tcp://127.0.0.1:{silent.getsockname()[1]}",
            "such as HTTP": f"tcp://127.0.0.1:{web.server_address[1]}",
            "missing port": "nonsense",
            "scheme": "http://127.0.0.1:8787",
        }
        web.shutdown()


def test_an_address_of_something_else_is_told_and_no_client_is_begun(
    others: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a client waits for ever, or keeps its process for a minute at the end."""
    monkeypatch.setattr(distributed, "Client", None)
    for words, address in others.items():
        quiet = words == "says nothing"
        monkeypatch.setattr(clusters, "GREETING_S", 0.2 if quiet else PATIENCE_S)
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s" if quiet else f"{PATIENCE_S} s"}),
            pytest.raises(JobError, match=rf"{address}.*{words}.*8787 is its dashboard"),
            clusters.using(address),
        ):
            pass


@pytest.mark.parametrize("strange", [5, object(), ["tcp://127.0.0.1:8786"]])
def test_what_is_none_of_these_is_refused(chips: rd.Chips, strange: Any, tmp_path: Path) -> None:
    for leave in (
        lambda: chips.to_zarr(tmp_path / "store", client=strange, progress=False),
        lambda: chips.stream(4, client=strange),
        lambda: chips.stats(client=strange),
    ):
        with pytest.raises(PlanError, match="a Dask client or cluster, a scheduler's address, or None"):
            leave()
