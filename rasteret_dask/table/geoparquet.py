# SPDX-License-Identifier: Apache-2.0
"""An Arrow table as GeoParquet 1.1, in the order of the ground, and back."""

from __future__ import annotations

import io
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from rasteret_dask.errors import SchemaError

__all__ = [
    "ROWS_PER_GROUP",
    "Staged",
    "joined_pieces",
    "read",
    "replacing",
    "to_bytes",
    "write",
    "write_ordered",
]

ROWS_PER_GROUP = 256
"""Rows that a filter reads or skips together: 1 to 4 MB of tile tables."""

GROUP_ROWS = 131_072
"""Rows of a group of a table of chips: some 200 MB in memory."""

PIECE_BYTES = 8 * 2**20
"""Bytes of a piece of such a file, at least."""

GROUP_NBYTES = 8 << 20
"""Bytes in memory that a row group should not pass: embeddings have 64 bands of tiles a row."""

STAGED_NBYTES = 16 << 20
"""Bytes that are staged at once; four times as many are sorted at once."""

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_BITS = 16
"""A Hilbert curve of 2^16 cells a side: 0.0055 degrees of longitude."""

Choose = Callable[[pa.Table], NDArray[np.int64]]


def write(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a table, its rows as they stand, whole or not at all: a reader never sees half a file.

    Parameters
    ----------
    table
        Any Arrow table with a ``geometry`` column of WKB in lon/lat (OGC:CRS84). A ``bbox`` column that is a
        struct of xmin, ymin, xmax, ymax becomes the geometry's covering.
    path
        A local path; its directory is made as needed.

    Raises
    ------
    SchemaError
        When there is no such geometry column.
    """
    data = to_bytes(table)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def to_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a GeoParquet file; see :func:`write`."""
    return b"".join(joined_pieces(table.schema, lambda: [table]))


def joined_pieces(
    schema: pa.Schema,
    tables: Callable[[], Iterable[pa.Table]],
    group_rows: int = GROUP_ROWS,
    shapes: Callable[[], Iterable[pa.Table]] | None = None,
) -> Iterator[bytes]:
    """Yield the bytes of one GeoParquet file of tables, one behind the other: the same however these are cut.

    A piece has some 8 MiB or more, the last one what is left: a file of a few MB is one piece.

    Parameters
    ----------
    schema
        Of all of them.
    tables
        Returns them, twice the same; one at a time is in memory.
    group_rows
        Rows of a row group.
    shapes
        Returns tables of the same rows that have their geometry at least, where these are cheaper to make: then
        ``tables`` is called once.
    """
    outline = _Outline(schema)
    for table in (tables if shapes is None else shapes)():
        outline.add(table) if shapes is None else outline.add_shapes(table)
    sink = _Written()
    tagged = outline.tagged({})
    with pq.ParquetWriter(sink, tagged, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in tables():
            waiting.append(table.cast(tagged))
            while sum(part.num_rows for part in waiting) >= group_rows:
                rows = pa.concat_tables(waiting)
                writer.write_table(rows.slice(0, group_rows).combine_chunks(), row_group_size=group_rows)
                waiting = [rows.slice(group_rows)]
                if sink.nbytes >= PIECE_BYTES:
                    yield sink.taken()
        rows = pa.concat_tables(waiting or [tagged.empty_table()]).combine_chunks()
        writer.write_table(rows, row_group_size=group_rows)
    yield sink.taken()


class _Written(io.RawIOBase):
    """What was written and nobody has taken yet."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.nbytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        self.nbytes += len(self._pieces[-1])
        return len(self._pieces[-1])

    def taken(self) -> bytes:
        """Return it, and forget it."""
        data = b"".join(self._pieces)
        self._pieces, self.nbytes = [], 0
        return data


def write_ordered(
    tables: Iterable[pa.Table | pa.RecordBatch],
    path: str | os.PathLike[str],
    *,
    choose: Choose | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
    rows_per_group: int | None = None,
) -> int:
    """Write tables as one GeoParquet file, neighbours near each other; memory does not grow with the rows.

    Parameters
    ----------
    tables
        Tables of one schema, as they arrive; each is staged in a file beside ``path`` and forgotten. They need
        what :func:`write` needs, and ``datetime`` and ``id``, if there, settle the order of one place's rows.
    path
        A local path; its directory is made as needed. The file appears whole or not at all.
    choose
        Gets the whole table once it is staged, as memory-mapped columns (read only those that are needed), and
        returns the numbers of the rows to keep.
    metadata
        Further key-values of the file's schema.
    rows_per_group
        Rows in a row group; None: :data:`ROWS_PER_GROUP`, fewer where rows are wide.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    SchemaError
        When there is no table, a table has another schema than the first, or no geometry column.
    """
    with Staged.of(tables, Path(path).absolute().parent) as staged:
        rows = staged.ordered if choose is None else staged.chosen(choose)
        with replacing(path) as temporary:
            staged.write(rows, [(temporary, len(rows))], metadata=metadata, rows_per_group=rows_per_group)
        return len(rows)


def read(path: str | os.PathLike[str]) -> pa.Table:
    """Read a table that :func:`write` wrote, with the very schema it had.

    Raises
    ------
    SchemaError
        When the file is not Parquet.
    """
    try:
        return pq.ParquetFile(os.fspath(path)).read()
    except pa.ArrowInvalid as error:
        raise SchemaError(f"reading {os.fspath(path)}", str(error), "a GeoParquet file") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside a path; what is there at the end takes the path's place, at once."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class Staged:
    """Rows in an Arrow file of their own, to be written in another order than they came in.

    Notes
    -----
    Rows are sorted in two passes over files, as all of them need not fit into memory: dealt out to buckets of
    neighbours first, each bucket then sorted by itself. Both read and write every row once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first = [0]
        self._outline: _Outline | None = None

    @classmethod
    @contextmanager
    def of(cls, tables: Iterable[pa.Table | pa.RecordBatch], folder: Path) -> Iterator[Staged]:
        """Stage tables of one schema below a folder; what was staged is removed at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".staged-", dir=folder) as own:
            staged = cls(Path(own))
            staged._fill(tables)
            yield staged

    def _fill(self, tables: Iterable[pa.Table | pa.RecordBatch]) -> None:
        parts = iter(tables)
        first = next(parts, None)
        if first is None:
            raise SchemaError("writing GeoParquet", "no table to write", "at least one, if only of no rows")
        self._outline = outline = _Outline(first.schema)
        schema = _without_dictionaries(first.schema)  # an Arrow file holds one dictionary a column
        with pa.OSFile(self._file, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for part in itertools.chain([first], parts):
                table = pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part
                outline.add(table)
                rows = max(1, min(1024, STAGED_NBYTES * max(table.num_rows, 1) // max(table.nbytes, 1)))
                for batch in table.cast(schema).combine_chunks().to_batches(rows):
                    writer.write_batch(batch)
                    self._first.append(self._first[-1] + batch.num_rows)

    @property
    def _file(self) -> str:
        return os.fspath(self._folder / "rows.arrow")

    @property
    def outline(self) -> _Outline:
        """What the rows' geometry says together."""
        assert self._outline is not None
        return self._outline

    @property
    def time(self) -> NDArray[np.datetime64]:
        """Shape (row,), microseconds in UTC. The rows' datetime, as they came."""
        return np.concatenate([np.empty(0, np.int64), *self.outline.when]).astype("datetime64[us]")

    @property
    def ordered(self) -> NDArray[np.int64]:
        """Shape (row,). All rows: along a Hilbert curve of their boxes' centres, then by time, then by id."""
        x, y = (np.concatenate([np.empty(0), *v]) for v in (self.outline.x, self.outline.y))
        names = np.array(self.outline.ids or [""] * len(x), dtype=str)
        return np.lexsort((names, self.time, _hilbert(x, y))).astype(np.int64)

    def chosen(self, choose: Choose) -> NDArray[np.int64]:
        """Return :attr:`ordered`, but only the rows that a function keeps of the table as it came."""
        keep = np.zeros(self._first[-1], dtype=bool)
        with pa.memory_map(self._file) as source:
            keep[np.asarray(choose(pa.ipc.open_file(source).read_all()), dtype=np.int64)] = True
        rows = self.ordered
        return rows[keep[rows]]

    def write(
        self,
        rows: NDArray[np.int64],
        files: Sequence[tuple[Path, int]],
        *,
        metadata: Mapping[bytes, bytes] | None = None,
        rows_per_group: int | None = None,
        without: Sequence[str] = (),
    ) -> None:
        """Write rows, in the order given, to GeoParquet files: each (path, number) takes the next of them.

        Parameters
        ----------
        rows_per_group
            None: :data:`ROWS_PER_GROUP`, or fewer where rows are so wide that they make :data:`GROUP_NBYTES`.
        without
            Columns to leave out.
        """
        schema = self.outline.tagged(metadata or {})
        schema = pa.schema([f for f in schema if f.name not in without], schema.metadata)
        row_nbytes = os.path.getsize(self._file) // max(1, self._first[-1])
        group = rows_per_group or max(1, min(ROWS_PER_GROUP, GROUP_NBYTES // max(1, row_nbytes)))
        bucket = max(group, STAGED_NBYTES * 4 // max(1, row_nbytes) // group * group)
        encodings = _encodings(schema)
        tables = self._in_order(rows, bucket)
        table = next(tables)
        for path, number in files:
            with pq.ParquetWriter(path, schema, compression="zstd", **encodings) as writer:
                while number:
                    if not len(table):
                        table = next(tables)
                    part = table.slice(0, min(group, number))
                    writer.write_table(part.select(schema.names).cast(schema))
                    number -= len(part)
                    table = table.slice(len(part))

    def _in_order(self, rows: NDArray[np.int64], bucket: int) -> Iterator[pa.Table]:
        """Yield rows in the order given, ``bucket`` of them at a time."""
        place = np.full(self._first[-1], -1)
        place[rows] = np.arange(len(rows))
        names = [os.fspath(self._folder / f"{i}.arrow") for i in range(max(1, -(-len(rows) // bucket)))]
        dealt: list[list[NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in names]
        with ExitStack() as stack:
            reader = pa.ipc.open_file(stack.enter_context(pa.OSFile(self._file)))
            writers = [stack.enter_context(pa.ipc.new_file(name, reader.schema)) for name in names]
            for i in range(reader.num_record_batches):
                batch, own = reader.get_batch(i), place[self._first[i] : self._first[i + 1]]
                for number in np.unique(own[own >= 0] // bucket):
                    taken = np.flatnonzero((own >= 0) & (own // bucket == number))
                    writers[number].write_batch(batch.take(pa.array(taken)))
                    dealt[number].append(own[taken])
        for name, places in zip(names, dealt, strict=True):
            with pa.OSFile(name) as source:
                table = pa.ipc.open_file(source).read_all().combine_chunks()
            os.unlink(name)
            yield table.take(pa.array(np.argsort(np.concatenate(places))))


class _Outline:
    """What a file's ``geo`` entry and the order of its rows need to know, gathered table by table."""

    def __init__(self, schema: pa.Schema) -> None:
        if "geometry" not in schema.names:
            raise SchemaError("writing GeoParquet", f"no column geometry (columns: {schema.names})", "WKB")
        kind = schema.field("geometry").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise SchemaError("writing GeoParquet", f"geometry of type {kind}", "binary WKB")
        self.schema = schema
        self.types: set[str] = set()
        self.bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
        self.x: list[NDArray[np.float64]] = []
        self.y: list[NDArray[np.float64]] = []
        self.when: list[NDArray[np.int64]] = []
        self.ids: list[str] = []

    def add(self, table: pa.Table) -> None:
        """Note the geometry, time and id of a table's rows."""
        if not table.schema.equals(self.schema):
            names = [f.name for f in table.schema if f not in list(self.schema)]
            names += [f.name for f in self.schema if f not in list(table.schema)]
            raise SchemaError(
                "writing GeoParquet",
                f"a table that differs from the first in {', '.join(dict.fromkeys(names)) or 'column order'}",
                "tables of one schema",
                "Bring each to RECORD_SCHEMA, or select and cast their columns alike.",
            )
        boxes = self.add_shapes(table)
        self.x.append((boxes[:, 0] + boxes[:, 2]) / 2)
        self.y.append((boxes[:, 1] + boxes[:, 3]) / 2)
        self.when.append(_microseconds(table))
        if "id" in table.column_names:
            self.ids += [str(v) for v in table.column("id").to_pylist()]

    def add_shapes(self, table: pa.Table) -> NDArray[np.float64]:
        """Note the geometry of a table's rows, and return their bounds, shape (row, 4)."""
        shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
        present = shapes[~shapely.is_missing(shapes)]
        self.types |= {g.geom_type + (" Z" if g.has_z else "") for g in present}
        boxes = shapely.bounds(shapes).reshape(-1, 4)
        known = boxes[np.isfinite(boxes).all(axis=1)]
        if len(known):
            self.bounds[:2] = np.minimum(self.bounds[:2], known[:, :2].min(axis=0))
            self.bounds[2:] = np.maximum(self.bounds[2:], known[:, 2:].max(axis=0))
        return np.asarray(boxes, np.float64)

    def tagged(self, metadata: Mapping[bytes, bytes]) -> pa.Schema:
        """Return the schema with its ``geo`` entry (GeoParquet 1.1); without ``crs`` it is OGC:CRS84."""
        column: dict[str, Any] = {"encoding": "WKB", "geometry_types": sorted(self.types)}
        if np.all(np.isfinite(self.bounds)):
            column["bbox"] = [float(v) for v in self.bounds]
        if "bbox" in self.schema.names:
            kind = self.schema.field("bbox").type
            if pa.types.is_struct(kind) and all(kind.get_field_index(c) >= 0 for c in _CORNERS):
                column["covering"] = {"bbox": {c: ["bbox", c] for c in _CORNERS}}
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        return self.schema.with_metadata(
            {**(self.schema.metadata or {}), **metadata, b"geo": json.dumps(geo).encode()}
        )


def _microseconds(table: pa.Table) -> NDArray[np.int64]:
    """Shape (row,). The rows' datetime since 1970, else the start of their interval; NaT where unknown."""
    found = pa.chunked_array([pa.nulls(table.num_rows, pa.int64())])
    for name in ("start_datetime", "datetime"):
        if name in table.column_names and pa.types.is_timestamp(table.schema.field(name).type):
            zone = table.schema.field(name).type.tz
            stamps = table.column(name).cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
            found = pc.coalesce(stamps, found)
    return np.asarray(found.fill_null(np.iinfo(np.int64).min).to_numpy(), dtype=np.int64)


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Return how columns are encoded: tile tables by differences, as no dictionary helps them.

    50,000 scenes of 5 bands: 2/3 of the bytes, 1/4 of the time to write and 2/5 of the time to read.
    """
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(sink).schema
    paths = [leaves.column(i).path for i in range(len(leaves))]
    tiles = [p for p in paths if ".tile_offsets." in p or ".tile_byte_counts." in p]
    return {
        "use_dictionary": [p for p in paths if p not in tiles],
        "column_encoding": dict.fromkeys(tiles, "DELTA_BINARY_PACKED"),
    }


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    fields = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    return pa.schema(fields)


def _hilbert(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Shape (point,). Place of lon/lat points along a Hilbert curve of the world; unknown ones come last.

    The usual conversion, bit by bit (Warren, Hacker's Delight, 2nd edition, figure 16-8).
    """
    side = 1 << _BITS
    known = np.isfinite(x) & np.isfinite(y)
    col = np.clip((np.where(known, x, 0) + 180) / 360 * side, 0, side - 1).astype(np.int64)
    row = np.clip((np.where(known, y, 0) + 90) / 180 * side, 0, side - 1).astype(np.int64)
    place = np.zeros(len(col), dtype=np.int64)
    step = side >> 1
    while step:
        right, upper = (col & step) > 0, (row & step) > 0
        place += step * step * ((3 * right) ^ upper)
        turned = ~upper & right
        col, row = np.where(turned, side - 1 - col, col), np.where(turned, side - 1 - row, row)
        col, row = np.where(upper, col, row), np.where(upper, row, col)
        step >>= 1
    return np.where(known, place, np.iinfo(np.int64).max)
