# SPDX-License-Identifier: Apache-2.0
"""Commands about scenes: datasets of the catalog, and tables of records built from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rasteret_dask.cli.options import BBox, DateRange, Json, Quiet, check_dataset, command
from rasteret_dask.cli.printing import answer, details, listing, tell
from rasteret_dask.lists import listed

if TYPE_CHECKING:
    from rasteret_dask.collection import Collection
    from rasteret_dask.planning.recordtable import Summary

__all__ = ["Scenes", "build", "datasets", "record_lines"]


def _dataset_ids(incomplete: str) -> Iterator[str]:
    """Yield the ids that a shell may complete."""
    from rasteret_dask.catalogs.catalog import catalog

    yield from (name for name in catalog().entries if name.startswith(incomplete))


@command
def datasets(
    pattern: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="Part of an id, a title or a band's name, or a pattern of an id: '*/sentinel-2*'.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the datasets that can be built by name: the package's and those of your own catalog."""
    from rasteret_dask.catalogs.catalog import datasets as known

    rows = [row for row in known().to_pylist() if pattern is None or _is_meant(pattern, row)]
    if not rows and not as_json:
        tell(f"no dataset is called like {pattern!r}; without a pattern all are listed.", "yellow")
    columns = ("id", "title", "resolution_m", "bands", "access")
    table = listing(
        ("id", "title", "metres", "bands", "access"),
        ([_short(row[name]) for name in columns] for row in rows),
    )
    answer(rows, table, as_json)


def _is_meant(pattern: str, row: dict[str, Any]) -> bool:
    lower = pattern.casefold()
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(row["id"].casefold(), lower)
    bands = {str(name).casefold() for name in (*row["bands"], *row["common_names"]) if name}
    return lower in row["id"].casefold() or lower in (row["title"] or "").casefold() or lower in bands


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return listed(value, "bands", 4)
    return int(value) if isinstance(value, float) and value.is_integer() else value


@command
def build(
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", show_default=False, help="The Parquet file to write: a path or a URL."
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            autocompletion=_dataset_ids,
            help="A dataset's id: see `rasteret-dask datasets`.",
        ),
    ] = None,
    stac: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="Instead: a static STAC catalog, or a file of items (path or URL)."
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="Instead: files of your own, a folder or a pattern ('ortho/*.tif'). Repeatable.",
        ),
    ] = None,
    bbox: BBox = None,
    date_range: DateRange = None,
    bands: Annotated[
        str | None, typer.Option(show_default=False, help="Keep only these, by comma: red,green,blue,nir.")
    ] = None,
    max_items: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="At most so many scenes.")
    ] = None,
    filename_regex: Annotated[
        str | None,
        typer.Option(
            show_default=False, help=r"With --files: what their names tell, such as '_(?P<date>\d{8})\.tif'."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(show_default=False, help="What the collection is called.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search scenes, read the headers of their files once, and keep both as a table of records (GeoParquet).

    Recipes take the table with `records = "records.parquet"`, Python with `rd.load("records.parquet")`.
    """
    if sum(given is not None for given in (dataset, stac, files or None)) != 1:
        raise typer.BadParameter("expected one of DATASET, --stac and --files.", param_hint="DATASET")
    if filename_regex is not None and not files:
        raise typer.BadParameter("only --files have names that are looked at.", param_hint="--filename-regex")
    if dataset is not None:
        check_dataset(dataset)
    collection = _collection(
        Scenes(dataset, stac, tuple(files or ()), name, filename_regex),
        not quiet,
        {
            "bbox": bbox,
            "date_range": date_range,
            "bands": bands.split(",") if bands else None,
            "max_items": max_items,
        },
    )
    collection.export(output)
    summary = collection.describe()
    answer(
        {"path": output, **asdict(summary)}, details(record_lines(summary), f"{output} is written"), as_json
    )


def record_lines(summary: Summary) -> list[tuple[str, Any]]:
    """Return what a collection holds, a line each."""
    start, end = ((text or "")[:10] for text in (summary.start, summary.end))
    bounds = summary.bounds
    return [
        ("records", summary.records),
        ("dates", f"{start} to {end}" if start else None),
        ("bounds", None if bounds is None else ", ".join(f"{edge:.4f}" for edge in bounds)),
        ("CRS", ", ".join(summary.crs)),
        ("bands", listed(summary.bands, "bands", 12)),
        ("source", summary.data_source),
        ("further columns", ", ".join(summary.columns)),
    ]


@dataclass(frozen=True, slots=True)
class Scenes:
    """Where scenes come from: one of the first three is there."""

    dataset: str | None
    stac: str | None
    files: tuple[str, ...]
    name: str | None
    filename_regex: str | None


def _collection(scenes: Scenes, progress: bool, chosen: Mapping[str, Any]) -> Collection:
    import rasteret_dask as rd

    if scenes.dataset is not None:
        return rd.build(scenes.dataset, name=scenes.name, progress=progress, **chosen)
    if scenes.stac is not None:
        return rd.build_from_stac(scenes.stac, name=scenes.name or "scenes", progress=progress, **chosen)
    if chosen["max_items"] is not None:
        raise typer.BadParameter(
            "files are no search: all that the pattern means are taken.", param_hint="--max-items"
        )
    collection = rd.build_from_files(
        list(scenes.files),
        name=scenes.name or "files",
        bands=chosen["bands"],
        filename_regex=scenes.filename_regex,
    )
    limits = {name: chosen[name] for name in ("bbox", "date_range") if chosen[name] is not None}
    return collection.subset(**limits) if limits else collection
