# SPDX-License-Identifier: Apache-2.0
"""A collection's records leave as tables: Arrow, GeoPandas, files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from rasteret_dask.display.tableview import TableView
from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.formats import table_metadata
from rasteret_dask.planning import recordtable
from rasteret_dask.planning.plan import Node, leaves
from rasteret_dask.planning.query import Query
from rasteret_dask.table.barehrefs import marks
from rasteret_dask.table.export import export as write_export
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.rasteretio import to_rasteret
from rasteret_dask.table.records import RECORD_SCHEMA, Records
from rasteret_dask.words import TableLayout

__all__ = ["TableExits"]


class TableExits:
    """The part of a Collection that gives its records away."""

    plan: Node
    query: Query

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the records as an Arrow table: RECORD_SCHEMA and the user's further columns, or some of them.

        Examples
        --------
        >>> table = collection.to_table(["id", "eo:cloud_cover"])
        >>> table.num_rows, table.column_names
        (8, ['id', 'eo:cloud_cover'])
        """
        return recordtable.table(self.query, columns)

    def to_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the records as Arrow batches, without holding all of them.

        Examples
        --------
        >>> sum(batch.num_rows for batch in collection.to_batches(["id"]))
        8
        """
        return recordtable.batches(self.query, columns)

    def head(self, n: int = 5, columns: Sequence[str] | None = None) -> TableView:
        """Return the first ``n`` records.

        Returns
        -------
        TableView
            An Arrow table with all columns, or those asked for. Without ``columns`` it prints what one looks at: id,
            time, platform, number of bands, cloud cover (percent), CRS and bounds (west, south, east, north, degrees).

        Examples
        --------
        >>> collection.head(2).column("id").to_pylist() == collection.to_table(["id"])["id"].to_pylist()[:2]
        True
        """
        found = recordtable.head(self.query, n, columns)
        return TableView(found, recordtable.looks if columns is None else None)

    def to_geopandas(self, columns: Sequence[str] | None = None) -> Any:
        """Return the records as a GeoDataFrame in EPSG:4326 (needs geopandas).

        Parameters
        ----------
        columns
            ``geometry`` comes with them. None: all but ``headers_metadata``, whose tile tables would become
            Python objects, and without which :func:`build_from_table` reads the headers again.

        Examples
        --------
        >>> frame = collection.to_geopandas(["id", "eo:cloud_cover"])
        >>> len(frame.cx[14.98:14.99, 50.16:50.17])
        4
        """
        with needs("geo", "a GeoDataFrame of records"):
            import geopandas
        import shapely

        names = [n for n in self.schema.names if n != "headers_metadata"] if columns is None else columns
        found = self.to_table(list(dict.fromkeys([*names, "geometry"])))
        shapes = shapely.from_wkb(found.column("geometry").to_numpy(zero_copy_only=False))
        frame = found.drop_columns(["geometry"]).to_pandas()
        frame.insert(list(found.column_names).index("geometry"), "geometry", shapes)
        return geopandas.GeoDataFrame(frame, geometry="geometry", crs="EPSG:4326")

    @property
    def schema(self) -> pa.Schema:
        """The columns of :meth:`to_table`.

        Examples
        --------
        >>> collection.schema.field("datetime").type
        TimestampType(timestamp[us, tz=UTC])
        """
        return recordtable.schema(self.query)

    @property
    def dataset(self) -> pads.Dataset:
        """The records as a pyarrow Dataset; lazy where they lie in files and a scan can decide what was asked.

        Examples
        --------
        >>> collection.dataset.count_rows(), collection.dataset.schema.names[:3]
        (8, ['id', 'collection', 'datetime'])
        """
        return recordtable.dataset(self.query)

    def describe(self) -> recordtable.Summary:
        """Return what the collection holds: how many records, when, where, which bands.

        Examples
        --------
        >>> told = collection.describe()
        >>> told
        <s2: 8 records
        ...
        """
        further = [n for n in self.schema.names if n not in RECORD_SCHEMA.names]
        return recordtable.summary(self.query, self.name, further)

    def export(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] | None = None,
        *,
        format: TableLayout = "geoparquet",  # noqa: A002
    ) -> None:
        """Write the records as GeoParquet, neighbours near each other; :func:`load` reads it back.

        Parameters
        ----------
        path
            A local path, or a URL of an object store (s3, gs, az). It appears whole or not at all, and nothing of
            an older export stays.
        partition_by
            ``("year", "month")``, say: a directory with a file for each. None: one file.
        format
            ``"geoparquet"``: RECORD_SCHEMA, which holds all that reading needs. ``"rasteret"``: its layout.

        Examples
        --------
        >>> collection.export("scenes.parquet")
        >>> collection.export("by-month", partition_by=("year", "month"))
        >>> len(rd.load("by-month")) == len(collection)
        True
        """
        if format not in ("geoparquet", "rasteret"):
            raise PlanError("export(format=)", repr(format), "'geoparquet' or 'rasteret'")
        tables: Iterator[pa.Table] = (pa.Table.from_batches([b]) for b in self.to_batches())
        tables = itertools.chain([self.schema.empty_table()], tables)
        if format == "rasteret":
            tables = to_rasteret(tables, self.bands)
        write_export(tables, path, partition_by=partition_by, metadata=self._metadata(format))

    def _metadata(self, layout: str) -> dict[bytes, bytes]:
        source = recordtable.data_source(self.to_table(["collection"]))
        said = {"name": self.name, "data_source": source}
        if layout == "rasteret":
            said["rasteret_collection_version"] = "1"
        metadata = {key.encode(): value.encode() for key, value in said.items()}
        metadata |= marks(recordtable.signed_hosts(self.query))
        for leaf in leaves(self.plan):
            metadata |= LeftAssets.of(self.query.tables[leaf.token].schema).metadata()
        return metadata if layout == "rasteret" else metadata | table_metadata()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return recordtable.stream(self.query).__arrow_c_stream__(requested_schema)

    def __arrow_c_schema__(self) -> Any:
        return recordtable.stream_schema(self.query).__arrow_c_schema__()

    def __len__(self) -> int:
        return recordtable.count(self.query)

    def left_out(self) -> TableView:
        """Return the assets of the items that became no band of any record, and why.

        Returns
        -------
        TableView
            An Arrow table with a row for each member, asset key and reason: ``member``, ``asset``, ``reason``,
            ``records`` (how many items have it) and ``example`` (the id of one). Thumbnails and metadata, previews
            beside the data, further copies of a band (``B04_20m`` beside ``B04_10m``), assets that the catalog's
            dataset does not know, and bands that ``bands=`` did not name. It tells what :func:`build`,
            :func:`build_from_stac` and :func:`refresh` saw; steps since then change nothing. Empty for tables that were
            not built from items.

        Examples
        --------
        >>> import rasteret_dask as rd
        >>> item = {"type": "Feature", "stac_version": "1.0.0", "id": "a", "geometry": None, "bbox": [15, 50, 16, 51],
        ...         "links": [], "properties": {"datetime": "2024-06-01T10:00:00Z", "proj:epsg": 32633,
        ...                                     "proj:shape": [9, 9], "proj:transform": [9, 0, 5e5, 0, -9, 6e6]},
        ...         "assets": {"red": {"href": "s3://bucket/red.tif"}, "quicklook": {"href": "s3://bucket/q.png"}}}
        >>> rd.build_from_stac([item], name="a", headers=False).left_out().column("asset").to_pylist()
        ['quicklook']
        """
        parts = (
            LeftAssets.of(self.query.tables[source.token].schema).table(source.name)
            for source in leaves(self.plan)
        )
        return TableView(pa.concat_tables(parts))

    @cached_property
    def name(self) -> str:
        """What the collection is called: its source's name, or its members' joined by ``+``.

        Examples
        --------
        >>> collection.name, (collection | landsat).name
        ('s2', 's2+l8')
        """
        return "+".join(dict.fromkeys(source.name for source in leaves(self.plan)))

    @property
    def bands(self) -> tuple[str, ...]:
        """Every band that some record has.

        Examples
        --------
        >>> collection.bands
        ('B02', 'B03', 'B04', 'B08', 'SCL')
        """
        assets = self.to_table(["assets"])
        return Records(assets).bands if len(assets) else ()
