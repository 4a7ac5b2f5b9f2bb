# SPDX-License-Identifier: Apache-2.0
"""A finished map as xarray objects that rioxarray knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.store import ledger

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["TILES", "map_zones", "open_map", "opened_map", "zarr_place"]

TIFFS = (".tif", ".tiff")
TILES = "map.json"
"""What makes a folder of COGs visible."""


def open_map(store: str | os.PathLike[str]) -> xr.Dataset | xr.DataTree:
    """Open a map that ``predict`` wrote as Zarr: lazy, a Dataset of one zone, or a DataTree with a node a zone.

    Variables are ``classes`` (y, x), ``probabilities`` (class, y, x) or ``values`` (band, y, x), with ``count``: the
    chips that a pixel is made of, and ``inputs``: its valid inputs. Codes stay integers: what invalid pixels hold is
    the attribute ``_FillValue``, which rioxarray knows as ``rio.nodata``; of numbers it is NaN.

    Parameters
    ----------
    store
        A local path, or a URL of scheme s3, gs or az.

    Raises
    ------
    StoreError
        When there is no map, it is not finished, or it is damaged.
    FormatError
        When it was written in a format that this version does not read.

    Examples
    --------
    >>> report = chips.predict(lambda pixels: pixels[:, 0, 0], to="seen.zarr", progress=False)
    >>> seen = rd.open_map("seen.zarr")
    >>> seen["values"].dims, seen.rio.resolution()
    (('band', 'y', 'x'), (10.0, -10.0))
    """
    url = Place.of(store).url
    zones = map_zones(url)
    return opened_map(zarr_place(url), zones)


def zarr_place(url: str) -> Any:
    """Return what zarr-python and xarray open of a local path or a URL: where a path in a bucket is the root."""
    if remote.is_local(url):
        return remote.local_path(url)
    from zarr.storage import ObjectStore, StorePath

    store, path = remote.open_href(url)
    return StorePath(ObjectStore(store, read_only=True), path)


def map_zones(url: str) -> list[str]:
    """Return the groups of a finished map's zones: "" where there is one zone.

    Raises
    ------
    StoreError
        When there is no map, it is not finished, or it is damaged.
    """
    subject = f"map {remote.redact(url)}"
    try:
        if Place.at(url).is_file:
            raise remote.MissingError(subject, "a file", "a folder")
        root = ledger.root_of(url)
    except remote.MissingError as error:
        raise StoreError(subject, *_instead(url)) from error
    if "map" not in root.note:
        raise StoreError(
            subject, f"what {root.note.get('writer')} wrote", "a map", "Open it with open_chips."
        )
    members = root.document.get("consolidated_metadata", {}).get("metadata", {})
    groups = [path for path, node in members.items() if node.get("node_type") == "group" and "/" not in path]
    zones = [path for path in groups if f"{path}/spatial_ref" in members]
    return [""] if "spatial_ref" in members else sorted(zones)


def _instead(url: str) -> tuple[str, str, str]:
    """Return what lies where no map as Zarr does, what was expected, and what to do."""
    zarr = "a map as a Zarr store"
    if url.lower().endswith(TIFFS) and remote.exists(url):
        opening = "rioxarray.open_rasterio or rasterio.open"
        return "a GeoTIFF", zarr, f"Open it with {opening}; or predict(to='map.zarr') writes a store."
    if Place.at(url).is_file:
        return "a file", "a folder that predict wrote", "Give the map's folder."
    if remote.exists(remote.join(url, TILES)):
        opening = "rioxarray.open_rasterio or rasterio.open"
        return "a folder of GeoTIFFs", zarr, f"Open its map_<zone>.vrt with {opening}."
    return (
        "no finished map",
        "one that predict wrote",
        "Check the path; call predict again where it was stopped.",
    )


def opened_map(store: Any, zones: Sequence[str]) -> xr.Dataset | xr.DataTree:
    """Open the zones of a map, of whatever holds a Zarr hierarchy."""
    import rioxarray  # noqa: F401 - registers .rio
    import xarray as xr

    def zone(group: str) -> xr.Dataset:
        dataset: xr.Dataset = xr.open_zarr(
            store,
            group=group or None,
            mask_and_scale=False,
            decode_coords="all",
            consolidated=not group,
            zarr_format=3,
        )
        return dataset

    if list(zones) == [""]:
        return zone("")
    return xr.DataTree.from_dict({name: zone(name) for name in zones})
