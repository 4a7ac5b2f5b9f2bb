# SPDX-License-Identifier: Apache-2.0
"""A collection as people look at it: lazy cubes, figures, maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from rasteret_dask.crs import number
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import Filter, Harmonize, HarmonizeSpec, Join, Node, spec_field
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import resolve_source
from rasteret_dask.table.records import Records

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["RecordViews"]


class RecordViews:
    """The part of a Collection that people look at."""

    plan: Node
    query: Query

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """The source's name."""

        def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
            """Return the records."""

        def _with(self, plan: Node) -> Self: ...

    def cube(
        self,
        bands: Sequence[str] | None = None,
        *,
        resolution: float | None = None,
        bounds: tuple[float, float, float, float] | None = None,
        bounds_latlon: tuple[float, float, float, float] | None = None,
        crs: Any = None,
        min_coverage: float = 0.0,
        chunks: int = 1024,
    ) -> xr.DataArray:
        """Return a lazy cube (time, band, y, x), built with stackstac, on the records' own grid.

        Pixels that are no squares stay as they are, but with ``resolution`` or ``bounds``, which ask for squares.

        Parameters
        ----------
        bands, resolution
            As in :meth:`harmonize`; without a harmonize step values stay raw.
        bounds
            (xmin, ymin, xmax, ymax) in the cube's CRS, taken exactly: the cube holds what a chip there would, whose
            pixels are squares.
        bounds_latlon
            (west, south, east, north) in degrees, widened to whole pixels of the records' grid; west is larger than
            east across the antimeridian.
        crs
            The cube's CRS, an EPSG code or any other form of one (``"ESRI:54009"``, WKT, a CRS object); None: that of
            the records.
        min_coverage
            Leave out acquisitions (or empty slots) that cover a smaller share of the bounds.
        chunks
            Side of a Dask chunk, pixels.

        Notes
        -----
        Integers have a coordinate ``valid`` (time, y, x), True where all bands are valid. Where acquisitions fill each
        other, ``filled`` (time, y, x) is True where another one than ``member`` gave a pixel: its mean is what chips
        call ``filled_fraction``. Both need all bands; ``.drop_vars("filled")`` before one band is loaded alone.

        ``.rio.crs`` tells the CRS. After a round trip through Zarr, open with ``decode_coords="all"`` to have it.

        Raises
        ------
        GridError
            When the records lie in several CRSs and no ``crs`` is given: see :meth:`cubes`; when PROJ does not know
            ``crs``, or the pixel size is in another unit than its own: say ``resolution``.

        Examples
        --------
        >>> collection.cube(["red"]).dims
        ('time', 'band', 'y', 'x')
        >>> collection.cube(["red"], crs="EPSG:3035", resolution=30).dims
        ('time', 'band', 'y', 'x')
        """
        if isinstance(self.plan, Join):
            raise PlanError(
                "cube", "a join of several sources", "one source", "Take the cube of one of them."
            )
        plan = self.plan
        if bands is not None or resolution is not None:
            own = None if bands is None else tuple([bands] if isinstance(bands, str) else bands)
            plan = Harmonize(plan, HarmonizeSpec(bands=own, resolution=resolution))
        source = resolve_source(self.name, self.query.members(optimize(plan)))
        source.check_chipless("cube")
        if source.plan.maps:
            raise PlanError(
                "cube", "a map step, which works on chips", "no map", "Apply the function to the cube."
            )
        from rasteret_dask.cubes.cubegrid import native_grid
        from rasteret_dask.cubes.lazy import harmonized_cube

        square = spec_field(plan, "resolution") is not None
        grid, shape = native_grid(
            source, None if crs is None else number(crs), bounds, bounds_latlon, square=square
        )
        return harmonized_cube(source, grid, shape, min_coverage, chunks)

    def cubes(self, bands: Sequence[str] | None = None, *, resolution: float | None = None) -> xr.DataTree:
        """Return one cube per CRS of the records, as a DataTree with a node ``epsg_32633`` each.

        A CRS without an EPSG code has a node ``crs_<its number>``.

        Examples
        --------
        >>> list(collection.cubes(["red", "nir"]).children)
        ['epsg_32633']
        """
        codes = sorted(
            {int(c) for m in self.query.members(optimize(self.plan)) for c in Records(m.table).epsg}
        )
        nodes = {}
        for code in codes:
            own = self._with(Filter(self.plan, (("proj:epsg", "==", code),)))
            cube = own.cube(bands, resolution=resolution, crs=code)
            nodes[f"/epsg_{code}" if code > 0 else f"/crs_{-code}"] = cube.to_dataset(name="pixels")
        import xarray as xr

        return xr.DataTree.from_dict(nodes, name=self.name)

    def plot(self) -> Any:
        """Draw the records' footprints, and a calendar of what each day covers, clear and cloudy.

        Returns
        -------
        matplotlib.figure.Figure
            It shows where it is the last value of a notebook's cell; ``.savefig(path)`` writes it.

        Raises
        ------
        PlanError
            When no record has an outline.
        MissingExtraError
            When matplotlib is not installed.

        Examples
        --------
        >>> collection.plot().savefig("records.png")
        """
        from rasteret_dask.show.plotrecords import COLUMNS, plot_records

        members = self.query.members(optimize(self.plan))
        return plot_records([(member.name, member.table.select(COLUMNS)) for member in members])

    def plot_spectra(self, at: Any) -> Any:
        """Draw the spectra of a few points: as each member stores them, and as :meth:`harmonize` makes them.

        Parameters
        ----------
        at
            (lon, lat) pairs, or points in any form that :meth:`sample_points` takes; at most six.

        Returns
        -------
        matplotlib.figure.Figure
            A row a point. Thin lines are acquisitions, thick ones their median; a colour a member.

        Raises
        ------
        PlanError
            When this is a join, no record covers a point, or there are too many points.
        MissingExtraError
            When matplotlib is not installed.

        Examples
        --------
        >>> figure = collection.harmonize(["red", "nir"]).plot_spectra(at=[(15.0, 50.16)])
        """
        from rasteret_dask.show.spectra import plot_spectra

        return plot_spectra(self.query, at)

    def explore(self, tiles: str | None = "OpenStreetMap") -> Any:
        """Return an interactive map of the records' outlines, with id, date and clouds as popups (needs folium).

        Parameters
        ----------
        tiles
            What folium draws behind them, which the reader's browser asks for; None: nothing.

        Raises
        ------
        PlanError
            When no record has an outline, or there are more than 5,000.
        MissingExtraError
            When folium is not installed.

        Examples
        --------
        >>> collection.explore(tiles=None).save("records.html")
        """
        from rasteret_dask.show.maps import explore_records

        columns = ["id", "collection", "datetime", "eo:cloud_cover", "platform", "geometry"]
        return explore_records(self.to_table(columns), tiles)
