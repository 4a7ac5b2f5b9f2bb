# SPDX-License-Identifier: Apache-2.0
"""A map as Cloud Optimized GeoTIFFs: a folder of them, each a unit of work; or one a zone."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.prediction.cogs import array_blocks, cog_bytes, is_empty, pad, write_cog
from rasteret_dask.prediction.cogtiles import (
    CogTiles,
    MapHeader,
    MapTile,
    tile_header,
    tile_name,
    vrt_bytes,
    vrt_name,
)
from rasteret_dask.prediction.mapgrid import MapBlock, MapGrid
from rasteret_dask.prediction.maps import MapPlan
from rasteret_dask.prediction.mapstore import COUNT, INPUTS
from rasteret_dask.prediction.openmap import open_map
from rasteret_dask.prediction.outputs import ModelOutput
from rasteret_dask.prediction.vectors import remove_work
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.limits import Bounds
from rasteret_dask.store.unitruns import Visible, write_units

__all__ = ["TileLayout", "header_of", "write_cogs", "write_tiles"]

EXTRAS = (COUNT, INPUTS)
"""Maps that lie beside the map, in folders of their own."""


def header_of(grid: MapGrid, output: ModelOutput, array: str) -> MapHeader:
    """Return what the GeoTIFF of an array of a map says beside its pixels."""
    shape = (grid.height, grid.width)
    if array in EXTRAS:
        return MapHeader(shape, "uint16", grid.code, grid.transform, "values", (array,))
    if output.kind == "classes":
        return MapHeader(
            shape, output.dtype, grid.code, grid.transform, "classes", ("class",), output.nodata, output.classes,
            output.colors,
        )  # fmt: skip
    return MapHeader(shape, output.dtype, grid.code, grid.transform, "values", output.names, output.nodata)


@dataclass(frozen=True)
class TileLayout:
    """Where the files of a folder go."""

    grids: tuple[MapGrid, ...]
    output: ModelOutput
    tiles: CogTiles

    @property
    def form(self) -> str:
        """What it makes of the same pixels."""
        return "cogs"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The maps: the output, and those beside it."""
        return (self.output.variable, *EXTRAS)

    def folder(self, array: str) -> str:
        """Return where the files of an array lie: those of the output in the folder itself."""
        return f"{array}/" if array in EXTRAS else ""

    def path(self, block: MapBlock, array: str) -> str:
        """Return the path of a block's file."""
        return self.folder(array) + tile_name(self.grids[block.grid].name, block.row, block.col)

    def objects(
        self, block: MapBlock, arrays: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and bytes of a block's files; none where no pixel is valid."""
        grid, side = self.grids[block.grid], self.tiles.tile_px
        whole = header_of(grid, self.output, self.output.variable)
        tile = self.tile(block)
        pixels = pad(arrays[self.output.variable], tile_header(self.tiles, whole, tile))
        if is_empty(pixels, tile_header(self.tiles, whole, tile)):
            return
        for array in self.arrays:
            header = tile_header(self.tiles, header_of(grid, self.output, array), tile)
            assert header.shape == (side, side)
            yield self.path(block, array), [cog_bytes(pad(arrays[array], header), header)]

    def tile(self, block: MapBlock) -> MapTile:
        """Return a block as a file of the grid."""
        side = self.tiles.tile_px
        y, x = block.row * side, block.col * side
        return MapTile(block.row, block.col, slice(y, y + block.height), slice(x, x + block.width))


def write_tiles(
    plan: MapPlan, target: CogTiles, client: ClientLike, progress: bool, bounds: Bounds | None
) -> JobReport:
    """Write a map as a folder of COGs, one a block; the VRTs come when all files are there, ``map.json`` last."""
    url = Place.of(target.folder).folder("a folder, or nothing yet", "Choose another place.")
    layout = TileLayout(plan.maps.grids, plan.output, CogTiles("", target.tile_px))
    blocks = dict(zip(plan.maps.names(), plan.maps.blocks, strict=True))

    def places() -> dict[str, str]:
        return {layout.path(block, array): name for name, block in blocks.items() for array in layout.arrays}

    def more(manifest: pa.Table) -> dict[str, bytes]:
        rows = zip(manifest["shard"].to_pylist(), manifest["objects"].to_pylist(), strict=True)
        there = {path["path"] for _, objects in rows for path in objects}
        result = {}
        for number, grid in enumerate(plan.maps.grids):
            for array in layout.arrays:
                tiles = [
                    layout.tile(block)
                    for block in blocks.values()
                    if block.grid == number and layout.path(block, array) in there
                ]
                header = header_of(grid, plan.output, array)
                path = layout.folder(array) + vrt_name(grid.name)
                result[path] = vrt_bytes(layout.tiles, grid.name, header, tiles)
        return result

    root = Visible("map.json", {"rasteret_dask": {"map": plan.note}})
    job = plan.unit_job(url, layout, root, {}, places, client, more)
    return write_units(url, job, client, progress, bounds)


def write_cogs(
    plan: MapPlan, path: str, client: ClientLike, progress: bool, bounds: Bounds | None
) -> JobReport:
    """Write a map as one COG a zone, and beside it those of counts and of valid inputs.

    First it is a store beside them, which is removed when they are there; the map's own file comes last.
    """
    target = Place.of(path).url
    work = f"{target}.job"
    stem, suffix = posixpath.splitext(target)
    several = len(plan.maps.grids) > 1
    files = {grid.name: f"{stem}_{grid.name}{suffix}" if several else target for grid in plan.maps.grids}
    there = [file for file in files.values() if remote.exists(file)]
    if there and not remote.exists(remote.join(work, "zarr.json")):
        raise StoreError(
            f"map {remote.redact(target)}", f"a file already: {remote.redact(there[0])}", "nothing yet",
            "Delete it, or choose another path.",
        )  # fmt: skip
    report = plan.to_zarr(work, client, progress, bounds)
    if not report.committed:
        return report
    opened = open_map(work)
    for number, grid in enumerate(plan.maps.grids):
        dataset: Any = opened[plan.layout().group(number)] if several else opened
        root, ending = posixpath.splitext(files[grid.name])
        for array in EXTRAS:
            header = header_of(grid, plan.output, array)
            write_cog(f"{root}_{array}{ending}", header, array_blocks(_Lazy(dataset[array])))
        header = header_of(grid, plan.output, plan.output.variable)
        write_cog(files[grid.name], header, array_blocks(_Lazy(dataset[plan.output.variable])))
    remove_work(work)
    return report


class _Lazy:
    """A lazy array, whose parts are NumPy's."""

    def __init__(self, values: Any) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._values.shape
        return shape

    def __getitem__(self, key: Any) -> NDArray[Any]:
        return np.asarray(self._values[key].values)
