# SPDX-License-Identifier: Apache-2.0
"""A collection's pixels, read at once for geometries, points and cells: the ways people know from rasteret."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rasteret_dask.planning.plan import Node
from rasteret_dask.planning.query import Query
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import xarray as xr

    from rasteret_dask.geometries import reading

# The readers are imported when something is read: a table of records needs none of them.

__all__ = ["PixelReads"]


class PixelReads:
    """The part of a Collection that reads pixels into memory."""

    plan: Node
    query: Query

    subset: Callable[..., Any]
    select_split: Callable[..., Any]

    def get_numpy(
        self,
        geometries: Any,
        bands: str | Sequence[str] | None = None,
        resolution: float | None = None,
        size: int | None = None,
        target_crs: Any = None,
        return_index: bool = False,
        *,
        all_touched: bool = False,
        on_error: OnError = "raise",
        **filters: Any,
    ) -> Any:
        """Read the pixels of geometries into one array, at once.

        Parameters
        ----------
        geometries
            In lon/lat: a bbox, shapely, GeoJSON, WKB, (lon, lat) pairs, several of them, an Arrow table with a column
            ``geometry`` of WKB, or a GeoDataFrame of any CRS.
        bands
            As in :meth:`harmonize`; None: those that a harmonize step names, else all. Values are raw, in the file's
            own dtype, unless a harmonize step says otherwise.
        resolution
            Metres a pixel. Pixel edges are then whole multiples of it, so that two collections give the same ground;
            None: the records' own pixels.
        size
            Side in pixels of a window round each geometry (see ``chips(at=)``), with all its pixels. None: each
            geometry's own window, its bounds widened to whole pixels; pixels whose centre lies outside are fill.
        target_crs
            CRS of all windows; None: the UTM zone (326zz) that the geometry lies in, as for chips, or the records'
            own CRS where that is no UTM zone.
        return_index
            Return (pixels, index) instead.
        all_touched
            Without ``size``: pixels that a geometry touches are inside, as in ``rasterio.features``.
        on_error
            As in :meth:`Chips.to_xarray`.
        **filters
            Conditions on records, as in :meth:`subset`.

        Returns
        -------
        numpy.ndarray
            Shape (row, band, y, x), always four dimensions. A row is one geometry at one acquisition, or in one slot
            of the time axis: geometry by geometry, in each by time, at the same time by id. Neighbouring tiles of one
            pass are one row. A geometry that no record covers has one row (a slot), all fill, so that
            none is lost.
        pyarrow.Table
            The index, a row for each: ``geometry_number``, ``record_ids`` (none: no record covers it), ``member``,
            ``datetime``, ``slot``, ``epsg``, ``bounds`` (xmin, ymin, xmax, ymax), ``transform``,
            ``valid_fraction``, and the geometries' own columns.

        Raises
        ------
        PlanError
            When windows are of several shapes, or no record covers any geometry.

        Examples
        --------
        >>> fields = [(14.99, 50.17), (15.0, 50.18)]  # points; boxes and polygons too
        >>> pixels, index = collection.get_numpy(fields, ["red", "nir"], size=16, return_index=True)
        >>> pixels.shape, pixels.dtype  # (row, band, y, x)
        ((8, 2, 16, 16), dtype('uint16'))
        >>> index["geometry_number"].to_pylist()
        [0, 0, 0, 0, 1, 1, 1, 1]
        """
        from rasteret_dask.geometries import reading
        from rasteret_dask.tasks.context import ReadContext

        request = reading.WindowRequest(
            geometries, bands, resolution, size, target_crs, all_touched, ReadContext(on_error=on_error)
        )
        pixels, index = reading.as_numpy(self._prepared(request, filters))
        return (pixels, index) if return_index else pixels

    def get_xarray(
        self,
        geometries: Any,
        bands: str | Sequence[str] | None = None,
        resolution: float | None = None,
        size: int | None = None,
        target_crs: Any = None,
        *,
        all_touched: bool = False,
        on_error: OnError = "raise",
        **filters: Any,
    ) -> xr.Dataset:
        """Read the pixels of geometries into a Dataset, at once: a variable a band, and ``valid``.

        Takes what :meth:`get_numpy` takes. For one geometry the dims are (time, y, x), with ``x`` and ``y`` of pixel
        centres and ``.rio.crs``; for several (geometry, time, y, x), with ``x_centre`` (geometry, x) and ``y_centre``
        (geometry, y). ``time`` holds the acquisitions of all geometries; where one has none, its pixels are fill.
        For a lazy cube see :meth:`cube`.

        Raises
        ------
        PlanError
            When windows are of several shapes, or no record covers any geometry.

        Examples
        --------
        >>> cube = collection.get_xarray((14.99, 50.17, 15.0, 50.18), ["red", "nir"], cloud_cover_lt=20)
        >>> sorted(cube.data_vars), cube.sizes["time"]
        (['nir', 'red', 'valid'], 3)
        """
        from rasteret_dask.geometries import reading
        from rasteret_dask.tasks.context import ReadContext

        request = reading.WindowRequest(
            geometries, bands, resolution, size, target_crs, all_touched, ReadContext(on_error=on_error)
        )
        return reading.as_dataset(self._prepared(request, filters))

    def get_gdf(
        self,
        geometries: Any,
        bands: str | Sequence[str] | None = None,
        resolution: float | None = None,
        size: int | None = None,
        target_crs: Any = None,
        *,
        all_touched: bool = False,
        on_error: OnError = "raise",
        **filters: Any,
    ) -> Any:
        """Read the pixels of geometries into a GeoDataFrame, at once: windows may be of any shape.

        Takes what :meth:`get_numpy` takes. There is a row for each row of its index and band, in that order:
        ``geometry_number``, ``record_ids``, ``record_id`` (the nearest), ``member``, ``cloud_cover``, ``collection``,
        ``datetime``, ..., ``band``, ``data`` (an array of shape (y, x)), ``transform`` (an Affine), and ``geometry``
        in lon/lat.

        Raises
        ------
        PlanError
            When no record covers any geometry.

        Examples
        --------
        >>> frame = collection.get_gdf([(14.99, 50.17)], ["red"], size=8)
        >>> frame["data"][0].shape, frame["band"].unique().tolist()
        ((8, 8), ['red'])
        """
        from rasteret_dask.geometries import reading
        from rasteret_dask.tasks.context import ReadContext

        request = reading.WindowRequest(
            geometries, bands, resolution, size, target_crs, all_touched, ReadContext(on_error=on_error)
        )
        return reading.as_frame(self._prepared(request, filters))

    def sample_points(
        self,
        points: Any,
        bands: str | Sequence[str] | None = None,
        *,
        on_error: OnError = "raise",
        **filters: Any,
    ) -> pa.Table:
        """Read the one pixel that each point lies in, of every acquisition and band, at once.

        Parameters
        ----------
        points
            (lon, lat) pairs, or points in any form that :meth:`get_numpy` takes.
        bands
            As in :meth:`get_numpy`. Each is the file's own pixel of full resolution, whatever its size, shape and CRS,
            as ``sample`` of rasterio gives it: never resampled, whatever ``harmonize`` says of pixel sizes.
        on_error
            As in :meth:`Chips.to_xarray`.
        **filters
            Conditions on records, as in :meth:`subset`.

        Returns
        -------
        pyarrow.Table
            Point by point, then by time, id and band: ``point_index``, ``point_x``, ``point_y``, ``point_crs``,
            ``record_id`` (the nearest of the acquisition; others of it fill), ``datetime``, ``collection``, ``band``,
            ``value`` (null where invalid), ``raster_crs``, and the points' own columns. A point that no record covers
            has one row a band, with null values.

        Raises
        ------
        PlanError
            When no record covers any point.

        Examples
        --------
        >>> table = collection.sample_points([(14.99, 50.17)], ["red", "nir"], cloud_cover_lt=20)
        >>> table.select(["band", "value"]).slice(0, 2).to_pylist()
        [{'band': 'red', 'value': 1491.0}, {'band': 'nir', 'value': 5393.0}]
        """
        from rasteret_dask.geometries.points import sample_points
        from rasteret_dask.tasks.context import ReadContext

        chosen = self.subset(**filters) if filters else self
        return sample_points(chosen.query, points, bands, ReadContext(on_error=on_error))

    def to_torchgeo_dataset(
        self,
        bands: str | Sequence[str] | None = None,
        geometries: Any = None,
        chip_size: int = 256,
        resolution: float | None = None,
        time: str | Sequence[str | None] | dt.datetime | np.datetime64 | None = None,
        split: str | None = None,
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        *,
        cell_km: float = 15.36,
        on_error: OnError = "raise",
        **filters: Any,
    ) -> Any:
        """Return a torch Dataset of the lattice cells of an area; needs torch.

        Parameters
        ----------
        bands
            As in :meth:`get_numpy`.
        geometries
            The area, in any form that ``chips(aoi=)`` takes; None: the footprints of all records.
        chip_size
            Side of a cell, pixels.
        resolution
            Metres a pixel; None: the records' own pixel size.
        time
            Which records compete for a cell's pixels: None: all; a period (as ``subset(date_range=)``): those in it; a
            moment (a datetime, or text with a time of day): those until then. After ``harmonize(time=...)``: a
            moment or period inside the one slot that is shown, in the way its ``pick`` says.
        split
            Of the records, as ``subset(split=)``. It leaks ground; ``chips(...).split()`` does not.
        transforms
            A function that gets and returns each sample.
        cell_km
            Side of a split cell: see :meth:`chips`.
        on_error
            As in :meth:`Chips.to_xarray`; ``"mask"`` makes what cannot be read invalid.
        **filters
            Conditions on records, as in :meth:`subset`.

        Returns
        -------
        CellDataset
            With ``len`` and indexing by number. A sample is a dict: ``image`` a tensor (band, y, x), float32 (which
            holds integers of 16 bits exactly; wider ones stay int32 or int64); ``valid`` a bool tensor (y, x);
            ``bbox`` a float64 tensor xmin, ymin, xmax, ymax in ``crs`` (text, "EPSG:32633"); ``id`` the cell's name.
            Where invalid, ``image`` holds the source's fill (NaN for reflectance). TorchGeo's samplers and
            ``stack_samples`` take it too: slices of x, y and time in the dataset's CRS are read as windows.

        Notes
        -----
        The cells, and so ``len`` and each number's ``bbox``, depend on ``geometries``, ``chip_size``, ``resolution``
        and ``cell_km`` alone: zone by zone, row by row southwards, in a row eastwards. None is left out: two
        collections' datasets align number by number. A cell is not moved onto a source's pixels: records whose
        pixel edges are no whole multiples of their size (Landsat's) are resampled.

        With several acquisitions the newest valid pixel wins, cell by cell, unless ``harmonize(pick=...)`` says
        otherwise; an older one is read only where a newer one left pixels invalid.

        A process keeps the parts of tiles that cells not yet read need (up to 320 MiB): reading in order fetches
        each tile once. Shuffled over an area much larger than that, each cell fetches its tiles anew. Workers of a
        DataLoader keep their own; over remote files use ``multiprocessing_context="spawn"``.

        Raises
        ------
        MissingExtraError
            When torch is not installed.
        PlanError, GridError, BandError
            When it cannot be carried out; nothing is read before the first sample.

        Examples
        --------
        >>> scaled = collection.harmonize(["red", "nir"])
        >>> cells = scaled.to_torchgeo_dataset(chip_size=64, cell_km=1.28)
        >>> sample = cells[0]
        >>> sample["image"].shape, sample["crs"]
        (torch.Size([2, 64, 64]), 'EPSG:32633')
        """
        from rasteret_dask.geometries import reading
        from rasteret_dask.geometries.cells import Area, cells_of
        from rasteret_dask.geometries.torchset import CellDataset
        from rasteret_dask.tasks.context import ReadContext

        chosen = self.subset(**filters) if filters else self
        chosen = chosen if split is None else chosen.select_split(split)
        cells = cells_of(
            chosen.query, Area(geometries, chip_size, resolution, cell_km), reading.band_names(bands), time,
            ReadContext(on_error=on_error),
        )  # fmt: skip
        return CellDataset(cells, transforms)

    def _prepared(self, request: reading.WindowRequest, filters: Mapping[str, Any]) -> reading.RowsToRead:
        from rasteret_dask.geometries import reading

        chosen = self.subset(**filters) if filters else self
        return reading.prepared(chosen.query, request)
