"""The main job against stock stackstac on the same pixels: ``python tests/benchmarks/bench_main.py``.

Both read the raw bands of every date of one Sentinel-2-like granule into arrays: ours as chips on the source's
own tiles, stackstac as one cube with its best chunks (one internal tile each). Seconds are wall and CPU, runs in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import stackstac

import rasteret_dask as rd
from rasteret_dask.world import make_world

BANDS = ["B02", "B03", "B04", "B08"]
TILE_PX = 1024


def ours(chips: rd.Chips) -> Any:
    """Return the chips as arrays."""
    return chips.to_xarray()["pixels"].compute()


def theirs(items: list[dict[str, Any]], bounds: tuple[float, ...]) -> Any:
    """Return the same ground as one stackstac cube."""
    cube = stackstac.stack(
        items,
        assets=BANDS,
        epsg=items[0]["properties"]["proj:epsg"],
        resolution=10,
        bounds=bounds,
        snap_bounds=False,
        rescale=False,
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(0),
        properties=False,
        band_coords=False,
        chunksize=(1, 1, TILE_PX, TILE_PX),
    )
    return cube.compute()


def main() -> None:
    """Run both in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rasteret-dask-world")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    world = make_world(arguments.folder)
    s2 = rd.build_from_stac(world.sentinel2, name="s2", bands=BANDS).subset(tile="MGRS-33UVR")
    chips = s2.harmonize(BANDS, units="raw").chips(256, grid="tiles")
    table = chips.table
    bounds = tuple(
        float(f(table.column(n).to_numpy()))
        for f, n in ((np.min, "xmin"), (np.min, "ymin"), (np.max, "xmax"), (np.max, "ymax"))
    )
    items = _items(s2)
    pixels = len(chips) * len(BANDS) * 256 * 256
    cube_pixels = len(items) * len(BANDS) * (bounds[2] - bounds[0]) * (bounds[3] - bounds[1]) / 100
    print(f"ours {pixels / 1e6:.0f} Mpx in {len(chips)} chips, stackstac {cube_pixels / 1e6:.0f} Mpx")
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "stackstac": []}
    with dask.config.set(scheduler="threads"):
        for _ in range(arguments.runs + 1):
            runs: dict[str, Callable[[], Any]] = {
                "ours": lambda: ours(chips),
                "stackstac": lambda: theirs(items, bounds),
            }
            for name, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, found in times.items():
        wall_s, cpu_s = zip(*found[1:], strict=True)  # the first run warms up
        spread = f"{min(wall_s):.2f} to {max(wall_s):.2f}"
        print(
            f"{name:<10} wall {statistics.median(wall_s):.2f} s ({spread}), CPU {statistics.median(cpu_s):.2f} s"
        )
    ratio = [a[0] / b[0] for a, b in zip(times["ours"][1:], times["stackstac"][1:], strict=True)]
    print(f"ours / stackstac: wall {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})")


def _items(s2: rd.Collection) -> list[dict[str, Any]]:
    from rasteret_dask.records import Records

    records = Records(s2.to_table())
    items = []
    for row in range(len(records)):
        assets = {}
        for band in BANDS:
            asset = records.asset(row, band)
            shape = [asset.image.height, asset.image.width]
            assets[band] = {
                "href": asset.href,
                "proj:transform": list(asset.image.transform),
                "proj:shape": shape,
            }
        properties = {"datetime": records.starts[row], "proj:epsg": int(records.epsg[row])}
        items.append({"id": records.ids[row], "properties": properties, "assets": assets})
    return items


if __name__ == "__main__":
    main()
