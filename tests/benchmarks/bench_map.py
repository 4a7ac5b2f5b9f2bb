"""From a model to a map: ``bench_map.py``, in pairs of this package and another way, in turn.

A trivial model (a weighted sum of four bands, then the mean of 3 x 3 pixels) runs over one Sentinel-2-like scene, in
windows of 256 px every 192 px, and the outputs are blended to one map on disk: so what is measured is reading, cutting,
batching, blending and writing. Every process touches 1 GiB before its clock starts.

- ``over odc-stac``, ``over stackstac``: the whole area as one NumPy array, a loop over windows, sums and weights;
- ``TorchGeo``: RasterDataset, GridGeoSampler, a DataLoader and the same sums; both read files of this machine;
- ``rslearn``: a window prepared and materialized, then predicted in crops, which it trims by half their overlap;
- ``overlap``: four bands read, the first one blended, as a multiple of ``to_zarr`` of the same ground without overlap;
- ``overlap4``: the same with all four bands blended.

Pixels of both ways are compared where they blend alike: all but the last two.
``--torchgeo PYTHON`` and ``--rslearn PYTHON`` name interpreters of environments that have these packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pairs
from jobs import MapJob
from nginx import Nginx
from pairs import Pair, Side
from process import THIS, Process, build_tables
from scenes import EPSG, ORIGIN, Kind, items, make_files, sentinel2

OURS = "rasteret_dask to a map"
AS_THEY_ARE = {
    "overlap": "rasteret_dask, a band as it is, to a map",
    "overlap4": "rasteret_dask, bands as they are, to a map",
}
SIZE_PX, STRIDE_PX = 256, 192
MARGIN_PX = 64
"""Of the scene around the area: rslearn's warp loses the first row of a file."""

WAYS = {
    "odc": ("sliding window over odc-stac", "hann"),
    "stackstac": ("sliding window over stackstac", "hann"),
    "torchgeo": ("TorchGeo to a map", "mean"),
    "rslearn": ("rslearn to a map", "centre"),
    "overlap": ("rasteret_dask to Zarr without overlap", "hann"),
    "overlap4": ("rasteret_dask to Zarr without overlap", "hann"),
}
"""Name -> contender, and the blend that both use."""


def main() -> None:
    """Make the scene, serve it, run the pairs, print a table each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--windows", type=int, default=24, help="steps along a side: 24 are 4,864 px")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rasteret-dask-bench")
    parser.add_argument("--torchgeo", type=Path, help="the interpreter of an environment that has TorchGeo")
    parser.add_argument("--rslearn", type=Path, help="the interpreter of an environment that has rslearn")
    arguments = parser.parse_args()
    pythons = {
        name: path for name in ("torchgeo", "rslearn") if (path := getattr(arguments, name)) is not None
    }
    side = SIZE_PX + arguments.windows * STRIDE_PX
    kind = scene_of(side)
    make_files(arguments.folder, (kind,))
    with Nginx(arguments.folder) as server, tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        process = Process(server, Path(scratch), pythons)
        bases: dict[str, MapJob] = {}
        for place in (server.url, str(arguments.folder)):
            room = Path(scratch) / str(len(bases))
            room.mkdir()
            bases[place] = job_of(kind, side, place, arguments.folder, room, arguments.threads)
            build_tables(bases[place], room)
        for way in arguments.ways:
            if way in ("torchgeo", "rslearn") and way not in pythons:
                print(f"\n{way}: not run, no --{way}= was named")
                continue
            base = bases[str(arguments.folder) if way == "torchgeo" else server.url]
            print(f"\n{pairs.run(_pair(way, base), process, arguments.pairs)}", flush=True)
            shutil.rmtree(base.store, ignore_errors=True)


def _pair(way: str, base: MapJob) -> Pair:
    contender, blend = WAYS[way]
    job = base.replace(blend=blend)
    ours = AS_THEY_ARE.get(way, OURS)
    return Pair(
        way, Side(ours, ours, job, THIS), Side(contender, contender, job, THIS), equal=way not in AS_THEY_ARE
    )


def scene_of(side: int) -> Kind:
    """Return a scene of one date around an area of so many pixels a side."""
    tiles = -(-(side + 2 * MARGIN_PX) // 1024)
    return replace(sentinel2(tiles * 1024), name=f"map{side}", dates=1)


def job_of(kind: Kind, side: int, url: str, folder: Path, scratch: Path, threads: int) -> MapJob:
    """Return the job over a scene."""
    (scratch / "items.json").write_text(json.dumps(items(kind, url)))
    margin = MARGIN_PX * kind.pixel_m
    west, north = ORIGIN[0] + margin, ORIGIN[1] - margin
    metres = side * kind.pixel_m
    return MapJob(
        name="map",
        items=str(scratch / "items.json"),
        table=str(scratch / "records.parquet"),
        folder=str(folder / kind.name / "0"),
        bands=kind.bands,
        epsg=EPSG,
        resolution=kind.pixel_m,
        box=(west, north - metres, west + metres, north),
        size_px=SIZE_PX,
        stride_px=STRIDE_PX,
        blend="hann",
        store=str(scratch / "store.zarr"),
        threads=threads,
    )


if __name__ == "__main__":
    main()
