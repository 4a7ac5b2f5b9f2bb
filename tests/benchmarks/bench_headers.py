"""Headers a second, with latency: ``python tests/benchmarks/bench_headers.py [--ms 30] [--files 3000]``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from nginx import Nginx
from rasterio.transform import Affine
from rasterio.windows import Window

from rasteret_dask.headers.reader import WORKERS, Header, HeaderReader

KINDS: dict[str, dict[str, Any]] = {
    "Sentinel-2, 10 m": {
        "width": 10980, "height": 10980, "count": 1, "dtype": "uint16", "compress": "deflate", "predictor": 2,
    },
    "AlphaEarth, 64 bands": {
        "width": 8192, "height": 8192, "count": 64, "dtype": "int8", "compress": "zstd", "interleave": "band",
        "BIGTIFF": "YES",
    },
}  # fmt: skip


def make(path: Path, profile: dict[str, Any]) -> None:
    """Write a file with overviews: tile tables as long as a real one's, hardly any pixels."""
    grid = {"crs": "EPSG:32633", "transform": Affine(10, 0, 399960, 0, -10, 5700000)}
    tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "SPARSE_OK": "TRUE"}
    with rasterio.open(path, "w", driver="GTiff", **grid, **tiles, **profile) as to:
        to.write(np.ones((1024, 1024), profile["dtype"]), 1, window=Window(0, 0, 1024, 1024))
    with rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=512, SPARSE_OK_OVERVIEW="YES"), rasterio.open(path, "r+") as to:
        to.build_overviews([2, 4, 8, 16])
    with rasterio.Env(), rasterio.open(path) as source:  # overviews behind the image, directories in front
        profile = {**source.profile, "driver": "GTiff", "copy_src_overviews": True, "SPARSE_OK": "TRUE"}
        profile = {k: v for k, v in profile.items() if k in ("compress", "interleave", "tiled", "copy_src_overviews",
                                                             "SPARSE_OK", "blockxsize", "blockysize")}  # fmt: skip
        rasterio.shutil.copy(source, path.with_suffix(".cog.tif"), driver="GTiff", BIGTIFF="YES", **profile)
    path.with_suffix(".cog.tif").replace(path)


def main() -> None:
    """Print files a second, CPU time and requests a file of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ms", type=float, default=30, help="to the first byte")
    parser.add_argument("--files", type=int, default=3000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Nginx(Path(folder)) as server:
        Path(folder).chmod(0o755)
        for number, (kind, profile) in enumerate(KINDS.items()):
            make(Path(folder) / f"{number}.tif", profile)
            server.latency(asked.ms, asked.ms)
            server.reset()
            wall, cpu = time.perf_counter(), time.process_time()
            with HeaderReader() as reader:
                found = reader.read(f"{server.url}/copy{n}/{number}.tif" for n in range(asked.files))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            bad = [reason for reason in found.values() if not isinstance(reason, Header)]
            if bad:
                raise SystemExit(f"{kind}: {bad[0]}")
            requests = server.served().requests / asked.files
            read = [header for header in found.values() if isinstance(header, Header)]
            tiles = sum(len(page.tile_offsets) for page in read[0].pages)
            print(
                f"{kind} ({tiles} tiles): {asked.files / wall:.0f} files/s, {1e3 * cpu / asked.files:.2f} ms CPU and "
                f"{requests:.2f} requests a file ({WORKERS} in flight, {asked.ms:.0f} ms to the first byte)"
            )


if __name__ == "__main__":
    main()
