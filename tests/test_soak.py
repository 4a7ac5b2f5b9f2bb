"""A job outlasts whatever is killed; ``RASTERET_DASK_SOAK_S`` and ``RASTERET_DASK_SOAK_SEED`` say how long, and who."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from servers import Fault, serving
from soak import Soak, rounds, write

from rasteret_dask.demo.world import World

SECONDS = float(os.environ.get("RASTERET_DASK_SOAK_S", "45"))
SEED = int(os.environ.get("RASTERET_DASK_SOAK_SEED", "1"))


@pytest.mark.slow
def test_scheduler_workers_and_clients_killed_at_random(small_world: World, tmp_path: Path) -> None:
    with serving(small_world.sentinel2.parents[1]) as server:
        source = server.url(str(small_world.sentinel2.relative_to(small_world.sentinel2.parents[1])))
        write(source, str(tmp_path / "expected.zarr"), None)
        server.fault("*.tif", Fault(cut=True, share=0.03))
        soak = Soak(tmp_path, source, tmp_path / "expected.zarr", SEED)
        for _ in rounds(soak, SECONDS):
            server.forget()
            print(soak)
    assert soak.rounds
    assert not soak.errors, f"{soak}\n{soak.errors[0]}"
