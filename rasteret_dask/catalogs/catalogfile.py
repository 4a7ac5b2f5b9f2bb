# SPDX-License-Identifier: Apache-2.0
"""A catalog's TOML text as checked values: what pixels are, where they lie, how stores let one in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from math import inf
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from rasteret_dask.catalogs.bands import Band, Dataset, Role
from rasteret_dask.errors import SourceError
from rasteret_dask.rules.kinds import KINDS, quality_kind

__all__ = ["Access", "Catalog", "Entry", "Store", "catalog_of", "id_checked", "parse_toml"]

Access = Literal["anonymous", "keys", "requester-pays", "planetary-computer"]
"""Who may read: everybody; who has keys of an account; who pays for the transfer; who has asked Planetary Computer for
a token."""

Raw = dict[str, dict[str, Any]]
"""Tables of a TOML file: {"dataset" | "entry" | "store" | "alias": {name: fields}}."""

_TABLES = ("dataset", "entry", "store", "alias")
_RULES = ("sentinel-2",)
_ID = re.compile(r"[A-Za-z0-9_][\w.\-]*(/[A-Za-z0-9_][\w.\-]*)*", re.ASCII)
_PIXELS = {
    "kind": str, "role": str, "scale": float, "offset": float, "nodata": float, "valid_min": float, "valid_max": float,
    "dtype": str, "gsd_m": float,
}  # fmt: skip
_BAND = {"code": str, "asset": str, "common_name": str, "band_index": int, "optional": bool, **_PIXELS}
_DATASET = {"like": str, "bands": list, "radiometry": str, "renumbered": bool, "asset": str, **_PIXELS}
_ENTRY = {
    "title": str, "dataset": str, "stac_api": str, "collection": str, "catalog": str, "index": str, "columns": dict,
    "assets": dict, "access": str, "licence": str, "licence_url": str, "attribution": str, "resolution_m": float,
    "time_start": str, "time_end": str, "bbox": list, "static": bool,
}  # fmt: skip
_STORE = {"access": str, "region": str, "endpoint": str, "signer": str}


@dataclass(frozen=True, slots=True)
class Entry:
    """A dataset by name: where its scenes are found, and what is known of them."""

    id: str
    """``earthsearch/sentinel-2-l2a``."""
    title: str = ""
    dataset: Dataset | None = None
    """Bands and rules; None: each item names its own."""
    stac_api: str | None = None
    """Root of a STAC API."""
    stac_collection: str | None = None
    """The collection to search there."""
    catalog: str | None = None
    """A static STAC catalog or collection: a URL, or a path (relative to the working directory)."""
    index: str | None = None
    """A Parquet table of files, a row each."""
    columns: tuple[tuple[str, str], ...] = ()
    """(what, column of ``index``): id, geometry, datetime or year, href, proj:epsg, xmin, ymin, xmax, ymax."""
    access: Access = "anonymous"
    licence: str | None = None
    """An SPDX id, "public domain" or "proprietary"."""
    licence_url: str | None = None
    attribution: str | None = None
    """The sentence that the licence asks for, or that the provider wishes."""
    resolution_m: float | None = None
    """Of the finest band, metres."""
    time_start: str | None = None
    """First day, ISO 8601."""
    time_end: str | None = None
    """Last day, ISO 8601; None while it goes on."""
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north, degrees."""
    static: bool = False
    """Whether its scenes hold at any time, whatever time their items have: elevation, soil."""
    source: str = "package"
    """"package", or the file that names it."""


@dataclass(frozen=True, slots=True)
class Store:
    """How a store is accessed: with which credentials, if any."""

    place: str
    """``s3://bucket`` or ``https://host``; ``*`` is any text."""
    access: Access = "anonymous"
    region: str | None = None
    endpoint: str | None = None
    """URL of the S3 service that has the bucket; None: AWS, or the one of the environment."""
    signer: str | None = None
    """``module:name`` of a function that takes an href and returns the URL to request; of https only."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """What all files together say."""

    datasets: Mapping[str, Dataset]
    entries: Mapping[str, Entry]
    stores: tuple[Store, ...]
    """The first whose place matches counts; a user's own come first."""
    aliases: Mapping[str, str]
    """{other name of a STAC collection: name of its dataset}."""


def parse_toml(text: str, place: str) -> Raw:
    """Return a file's tables.

    Raises
    ------
    SourceError
        When it is no TOML, or has other tables.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SourceError(
            f"catalog {place}", str(error), "TOML", "Correct the file, or remove it."
        ) from error
    for name, table in found.items():
        known = name in _TABLES and isinstance(table, dict)
        if not known or (name != "alias" and not all(isinstance(v, dict) for v in table.values())):
            raise SourceError(f"catalog {place}", f"table {name!r}", f"tables of {', '.join(_TABLES)}")
    return {name: found.get(name, {}) for name in _TABLES}


def catalog_of(package: Raw, user: Raw | None = None, place: str = "") -> Catalog:
    """Return what the package's tables and a user's say together.

    Parameters
    ----------
    package, user
        As :func:`parse_toml` returns them. Fields of the user's entries replace the package's.
    place
        Where the user's are from, for messages.

    Raises
    ------
    SourceError
        When a table has another field or type, or names a dataset that is not there.
    """
    own = user or {name: {} for name in _TABLES}
    taken = sorted(own["dataset"].keys() & package["dataset"].keys())
    if taken:
        raise SourceError(
            f"catalog {place}", f"dataset {taken[0]!r}, which the package has", "another name",
            "To change a rule, give the dataset a name of its own, like = ... and the fields that differ.",
        )  # fmt: skip
    raw = {**package["dataset"], **own["dataset"]}
    datasets = {name: _dataset(name, raw, place) for name in raw}
    entries = {}
    for name in [*package["entry"], *(n for n in own["entry"] if n not in package["entry"])]:
        fields = {**package["entry"].get(name, {}), **own["entry"].get(name, {})}
        entries[name] = _entry(name, fields, datasets, place if name in own["entry"] else "package")
    stores = {**own["store"], **package["store"], **own["store"]}  # the user's come first
    return Catalog(
        datasets,
        entries,
        tuple(_store(name, fields, place) for name, fields in stores.items()),
        {**package["alias"], **own["alias"]},
    )


def id_checked(name: str) -> str:
    """Return an entry's id; SourceError where it is no plain name (it also names files in a cache)."""
    if not isinstance(name, str) or len(name) > 120 or not _ID.fullmatch(name):
        raise SourceError(
            f"dataset id {name!r}",
            "another form",
            "letters, digits, '.', '_', '-', and '/' between parts: 'me/s2'",
        )
    return name


def _dataset(name: str, raw: Mapping[str, Mapping[str, Any]], place: str) -> Dataset:
    where = f"dataset {name!r} of the catalog {place}"
    fields = _checked(_unlike(name, raw, where, ()), _DATASET, where)
    _one_of(fields.get("radiometry") or None, _RULES, f"radiometry of {where}")
    bands: list[Band] = []
    for band in fields.get("bands", ()):
        bands.append(_band({"code": band} if isinstance(band, str) else band, fields, bands, where))
    twice = [b.code for n, b in enumerate(bands) if b.code in {c.code for c in bands[:n]}]
    if twice or not bands:
        raise SourceError(f"bands of {where}", f"{twice[0]!r} twice" if twice else "none", "bands, each once")
    return Dataset(name, tuple(bands), fields.get("radiometry") or None, fields.get("renumbered", False))


def _unlike(
    name: str, raw: Mapping[str, Mapping[str, Any]], where: str, seen: tuple[str, ...]
) -> dict[str, Any]:
    """Return a dataset's fields over those of the one it is like."""
    if name not in raw or name in seen:
        found = "a circle" if name in seen else f"no dataset {name!r}"
        raise SourceError(f"like of {where}", found, f"one of {', '.join(raw)}")
    fields = dict(raw[name])
    like = fields.pop("like", None)
    return fields if like is None else {**_unlike(str(like), raw, where, (*seen, name)), **fields}


def _band(table: Any, defaults: Mapping[str, Any], before: list[Band], where: str) -> Band:
    if not isinstance(table, dict) or "code" not in table:
        raise SourceError(f"a band of {where}", repr(table), "a code, or a table with code = ...")
    fields = _checked(table, _BAND, f"band {table['code']!r} of {where}")
    if not fields.keys() & {"kind", "role"}:
        fields = {**{k: v for k, v in defaults.items() if k in _PIXELS}, **fields}
    fields.setdefault("asset", defaults.get("asset") or fields["code"])
    fields.setdefault("band_index", sum(band.asset == fields["asset"] for band in before))
    _one_of(fields.get("role"), get_args(Role), f"role of band {table['code']!r} of {where}")
    _one_of(fields.get("kind"), tuple(KINDS), f"kind of band {table['code']!r} of {where}")
    _check_range(fields, f"band {table['code']!r} of {where}")
    if fields.get("role") == "quality":
        fields.setdefault("kind", quality_kind(fields["code"]))
    return Band(**fields)


def _check_range(fields: Mapping[str, Any], what: str) -> None:
    """Raise SourceError where no number is valid."""
    least, most = fields.get("valid_min", -inf), fields.get("valid_max", inf)
    if least > most:
        raise SourceError(f"valid_min and valid_max of {what}", f"{least:g} > {most:g}", "a range")


def _entry(name: str, table: Mapping[str, Any], datasets: Mapping[str, Dataset], source: str) -> Entry:
    where = f"entry {name!r} of the catalog {source}"
    fields = _checked(table, _ENTRY, where)
    _one_of(fields.get("access"), get_args(Access), f"access of {where}")
    for end in ("time_start", "time_end"):
        try:
            date.fromisoformat(fields.get(end, "2000-01-01"))
        except ValueError as error:
            raise SourceError(f"{end} of {where}", repr(fields[end]), "a day, as '2015-06-27'") from error
    box = fields.pop("bbox", None)
    if box is not None and (len(box) != 4 or not all(isinstance(v, int | float) for v in box)):
        raise SourceError(f"bbox of {where}", repr(box), "[west, south, east, north] in degrees")
    known = fields.pop("dataset", None)
    if known is not None and known not in datasets:
        raise SourceError(f"dataset of {where}", repr(known), f"one of {', '.join(datasets)}")
    dataset = None if known is None else _renamed(datasets[known], fields.pop("assets", {}), where)
    for key in ("stac_api", "catalog", "index"):
        _no_secret(fields.get(key, ""), f"{key} of {where}")
    if not fields.get("stac_api", "http://").startswith(("http://", "https://")):
        raise SourceError(
            f"stac_api of {where}", repr(fields["stac_api"]), "the http(s) URL of a STAC API's root"
        )
    ways = [key for key in ("stac_api", "catalog", "index") if key in fields]
    if not ways or ("stac_api" in fields) != ("collection" in fields):
        raise SourceError(
            where, f"{', '.join(ways) or 'nothing'}", "stac_api and collection, catalog, or index"
        )
    return Entry(
        id=id_checked(name),
        dataset=dataset,
        stac_collection=fields.pop("collection", None),
        columns=tuple(fields.pop("columns", {}).items()),
        bbox=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        source=source,
        **fields,
    )


def _renamed(dataset: Dataset, assets: Mapping[str, str], where: str) -> Dataset:
    unknown = assets.keys() - {band.code for band in dataset.bands}
    if unknown:
        raise SourceError(f"assets of {where}", f"band {min(unknown)!r}", f"bands of {dataset.name!r}")
    bands = (replace(band, asset=assets.get(band.code, band.asset)) for band in dataset.bands)
    return replace(dataset, bands=tuple(bands))


def _store(place: str, table: Mapping[str, Any], source: str) -> Store:
    where = f"store {place!r} of the catalog {source}"
    fields = _checked(table, _STORE, where)
    _one_of(fields.get("access"), get_args(Access), f"access of {where}")
    scheme, mark, host = place.partition("://")
    if scheme not in ("s3", "http", "https") or not mark or not host or set(host) & set("/?#@"):
        raise SourceError(where, repr(place), "'s3://bucket' or 'https://host', without a path or a password")
    if (fields.get("access") == "planetary-computer") != scheme.startswith("http") and fields.get(
        "access"
    ) not in (
        None,
        "anonymous",
    ):
        raise SourceError(
            f"access of {where}",
            fields["access"],
            "keys or requester-pays for s3, planetary-computer for https",
        )
    endpoint = fields.get("endpoint")
    if endpoint is not None and (scheme != "s3" or not endpoint.startswith(("http://", "https://"))):
        raise SourceError(f"endpoint of {where}", repr(endpoint), "the http(s) URL of an S3 service, for s3")
    _no_secret(endpoint or "", f"endpoint of {where}")
    signer = fields.get("signer")
    if signer is not None and (scheme == "s3" or not re.fullmatch(r"[\w.]+:[\w.]+", signer)):
        raise SourceError(f"signer of {where}", repr(signer), "'module:name', for http and https")
    return Store(place, **fields)


def _checked(table: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """Return the fields, numbers as floats where these are due; SourceError for another name or type."""
    fields: dict[str, Any] = {}
    for key, value in table.items():
        kind = kinds.get(key)
        if kind is None:
            raise SourceError(f"{where}", f"field {key!r}", f"one of {', '.join(kinds)}")
        if kind is str and isinstance(value, date):
            value = value.isoformat()  # TOML has days, too
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SourceError(f"{key} of {where}", f"{value!r}", f"of type {kind.__name__}")
        if isinstance(value, dict) and not all(isinstance(v, str) for v in value.values()):
            raise SourceError(f"{key} of {where}", f"{value!r}", "texts")
        fields[key] = value
    return fields


def _no_secret(url: str, what: str) -> None:
    try:
        parts = urlsplit(url) if "://" in url else None
    except ValueError as error:
        raise SourceError(what, str(error), "a URL or a path") from None
    if parts is not None and ("@" in parts.netloc or parts.query):
        raise SourceError(
            what,
            "a user, a password or a query in the URL",
            "a plain URL",
            "Keys belong into the environment of those who read.",
        )


def _one_of(value: Any, choices: tuple[str, ...], what: str) -> None:
    if value is not None and value not in choices:
        raise SourceError(what, repr(value), f"one of {', '.join(choices)}")
