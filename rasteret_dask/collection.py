# SPDX-License-Identifier: Apache-2.0
"""The face: verbs that add a step to a plan, and the exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from rasteret_dask.chipping.labels import Labels, dense
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.areas import as_area, as_labels, as_points, bbox_of
from rasteret_dask.pixelreads import PixelReads
from rasteret_dask.planning.filechips import facts_of_chips
from rasteret_dask.planning.functions import plain
from rasteret_dask.planning.plan import (
    CELL_KM,
    ChipSpec,
    CutChips,
    Filter,
    Function,
    Harmonize,
    HarmonizeSpec,
    Join,
    Map,
    Merge,
    Node,
    Predicate,
    Sample,
    is_number,
    predicates,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.recordviews import RecordViews
from rasteret_dask.rules.kinds import KindName, checked_kinds
from rasteret_dask.rules.masks import Mask, MaskName, mask_named
from rasteret_dask.rules.picks import Pick, PickName, pick_named
from rasteret_dask.rules.units import Unit, UnitName, units_named
from rasteret_dask.table.timing import half_open
from rasteret_dask.tableexits import TableExits
from rasteret_dask.words import Choose, Dtype, Edge, Grid, Resampling
from rasteret_dask.zones import chip_grid, tile_km

if TYPE_CHECKING:
    import xarray as xr

    from rasteret_dask.chipset import Chips
    from rasteret_dask.display.card import Card

__all__ = ["Collection", "join", "merge"]


class Collection(TableExits, RecordViews, PixelReads):
    """An immutable, lazy set of records, plus what has been asked of them.

    Collections are made by :func:`build`, :func:`build_from_stac`, :func:`build_from_table`, :func:`as_collection` and
    :func:`load`; every verb returns a new one, and nothing is read before an exit is called.

    Parameters
    ----------
    query
        The steps so far, with the record tables and the user's functions that they name.

    Examples
    --------
    >>> collection.name, len(collection), collection.bands
    ('s2', 8, ('B02', 'B03', 'B04', 'B08', 'SCL'))
    >>> clear = collection.subset(cloud_cover_lt=30)  # a new one: the first stays as it is
    >>> len(clear) < len(collection)
    True
    """

    def __init__(self, query: Query) -> None:
        self.query = query
        self.plan = query.plan

    # Steps on records

    def subset(
        self,
        *,
        bbox: Sequence[float] | None = None,
        date_range: Sequence[str | None] | str | None = None,
        cloud_cover_lt: float | None = None,
        geometries: Any = None,
        split: str | Sequence[str] | None = None,
        split_column: str = "split",
        **columns: Any,
    ) -> Collection:
        """Keep the records that fulfil all conditions.

        Parameters
        ----------
        bbox
            (west, south, east, north) in degrees: records whose outline touches it; of those without one, the box.
            West is larger than east across the antimeridian, and degrees may be counted from -360 to 360.
        date_range
            (start, end) as ISO 8601, the last day included; either may be None. Sets the range of time slots.
        cloud_cover_lt
            Percent; records without a figure are left out.
        geometries
            Anything with a footprint in lon/lat: shapely, GeoJSON, WKB, a GeoDataFrame, or a sequence of them.
        split, split_column
            Records whose column of that name holds ``split``, or one of several.
        **columns
            Equality on any column or STAC property; a list or tuple means any of its values. ``readable=True`` and
            ``has_bands=[...]`` as in :meth:`where`.

        Examples
        --------
        >>> april = collection.subset(date_range=("2024-04-01", "2024-04-30"), cloud_cover_lt=30)
        >>> len(april)
        2
        >>> len(collection.subset(bbox=(14.98, 50.17, 14.99, 50.18), platform="sentinel-2a"))
        2
        """
        where: list[Predicate] = []
        if bbox is not None:
            where.append(("bbox", "intersects", bbox_of(bbox)))
        if date_range is not None:
            where.append(("datetime", "overlaps", half_open(date_range)))
        if cloud_cover_lt is not None:
            if not (is_number(cloud_cover_lt) and 0 <= cloud_cover_lt <= 100):
                raise PlanError("subset(cloud_cover_lt=)", repr(cloud_cover_lt), "a percentage from 0 to 100")
            where.append(("eo:cloud_cover", "<", float(cloud_cover_lt)))
        if geometries is not None:
            where.append(("geometry", "intersects", as_area(geometries)))
        if split is not None:
            where += predicates((), {split_column: split})
        where += predicates((), columns)
        return self._with(Filter(self.plan, tuple(where)))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> Collection:
        """Keep the records that fulfil all predicates; :meth:`Chips.filter` does the same with chips.

        Parameters
        ----------
        *triples
            Triples ``("eo:cloud_cover", "<", 20)``, or one triple's three parts.
        **columns
            Equality on columns. ``has_bands=["nir", ...]`` keeps records that have all of these bands, each by code,
            common name or asset key. ``readable=True`` keeps records that have every band that is needed, with a
            header that could be read. ``explain()`` counts what both leave out.

        Examples
        --------
        >>> clear = collection.filter(("eo:cloud_cover", "<", 20), platform="sentinel-2a")

        Notes
        -----
        :meth:`where`, :meth:`subset` and :meth:`select_split` are rasteret's names: the same with other arguments.
        """
        return self._with(Filter(self.plan, predicates(triples, columns)))

    def where(self, *triples: Predicate | Any, **columns: Any) -> Collection:
        """Keep the records that fulfil all predicates: rasteret's name of :meth:`filter`.

        Examples
        --------
        >>> len(collection.where("eo:cloud_cover", "<", 20)) == len(collection.filter(("eo:cloud_cover", "<", 20)))
        True
        """
        return self.filter(*triples, **columns)

    def select_split(self, split: str, *, split_column: str = "split") -> Collection:
        """Keep the records whose column ``split_column`` holds ``split``.

        Examples
        --------
        >>> import pyarrow as pa
        >>> table = collection.to_table()
        >>> table = table.append_column("split", pa.array(["train", "test"] * (len(table) // 2)))
        >>> len(rd.as_collection(table, name="s2").select_split("train"))
        4
        """
        return self.subset(split=split, split_column=split_column)

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Collection:
        """Keep ``n`` records by hash of their id, per stratum of column ``by``; a larger n contains the smaller.

        Examples
        --------
        >>> len(collection.sample(3, seed=1))
        3
        >>> few = collection.sample(1, by="orbit")  # one of each orbit
        """
        return self._with(Sample(self.plan, n, seed, by))

    # Steps on pixels

    def harmonize(
        self,
        bands: Sequence[str] | None = None,
        *,
        units: UnitName | Unit | Mapping[str, UnitName | Unit] = "physical",
        resolution: float | None = None,
        resampling: Resampling | None = None,
        mask: MaskName | Mask | Sequence[MaskName | Mask] | None = None,
        time: str | Sequence[str] | None = None,
        max_acquisitions: int | None = None,
        choose: Choose | None = None,
        relative_to: str | None = None,
        tolerance: str | None = None,
        pick: PickName | Pick | None = None,
        fill: bool | None = None,
        dtype: Dtype | None = None,
        kinds: Mapping[str, KindName] | None = None,
        meta: Sequence[str] | None = None,
    ) -> Collection:
        """Give all records the same bands, units, grid and time axis.

        Parameters
        ----------
        bands
            Common names or the sensors' own codes; a code that means two bands is refused. None: the bands that
            all records have, quality bands aside; ``explain()`` says which others it leaves.
        units
            ``"physical"`` (or ``"auto"``): each band in the unit of its kind, with the scale and offset of each
            record: reflectance, kelvin, unit vectors of embeddings; classes and bit fields as they are. ``"raw"``:
            numbers as they stand in the files. ``"reflectance"``, ``"kelvin"``, ``"scaled"``, ``"decibel"``,
            ``"embedding"``: all bands so. ``"oli_reflectance"``: Sentinel-2's reflectance as OLI would measure it,
            by HLS's coefficients. ``{"vv": "decibel"}``: these so, the others physical. A unit of your own
            is a :class:`rasteret_dask.rules.units.Unit`.
        resolution
            Metres a pixel; None: the first member's own.
        resampling
            ``"nearest"``, ``"bilinear"``, ``"cubic"``, ``"average"`` or ``"mode"``; None: nearest for classes, bit
            fields and embeddings, else bilinear upwards, average downwards. Classes and bit fields take ``"nearest"``
            and ``"mode"`` only, of the image itself: beside measured bands they keep nearest whatever is named, and
            :meth:`Chips.explain` tells; a source of nothing else refuses another kernel. ``"overview"``, for coarse
            looks at classes: the nearest pixel of an overview, which fetches little; its classes are what the maker of
            the file put there. Quality bands are always nearest.
        mask
            ``"clouds"`` (and their shadows), ``"snow"``, ``"water"``: pixels made invalid, by the collection's quality
            band; or a :class:`rasteret_dask.rules.masks.Mask` of any band: ``Classes("SCL", (3, 8))``.
        time
            Length of a slot as a pandas offset (``"1MS"``, ``"10D"``); ``"static"``: the records hold at any time
            (elevation, soil, land cover of one year), with or without a time of their own: one slot, which joins with
            anything. ``"acquisitions"``: each chip has the acquisitions of its own ground, by time, a slot each; see
            ``max_acquisitions``. A list of edges: windows of time of each chip's own, a slot between two edges.
            Edges are lengths from the date in ``relative_to`` (``["-30D", "0D", "30D"]``), else columns of dates of
            ``chips(at=)`` (``["start", "end"]``); a window holds its first edge, not its last.
            ``"files"``: slots as columns of the records tell, as :func:`read_chips` makes them.
            None: a chip is one acquisition.
        max_acquisitions
            The number of slots where each is one acquisition: with ``time="acquisitions"``, or with two edges, between
            which they lie. A chip with fewer has slots that are empty: ``present`` (chip, time) is False there, pixels
            are invalid, ``datetime`` is NaT. ``chips(min_slots=)`` is the least number that a chip has to have.
        choose
            Which acquisitions where a chip has more: ``"spread"`` evenly over its dates, the first and the last among
            them (default); ``"clearest"``, by the records' own cloud cover; ``"latest"``; ``"nearest"`` to the date in
            ``relative_to``.
        relative_to
            A column of dates of ``chips(at=)``: the date of each chip's own that edges are counted from, or that
            acquisitions are near to.
        tolerance
            Of records that are intervals, such as land cover of several years: how far from a moment that none holds
            an interval may lie, as ``"400D"``. Beside a source with slots, they then take its slots: each slot the
            interval that holds its middle, else the nearest so far. Beside single acquisitions, each of these likewise.
            None: intervals beside slots have slots of their own, and acquisitions that none holds make no chip.
        pick
            Which acquisition a slot takes: ``"closest"`` to its middle (default), ``"first"``, ``"last"``,
            ``"least_cloudy"``: one that covers the chip before one that does not; ``"clearest"``: the one with the
            most valid pixels; ``"newest"``: the newest valid pixel, whatever its acquisition covers;
            or a composite of all: ``"median"``,
            ``"mean"``, ``"majority"``. A pick of your own is a :class:`rasteret_dask.rules.picks.Pick`.
        fill
            Whether what is invalid in the picked acquisition comes from the next in order. ``member`` and
            ``datetime`` name the main one, ``filled_fraction`` tells the share of the others.
        dtype
            ``"uint16"`` or ``"int16"`` stores reflectance x 1e4, kelvin or decibel x 100; None: float32.
        kinds
            What bands are, where nothing tells, or something else does: ``{"map": "class"}``. A kind
            (``"reflectance"``, ``"temperature"``, ``"backscatter"``, ``"amplitude"``, ``"continuous"``, ``"class"``,
            ``"bitfield"``, ``"angle"``, ``"embedding"``, ``"vector"``) decides kernel,
            overviews, composites, statistics and normalizing.
        meta
            What chips carry of each slot beside its pixels, as arrays (chip, time): any column or property of the
            records (``"view:sun_elevation"``, ``"eo:cloud_cover"``, ``"id"``), of the record that ``member`` and
            ``datetime`` name. Numbers become float64, NaN where there is none; text stays text, times are ISO 8601
            text, ``""`` where there is none. Of an acquisition of several records it is the one whose centre is
            nearest to the chip's; a composite of several acquisitions has none, as its ``datetime`` is NaT.
            ``"day_of_year"`` is that of ``datetime`` (1 to 366, UTC; NaN where that is NaT, and of what holds at any
            time); ``"valid_fraction"`` the share of the pixels that are valid in all bands; ``"masked_fraction"`` the
            share of those that are invalid and hidden by ``mask`` in any record that was read for the slot. Batches
            have them as ``"<source>/<name>"``. Nothing is read for it.

        Examples
        --------
        >>> monthly = collection.harmonize(["red", "nir"], mask="clouds", time="1MS")
        >>> monthly.chips(32, cell_km=0.96).load()["pixels"].dims
        ('chip', 'time', 'band', 'y', 'x')
        >>> each = collection.harmonize(["red", "nir"], time="acquisitions", max_acquisitions=4, choose="clearest")
        >>> each.chips(32, cell_km=0.96).load()["present"].dims
        ('chip', 'time')
        >>> told = collection.harmonize(["red"], mask="clouds", time="1MS", meta=["eo:cloud_cover", "masked_fraction"])
        >>> batch = next(told.chips(32, cell_km=0.96).stream(batch_size=4))
        >>> batch["s2/eo:cloud_cover"].shape, batch["s2/masked_fraction"].dtype
        ((4, 3), dtype('float32'))
        """
        spec = HarmonizeSpec(
            bands=None if bands is None else tuple([bands] if isinstance(bands, str) else bands),
            units=units_named(units),
            resolution=resolution,
            resampling=resampling,
            mask=mask_named(mask),
            time=tuple(time) if isinstance(time, Sequence) and not isinstance(time, str) else time,
            max_acquisitions=max_acquisitions,
            choose=choose,
            relative_to=relative_to,
            tolerance=tolerance,
            pick=None if pick is None else pick_named(pick),
            fill=fill,
            dtype=dtype,
            kinds=checked_kinds(kinds, "harmonize(kinds=)") or None,
            meta=None if meta is None else tuple([meta] if isinstance(meta, str) else meta),
        )
        return self._with(Harmonize(self.plan, spec))

    def map(
        self,
        function: Callable[[xr.DataArray], xr.DataArray],
        *,
        source: str | None = None,
        version: str | None = None,
    ) -> Collection:
        """Apply a function of your own to the chips of each group: a DataArray (chip, time, band, y, x).

        Parameters
        ----------
        function
            Gets and returns a DataArray with these five dimensions and the same chips.
        source
            Of a join: the source it applies to.
        version
            What the function is known by; None: its module, name and source text.

        Examples
        --------
        >>> def ndvi(pixels):
        ...     red, nir = pixels.sel(band=["red"]), pixels.sel(band=["nir"])
        ...     return ((nir - red.values) / (nir + red.values)).assign_coords(band=["ndvi"])
        >>> greenness = collection.harmonize(["red", "nir"], time="1MS").map(ndvi)
        >>> greenness.chips(32, cell_km=0.96).sample(2).load()["pixels"].sizes["band"]
        1
        """
        known = Function.of(function, version)
        return Collection(self.query.then(Map(self.plan, known, source), functions={known: function}))

    def merge(self, *others: Collection) -> Collection:
        """Return the union of this and other collections, as one source.

        Examples
        --------
        >>> both = collection.merge(landsat)  # or: collection | landsat
        >>> both.name, len(both) == len(collection) + len(landsat)
        ('s2+l8', True)
        """
        return merge(self, *others)

    def __or__(self, other: Collection) -> Collection:
        return merge(self, other)

    def join(self, *, require: Sequence[str] | None = None, **others: Collection) -> Collection:
        """Put other collections beside this one, each a variable of its own on the same ground.

        Parameters
        ----------
        require
            The sources without which there is no chip, see :func:`join`; None: those that this one requires, and
            all others.
        **others
            The collections.

        Examples
        --------
        >>> optical = collection.harmonize(["red", "nir"], time="1MS")
        >>> pair = optical.join(embeddings=embeddings.harmonize(units="embedding"))
        >>> sorted(pair.chips(32, cell_km=0.96).sample(2).load().children)
        ['embeddings', 's2']
        """
        own = _sources(self)
        twice = own.keys() & others.keys()
        if twice:
            raise PlanError(
                "join",
                f"two sources {min(twice)!r}",
                "a name of its own for each",
                "Say rd.join(a=..., b=...).",
            )
        if require is None:
            require = [*_required(self), *others]
        return join(require=require, **own, **others)

    def __and__(self, other: Collection) -> Collection:
        return self.join(require=[*_required(self), *_required(other)], **_sources(other))

    def chips(
        self,
        size: int,
        stride: int | None = None,
        *,
        aoi: Any = None,
        at: Any = None,
        grid: Grid | Any = "utm",
        cell_km: float | None = None,
        min_coverage: float | None = None,
        min_slots: int = 1,
        reference: str | None = None,
        labels: Any = None,
        rasterize: str | Sequence[str] | None = None,
        classes: Sequence[str | int] | Mapping[str, Sequence[str | int]] | None = None,
        radius_m: float | None = None,
        context_m: Mapping[str, float] | None = None,
        cover: bool = False,
        edge: Edge = "shift",
    ) -> Chips:
        """Lay chips over the ground that every source covers.

        Parameters
        ----------
        size, stride
            Pixels of the reference source; ``stride=None`` means side by side.
        aoi
            An area in lon/lat: bbox, shapely, GeoJSON, WKB, or a GeoDataFrame.
        at
            Points or polygons (a GeoDataFrame, or an Arrow table with WKB): one window each. Its columns travel as
            ``labels/<column>``: text, numbers, booleans, dates and times (datetime64[us], UTC), categoricals as their
            values. With a null in any row integers and booleans become float64 with NaN, text ``""``, times NaT. A
            warning names columns that stay in ``table`` only (lists, bytes, names such as ``time``).
        grid
            Where chips lie, one choice for all of them. ``"utm"`` (also called ``"zone"``): the fixed lattice of each
            UTM zone, and of UPS beyond 84 N and 80 S. A CRS in metres (``"EPSG:3035"``, WKT, a ``pyproj.CRS``): one
            lattice in it, from (0, 0) on. An odc-geo GridSpec: one lattice in its CRS, from its origin on, whose split
            cells are its tiles. ``"tiles"``: the source's own tiles. ``"files"``: each raster of records that have a
            column ``chip``, as :func:`read_chips` makes them. An odc-geo GeoBox: from its corner on,
            and nothing beyond it. See ``docs/grids.md``.
        cell_km
            Side of a split cell, kilometres on the map; None: a GridSpec's tile, else 15.36.
        min_coverage
            Share of a chip that the records of a slot must cover together. None: all of it; with ``cover`` any part of
            it. With ``cover``, a larger share drops chips at the edges of records, so that their ground is in no chip:
            ``explain()`` says how much.
        min_slots
            Slots that must have records, in every source, each counted by itself; of a source of intervals (a
            year's embeddings beside months) at most all of its own. A source that ``join(require=)`` lets chips lack is
            absent where it has fewer.
        reference
            Of a join: the source whose pixels stay native; None: the first that chips may not lack.
        labels, rasterize
            Polygons (as for ``at``), and the column of theirs that becomes ``mask`` (chip, y, x) on the reference
            source's pixels: the value of the last polygon that holds a pixel's centre, else 0 (NaN for a column of
            floats). Text is numbered from 1 in alphabetical order; ``mask.attrs["classes"]`` has the names. Edges are
            straight in the CRS that the polygons are given in. Without ``labels``, the polygons are those of ``at``.
            A list of columns: each becomes a mask of its own, ``mask_<column>``, classes and measured numbers side by
            side; a polygon that has no value in a column is not burned for it.
        classes
            All classes that the column may hold, so that numbers and dtype agree between regions: text is numbered from
            1 in this order, whole numbers stay as they are. A polygon of another class is refused. Of several columns,
            a mapping: ``{"crop": ["wheat", "maize"]}``.
        radius_m
            Of point labels: the mask has a point's value on the ground so many metres around it; where circles overlap,
            that of the last one.
        context_m
            Of a join: sources whose windows are larger than the chips, around the same centres, and the side of these
            windows in metres: ``{"wide": 3840}`` is 64 pixels of ``harmonize(resolution=60)``. A whole number of the
            source's pixels. Such a source has to cover its whole window. ``split`` drops chips whose windows show
            ground of two splits, and ``audit`` counts these windows. ``bounds`` and masks of ``rasterize=`` are those
            of the chips; the source's attribute ``context_m`` is the side.
        cover
            Lay chips for a map: every pixel of the area is in a chip. The area is ``aoi``, a GeoBox, or else the ground
            of the reference's records. Chips lie at multiples of the stride from the corner of the zone's lattice,
            across split cells, and each zone has its own; they overlap, and have no splits. ``row`` and ``col`` count
            pixels from that corner.
        edge
            With ``cover``: the last chip of a row or column ends at the edge of the area's bounds (``"shift"``), and an
            area smaller than a chip has one around its middle; or it lies at a multiple of the stride and reaches
            beyond (``"pad"``). Pixels without a record are invalid.

        Raises
        ------
        PlanError
            With ``cover``: when the stride is longer than a chip, or there is ``at``; ``edge`` without ``cover``.

        Examples
        --------
        >>> red = collection.harmonize(["red"], time="1MS")
        >>> chips = red.chips(32, cell_km=0.96).split(0.7, 0.15, 0.15, seed=1)
        >>> sorted(set(chips.table["split"].drop_null().to_pylist())) <= ["test", "train", "val"]
        True
        >>> red.chips(32, cell_km=0.96, grid="EPSG:3035").table["chip_id"][0].as_py().split("_")[0]
        'epsg3035'
        >>> red.chips(64, stride=48, cover=True).explain()["ground"]["share"]
        1.0
        """
        tables: dict[str, Table] = {}
        token = None
        if at is not None:
            points = facts_of_chips(at) if grid == "files" else as_points(at)
            token = token_of(points)
            tables[token] = points
        columns = rasterize if rasterize is None or isinstance(rasterize, str) else tuple(rasterize)
        named = _classes(classes, columns)
        polygons = _polygons(labels, at, columns, named, radius_m)
        if polygons is not None:
            tables[token_of(polygons)] = polygons
        spec = ChipSpec(
            size=size,
            stride=size if stride is None else stride,
            grid=chip_grid(grid),
            cell_km=tile_km(grid) or CELL_KM if cell_km is None else cell_km,
            min_coverage=(0.0 if cover else 1.0) if min_coverage is None else min_coverage,
            min_slots=min_slots,
            reference=reference,
            aoi=None if aoi is None else as_area(aoi),
            at=token,
            labels=None if polygons is None else token_of(polygons),
            rasterize=columns,
            classes=named,
            radius_m=radius_m,
            context_m=_sides(context_m),
            cover=bool(cover),
            edge=edge,
        )
        from rasteret_dask.chipset import Chips  # it imports xarray, and what reads pixels

        return Chips(self.query.then(CutChips(self.plan, spec), tables))

    def _with(self, plan: Node) -> Self:
        return type(self)(self.query.then(plan))

    @property
    def _card(self) -> Card:
        from rasteret_dask.show.cards import collection_card

        return collection_card(self.name, self.query)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def merge(*collections: Collection) -> Collection:
    """Return the union of collections as one source; the ``source`` coordinate tells where a pixel came from.

    Raises
    ------
    PlanError
        When fewer than one is given, or one of them is a join.

    Examples
    --------
    >>> both = rd.merge(collection, landsat).harmonize(["red", "nir"], resolution=10, time="1MS")
    >>> both.chips(32, cell_km=0.96).sample(2).load()["member"].dims
    ('chip', 'time')
    """
    if not collections:
        raise PlanError("merge", "no collection", "at least one")
    for c in collections:
        if not isinstance(c, Collection):
            raise PlanError("merge", f"a {type(c).__name__}", "collections")
        if isinstance(c.plan, Join):
            raise PlanError(
                f"merge of {c.name!r}", "a join", "collections of records", "Merge before you join."
            )
    plans = tuple(c.plan for c in collections)
    plan = plans[0] if len(plans) == 1 else Merge(plans)
    return Collection(Query.together(plan, [c.query for c in collections]))


def join(*, require: Sequence[str] | None = None, **sources: Collection) -> Collection:
    """Put collections side by side over the same ground, each a variable of its own, called by its keyword.

    Parameters
    ----------
    require
        The sources without which there is no chip; None: all. Of the others, a chip has what is there: where they
        cover less than ``min_coverage`` of it, or fewer than ``min_slots`` of their slots, their pixels are invalid,
        and nothing is read. Each of them has a variable ``present`` (chip, time), ``"<source>/present"`` in batches:
        True where a slot has a record. Grid, ids and order of chips are those of the required sources.
    **sources
        The collections. ``require`` is no name of a source.

    Raises
    ------
    PlanError
        When there is no source, one is no collection or a join, or ``require`` is empty or names another one.

    Examples
    --------
    >>> optical = collection.harmonize(["red", "nir"], time="1MS")
    >>> pair = rd.join(optical=optical, embeddings=embeddings).chips(32, cell_km=0.96)
    >>> sorted(pair.sample(2).load().children)
    ['embeddings', 'optical']
    >>> all_of_optical = rd.join(optical=optical, embeddings=embeddings, require=["optical"])
    >>> all_of_optical.chips(32, cell_km=0.96).explain()["present"]
    {'optical': 154, 'embeddings': 154}
    """
    if not sources:
        raise PlanError("join", "no source", "at least one: join(optical=..., embeddings=...)")
    for name, c in sources.items():
        if not isinstance(c, Collection):
            raise PlanError(f"join of {name!r}", f"a {type(c).__name__}", "collections")
        if isinstance(c.plan, Join):
            raise PlanError(f"join of {name!r}", "a join", "single sources", "Name all sources in one join.")
    if isinstance(require, Collection):
        raise PlanError(
            "join(require=)", "a collection", "names of sources", "Give that source another name."
        )
    required = None if require is None else (require,) if isinstance(require, str) else tuple(require)
    plan = Join(tuple(sources), tuple(c.plan for c in sources.values()), required)
    return Collection(Query.together(plan, [c.query for c in sources.values()]))


def _sources(collection: Collection) -> dict[str, Collection]:
    """Return the sources of a join, or the collection itself as the only one."""
    plan = collection.plan
    if not isinstance(plan, Join):
        return {collection.name: collection}
    return {n: collection._with(child) for n, child in zip(plan.names, plan.children, strict=True)}


def _required(collection: Collection) -> Sequence[str]:
    """Return the names of the sources that chips may not lack."""
    plan = collection.plan
    if not isinstance(plan, Join):
        return (collection.name,)
    return plan.names if plan.require is None else plan.require


def _classes(
    classes: Sequence[str | int] | Mapping[str, Sequence[str | int]] | None,
    columns: str | tuple[str, ...] | None,
) -> tuple[Any, ...]:
    """Return the classes of one column; of several columns, pairs of a column and its classes."""
    if not isinstance(classes, Mapping):
        if classes and isinstance(columns, tuple):
            raise PlanError(
                "chips(classes=)", f"one list for columns {', '.join(columns)}", "a mapping: column to its classes",
                f"Say which column they are of: classes={{{columns[0]!r}: {list(classes)!r}}}.",
            )  # fmt: skip
        return () if classes is None else tuple(plain(list(classes)))
    burned = (columns,) if isinstance(columns, str) else columns or ()
    unknown = [name for name in classes if name not in burned]
    if unknown:
        raise PlanError(
            "chips(classes=)", f"classes of {unknown[0]!r}", f"columns that are burned: {', '.join(burned) or 'none'}",
            "Add it to rasterize=, or take it out of classes=.",
        )  # fmt: skip
    pairs = {name: tuple(plain(list(classes[name]))) for name in burned if name in classes}
    return pairs.get(columns, ()) if isinstance(columns, str) else tuple(pairs.items())


def _sides(context_m: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    """Return the side of a source's windows, for each that is named."""
    if context_m is not None and not isinstance(context_m, Mapping):
        raise PlanError(
            "chips(context_m=)", repr(context_m), "a source with the side of its windows in metres",
            "Say context_m={'wide': 3840}.",
        )  # fmt: skip
    return tuple((context_m or {}).items())


def _polygons(
    labels: Any, at: Any, column: str | tuple[str, ...] | None, classes: Sequence[Any], radius_m: float | None
) -> pa.Table | None:
    """Return the polygons that become masks, with the columns that say of what class they are."""
    if column is None:
        if labels is not None:
            raise PlanError(
                "chips(labels=)", "no column", "the column that becomes a mask", "Add rasterize='<column>'."
            )
        if classes:
            raise PlanError(
                "chips(classes=)", "no column", "the column that holds them", "Add rasterize='<column>'."
            )
        if radius_m is not None:
            raise PlanError(
                "chips(radius_m=)", "no column", "the column that becomes a mask", "Add rasterize='<column>'."
            )
        return None
    if labels is None and at is None:
        raise PlanError(
            f"chips(rasterize={column!r})",
            "no polygons",
            "polygons with that column",
            "Give labels=GeoDataFrame.",
        )
    table = as_labels(dense(at if labels is None else labels))
    Labels.of_columns(table, column, classes=classes, radius_m=radius_m)  # so that a mistake is told here
    return table.select(["geometry", *((column,) if isinstance(column, str) else column)]).combine_chunks()
