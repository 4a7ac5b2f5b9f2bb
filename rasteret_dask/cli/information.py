# SPDX-License-Identifier: Apache-2.0
"""The command that tells what something is: a store, a table, a plan or a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rasteret_dask.cli.data import record_lines
from rasteret_dask.cli.options import Json, command
from rasteret_dask.cli.printing import answer, details
from rasteret_dask.cli.recipes import loaded
from rasteret_dask.lists import listed

if TYPE_CHECKING:
    import pyarrow as pa

    from rasteret_dask.net.places import Place
    from rasteret_dask.store.stored import Stored
    from rasteret_dask.store.storemap import StoreMap
    from rasteret_dask.store.union import StoreUnion

__all__ = ["info"]

TABLES = (".parquet", ".geoparquet", ".pq")

MOST_LINES = 20
"""That an answer for people has."""


@dataclass(frozen=True, slots=True)
class Thing:
    """What lies at a place."""

    kind: str
    """``"store"``, ``"unfinished store"``, ``"record table"``, ``"chip table"``, ``"plan"`` or ``"recipe"``."""
    document: dict[str, Any]
    """All that is told of it, as plain values."""
    lines: list[tuple[str, Any]]
    """The same for people, at most :data:`MOST_LINES` - 1 lines."""


@command
def info(
    path: Annotated[
        str,
        typer.Argument(
            show_default=False,
            help="A store, a table of records or chips, a saved plan or a recipe: path or URL.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Tell what something is: how many chips or records, when, where, which bands, and who wrote it."""
    thing = _thing_at(path)
    document = {"path": path, "kind": thing.kind, **thing.document}
    answer(document, details([("kind", thing.kind), *thing.lines][: MOST_LINES - 1], path), as_json)


def _thing_at(path: str) -> Thing:
    from rasteret_dask.errors import StoreError
    from rasteret_dask.net import remote
    from rasteret_dask.net.places import Place
    from rasteret_dask.store.ledger import BEGUN
    from rasteret_dask.tasks.jobfile import JOB_FILE

    place = Place.of(path)
    if place.url.endswith(".toml"):
        return _recipe(path)
    file_name = place.url.rpartition("/")[2]
    if place.is_file or file_name.endswith(TABLES):
        if file_name.endswith(TABLES) and (place.is_file or not place.is_local):
            return _table(path, place)
    else:
        for name, look in (("zarr.json", _store), (BEGUN, _unfinished), (JOB_FILE, _plan)):
            if _is_there(remote.join(place.url, name)):
                return look(place.url)
        if place.is_local and any(Path(place.url).rglob("*.parquet")):
            return _records(path)
    absent = place.is_local and not Path(place.url).exists()
    raise StoreError(
        f"info {remote.redact(path)}",
        "nothing there" if absent else "something that this package does not write",
        "a store, a table of records or chips (.parquet), a saved plan or a recipe (.toml)",
        "Check the path."
        if absent
        else "Files of your own become records by: rasteret-dask build --files PATTERN -o records.parquet.",
    )


def _is_there(href: str) -> bool:
    from rasteret_dask.errors import ReadError
    from rasteret_dask.net import remote

    try:
        return remote.exists(href)
    except ReadError:  # a web server that refuses what it does not have
        return False


def _store(url: str) -> Thing:
    from rasteret_dask.progress import nbytes_text
    from rasteret_dask.store.stored import Stored
    from rasteret_dask.store.union import grown_store, open_parts

    grown = grown_store(url)
    chips = Stored.over(open_parts([grown]))
    store, kept = chips.map, len(chips.rows)
    planned = len(store.chips.table.column("chip_id").unique())
    splits = Counter(store.chips.columns(["split"])["split"].to_pylist())
    if chips.parts is not None:  # rows of a chip in later parts are no chips more
        splits = Counter({split or None: count for split, count in chips.splits.items()})
    nbytes = sum(nbytes for _, nbytes in store.objects())
    sources = {name: _source(store, name) for name in store.sources}
    document: dict[str, Any] = {
        "chips": kept,
        "planned_chips": planned,
        "splits": {split or "none": count for split, count in sorted(splits.items(), key=str)},
        "parts": len(grown.parts),
        "columns_version": grown.version,
        "shards": len(store.shards),
        "bytes": nbytes,
        "sources": sources,
        **_extent(chips),
        "digest": store.digest,
        "written_by": f"{store.note['writer']} of rasteret_dask {store.note['version']}",
    }
    dropped = f" (of {planned:,} planned; filter_pixels dropped the others)" if kept < planned else ""
    lines = [
        ("chips", f"{kept:,}{dropped}"),
        ("splits", _counts(document["splits"])),
        ("parts", f"{len(grown.parts)}: the store has grown" if len(grown.parts) > 1 else None),
        ("added columns", f"version {grown.version}" if grown.version else None),
        ("shards", f"{len(store.shards):,}, {nbytes_text(nbytes)}"),
        ("dates", " to ".join(document["dates"]) if document["dates"] else None),
        ("bounds", ", ".join(f"{edge:.4f}" for edge in document["bounds"])),
        *((f"source {name}", _source_line(source)) for name, source in sources.items()),
        ("digest", store.digest[:12]),
        ("written by", document["written_by"]),
    ]
    return Thing("store", document, lines)


def _extent(chips: Stored) -> dict[str, Any]:
    """Return the days of the scenes that chips were planned from, and the chips' bounds in degrees."""
    import shapely

    from rasteret_dask.store.provenance import provenance_of_parts

    origins = provenance_of_parts(chips.places).origins
    days = [str(day)[:10] for origin in origins for day in (origin.start, origin.end) if day]
    shapes = shapely.from_wkb(
        chips.map.chips.columns(["geometry"])["geometry"].to_numpy(zero_copy_only=False)
    )
    return {
        "dates": [min(days), max(days)] if days else None,
        "bounds": [float(edge) for edge in shapely.total_bounds(shapes)],
    }


def _source(store: StoreMap | StoreUnion, name: str) -> dict[str, Any]:
    group = next(group for group in store.first if group.source == name)
    pixels, array = store.pixels[name], group.arrays["pixels"]
    _, slots, _, height, width = array.shape
    return {
        "bands": list(pixels.bands),
        "dtype": pixels.dtype,
        "units": pixels.units or None,
        "slots": slots,
        "height": height,
        "width": width,
        "classes": list(pixels.classes),
    }


def _source_line(source: dict[str, Any]) -> str:
    times = "1 slot" if source["slots"] == 1 else f"{source['slots']} slots"
    kind = " ".join(filter(None, (source["dtype"], source["units"])))
    return f"{times}, {source['height']} x {source['width']} pixels, {listed(source['bands'], 'bands', 6)} ({kind})"


def _counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in splits.items())


def _unfinished(url: str) -> Thing:
    from rasteret_dask.formats import STORE
    from rasteret_dask.net import remote
    from rasteret_dask.store.ledger import begun
    from rasteret_dask.store.shardreports import JOB

    mark = begun(url) or {}
    STORE.check(f"store {remote.redact(url)}", mark)
    names = remote.listing(remote.join(url, JOB))
    reports = sum(name.startswith("done/") for name in names)
    has_recipe = "recipe.toml" in names
    document: dict[str, Any] = {
        "digest": mark["digest"],
        "written_by": f"{mark['writer']} of rasteret_dask {mark['version']}",
        "objects": len(remote.listing(url)),
        "has_recipe": has_recipe,
    }
    again = f"rasteret-dask resume {remote.redact(url)}" if has_recipe else "run what wrote it again"
    lines = [
        ("state", "not finished: shards, or the last step, are still to be done"),
        ("reports of shards", f"{reports:,}, beside those on pages" if reports else None),
        ("digest", mark["digest"][:12]),
        ("written by", document["written_by"]),
        ("to go on", again),
    ]
    return Thing("unfinished store", document, lines)


def _plan(url: str) -> Thing:
    from rasteret_dask.tasks.jobfile import open_job, read_note

    note = read_note(url)
    job = open_job(url, note["digest"])
    sources = {plan.name: list(plan.bands) for plan in job.sources}
    splits = {h.split or "none": h.chips for h in job.hierarchies}
    document: dict[str, Any] = {
        "chips": sum(splits.values()),
        "splits": splits,
        "shards": job.shard_count,
        "size_px": list(job.size_px),
        "sources": sources,
        "digest": job.digest,
        "written_by": f"save_plan of rasteret_dask {note['version']}",
    }
    sizes = sorted(set(job.size_px))
    lines = [
        ("chips", f"{document['chips']:,} of {', '.join(f'{side} x {side}' for side in sizes)} pixels"),
        ("splits", _counts(splits)),
        ("shards", job.shard_count),
        *((f"source {name}", listed(bands, "bands", 6)) for name, bands in sources.items()),
        ("digest", job.digest[:12]),
        ("written by", document["written_by"]),
    ]
    return Thing("plan", document, lines)


def _recipe(path: str) -> Thing:
    recipe = loaded(path, None)
    document = recipe.source.document
    collections = {name: _beginning(table) for name, table in document["collections"].items()}
    outputs = [str(output) for output in recipe.outputs]
    chips = {key: value for key, value in document["chips"].items() if isinstance(value, int | float | str)}
    told: dict[str, Any] = {
        "collections": collections,
        "chips": chips,
        "split": document.get("split"),
        "steps": [next(iter(step)) for step in document.get("steps", ())],
        "outputs": outputs,
        "cluster": document.get("cluster"),
    }
    lines = [
        *((f"collection {name}", beginning) for name, beginning in collections.items()),
        ("chips", ", ".join(f"{key} {value}" for key, value in chips.items())),
        ("split", ", ".join(f"{name} {share}" for name, share in (told["split"] or {}).items())),
        ("steps", ", ".join(told["steps"])),
        *(("output", output) for output in outputs),
        ("cluster", ", ".join(f"{key} {value}" for key, value in (told["cluster"] or {}).items())),
    ]
    return Thing("recipe", told, lines)


def _beginning(table: Mapping[str, Any]) -> str:
    from rasteret_dask.recipes.models import beginning_of

    key = beginning_of(table)
    value = table[key] if key is not None else ""
    names = value if isinstance(value, str) else ", ".join(value)
    return f"{key} {names}"


def _table(path: str, place: Place) -> Thing:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rasteret_dask.errors import SchemaError
    from rasteret_dask.net.remotefs import filesystem
    from rasteret_dask.table import geoparquet

    try:
        schema = pq.read_schema(place.url, filesystem=None if place.is_local else filesystem())
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"table {path}", "a file that is no Parquet", "a table of records or chips", "Check the path."
        ) from error
    return _chips(geoparquet.read(path)) if "chip_id" in schema.names else _records(path)


def _records(path: str) -> Thing:
    import rasteret_dask as rd

    summary = rd.load(path, headers=False).describe()
    return Thing("record table", asdict(summary), record_lines(summary))


def _chips(table: pa.Table) -> Thing:
    import pyarrow.compute as pc

    from rasteret_dask.chipping.chiptable import CHIP_SCHEMA

    splits = Counter(table["split"].to_pylist()) if "split" in table.schema.names else Counter()
    times = (
        pc.min_max(table["datetime"]).as_py()
        if "datetime" in table.schema.names
        else {"min": None, "max": None}
    )
    codes = sorted(set(table["epsg"].to_pylist()))
    further = [name for name in table.schema.names if name not in CHIP_SCHEMA.names]
    document: dict[str, Any] = {
        "chips": table.num_rows,
        "splits": {split or "none": count for split, count in sorted(splits.items(), key=str)},
        "start": times["min"],
        "end": times["max"],
        "epsg": codes,
        "columns": further,
    }
    lines = [
        ("chips", table.num_rows),
        ("splits", _counts(document["splits"])),
        ("dates", None if times["min"] is None else f"{times['min']:%Y-%m-%d} to {times['max']:%Y-%m-%d}"),
        ("CRS", ", ".join(map(str, codes))),
        ("further columns", ", ".join(further)),
    ]
    return Thing("chip table", document, lines)
