"""STAC items, wherever they are, become collections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pystac_client import Client
from pystac_client.exceptions import APIError

from rasteret_dask.areas import bbox_of
from rasteret_dask.collection import Collection
from rasteret_dask.errors import SourceError
from rasteret_dask.openers import as_collection
from rasteret_dask.plan import Predicate, Source
from rasteret_dask.sources import read_items
from rasteret_dask.stac import items_to_table
from rasteret_dask.timing import half_open

__all__ = ["build_from_stac"]


def build_from_stac(
    source: Any = None,
    *,
    name: str,
    stac_api: str | None = None,
    collection: str | None = None,
    dataset: str | None = None,
    bands: Sequence[str] | None = None,
    bbox: Sequence[float] | None = None,
    date_range: Sequence[str | None] | str | None = None,
    headers: bool = True,
) -> Collection:
    """Build a collection from STAC items; COG headers are read once, concurrently, and kept in the rows.

    Parameters
    ----------
    source
        pystac items or dicts, an ItemCollection (object, path or URL), a static catalog (path or URL), or STAC
        GeoParquet (path or table). None: search ``stac_api``.
    name
        What the collection is called.
    stac_api, collection
        Root of a STAC API, and the collection to search there; needs ``bbox`` and ``date_range``.
    dataset
        Name of a known dataset (see ``bands.DATASETS``) where the items' collection does not say it.
    bands
        Keep only these; None: all raster bands.
    bbox, date_range
        Keep only items that touch them; the last day is included.
    headers
        False leaves headers unread: planning works from the items' own ``proj:`` fields, as far as they go.

    Raises
    ------
    SourceError, TrustError, BandError, SchemaError
        When items are broken, name places they must not, or lack a band.
    """
    span = half_open(date_range)
    box = None if bbox is None else bbox_of(bbox)
    if stac_api is not None:
        items = read_items(_search(stac_api, collection, box, span), remote=True)
    elif source is None:
        raise SourceError(f"collection {name!r}", "neither a source nor a stac_api", "one of them")
    else:
        items = read_items(source)
    within = None if span == (None, None) else span
    table = items_to_table(
        items, name=name, bands=bands, dataset=dataset, headers=headers, bbox=box, date_range=within
    )
    made = as_collection(table, name=name)
    where: tuple[Predicate, ...] = () if within is None else (("datetime", "overlaps", within),)
    assert isinstance(made.plan, Source)
    return Collection(replace(made.plan, where=where), made._tables)


def _search(
    stac_api: str, collection: str | None, bbox: tuple[float, ...] | None, span: tuple[str | None, str | None]
) -> list[dict[str, Any]]:
    if collection is None or bbox is None or span == (None, None):
        raise SourceError(f"search of {stac_api}", "no collection, bbox or date_range", "all three of them")
    window = "/".join(part or ".." for part in span)
    try:
        search = Client.open(stac_api).search(collections=[collection], bbox=list(bbox), datetime=window)
        return list(search.items_as_dicts())
    except APIError as error:
        raise SourceError(f"search of {stac_api}", str(error), "an answer of a STAC API") from error
