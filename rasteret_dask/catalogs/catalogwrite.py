# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset into the user's own catalog file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

import tomlkit
from locket import LockError, lock_file

from rasteret_dask.catalogs.bands import Role
from rasteret_dask.catalogs.catalog import catalog, find, package, user_file
from rasteret_dask.catalogs.catalogfile import Access, Entry, catalog_of, id_checked, parse_toml
from rasteret_dask.errors import SourceError, StoreError
from rasteret_dask.rules.kinds import KindName

__all__ = ["Fields", "register"]

_WAIT_S = 30
_PIXELS = ("scale", "offset", "nodata", "valid_min", "valid_max", "kind", "role", "dtype")


class Fields(TypedDict, total=False):
    """What else :func:`register` takes; see ``catalogfile.Entry`` and ``bands.Band``."""

    title: str
    stac_api: str
    collection: str
    catalog: str | os.PathLike[str]
    index: str
    columns: Mapping[str, str]
    assets: Mapping[str, str]
    scale: float
    offset: float
    nodata: float
    valid_min: float
    valid_max: float
    kind: KindName
    role: Role
    dtype: str
    access: Access
    licence: str
    licence_url: str
    attribution: str
    resolution_m: float
    time_start: str
    time_end: str
    bbox: Sequence[float]
    static: bool


def register(
    id: str,  # noqa: A002  what it is called everywhere else
    *,
    like: str | None = None,
    bands: Sequence[str | Mapping[str, Any]] | None = None,
    stores: Sequence[str] = (),
    region: str | None = None,
    endpoint: str | None = None,
    signer: str | None = None,
    path: str | os.PathLike[str] | None = None,
    **fields: Unpack[Fields],
) -> Entry:
    """Give a dataset a name that ``build`` knows, in this process and every other one of this user.

    Parameters
    ----------
    id
        What to call it: ``"me/mosaics"``. The same id again replaces what was registered; a name of the package's
        changes only the fields given.
    like
        Take bands and rules of this dataset or id (``"sentinel-2-l2a"``, ``"pc/landsat-c2-l2"``).
    bands
        Bands, as codes (``["R", "G", "B"]``: one file each, or with ``index`` one file of all) or as dicts of code,
        asset, common_name, kind, role, band_index, scale, offset, nodata, valid_min, valid_max, dtype, gsd_m, optional
        (kept only where it is asked for). Neither ``like`` nor ``bands``: each item names its own.
    stores
        Places (``s3://bucket``, ``https://host``) to which ``access``, ``region``, ``endpoint`` and ``signer`` apply.
    region
        Of the buckets.
    endpoint
        URL of the S3 service that has the buckets, where it is not AWS.
    signer
        ``"module:name"`` of a function that takes an href of these hosts and returns the URL to request: see
        :func:`rasteret_dask.sign`. Only its name is written.
    path
        The TOML file to write; None: the user's own, see :mod:`rasteret_dask.catalogs.catalog`.
    **fields
        Where scenes are found: ``stac_api=`` with ``collection=``, ``catalog=`` (a static STAC catalog) or
        ``index=`` (a Parquet table of files) with ``columns=``. What holds for all bands: ``scale, offset, nodata,
        valid_min, valid_max, kind, role, dtype``; ``assets={code: asset key}``. What to know: ``title, access``
        ("anonymous", "keys", "requester-pays", "planetary-computer"), ``licence, licence_url, attribution,
        resolution_m, time_start, time_end, bbox``, and ``static=True`` of what does not change: elevation, soil.

    Returns
    -------
    Entry
        As :func:`rasteret_dask.catalogs.catalog.find` will give it.

    Raises
    ------
    SourceError
        When a field does not make sense, or the file is broken; then nothing is written.
    StoreError
        When the file cannot be written.

    Examples
    --------
    >>> entry = rd.register(
    ...     "me/scenes", like="sentinel-2-l2a", catalog="demo/world/sentinel-2-l2a/collection.json"
    ... )
    >>> len(rd.build("me/scenes"))
    8
    """
    place = user_file() if path is None else Path(path)
    entry, dataset = _tables(id_checked(id), like, bands, fields)
    rules = _stores(
        id, stores, fields.get("access"), {"region": region, "endpoint": endpoint, "signer": signer}
    )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(f"{place}.lock", timeout=_WAIT_S):
            before = place.read_text(encoding="utf-8") if place.exists() else ""
            after = _with(before, str(place), id, entry, dataset, rules)
            found = catalog_of(package(), parse_toml(after, str(place)), str(place)).entries[id]
            _replace(place, after)
    except LockError:
        raise StoreError(
            f"writing {place}", f"another process holding it for {_WAIT_S} s", "", "Try again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"writing {place}", str(error), "a text file that can be written") from error
    return found


def _tables(
    name: str, like: str | None, bands: Sequence[str | Mapping[str, Any]] | None, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the fields of the entry, and those of a dataset of its own where it needs one."""
    entry = {key: _plain(value) for key, value in fields.items() if key not in _PIXELS}
    if "catalog" in entry and "://" not in entry["catalog"]:
        entry["catalog"] = os.path.abspath(entry["catalog"])
    pixels = {key: fields[key] for key in _PIXELS if key in fields}
    own: dict[str, Any] = dict(pixels)
    if like is not None:
        own["like"], assets = _like(like)
        if assets:
            entry["assets"] = {**assets, **entry.get("assets", {})}
    if bands is not None:
        own["bands"] = [_plain(band) for band in bands]
        if "index" in fields:
            own["asset"] = "data"
    if not own:
        return entry, None
    if like is None and bands is None:
        raise SourceError(
            f"dataset {name!r}",
            f"{', '.join(pixels)} without bands",
            "bands=[...], or like='another dataset'",
        )
    if own.keys() == {"like"}:
        return {**entry, "dataset": own["like"]}, None
    return {**entry, "dataset": name}, own


def _like(name: str) -> tuple[str, dict[str, str]]:
    """Return the dataset that a name or an id means, and the asset keys that differ from its own."""
    known = catalog()
    if name in known.datasets:
        return name, {}
    dataset = find(name).dataset
    if dataset is None:
        raise SourceError(f"like={name!r}", "an entry without bands", f"one of {', '.join(known.datasets)}")
    usual = {band.code: band.asset for band in known.datasets[dataset.name].bands}
    return dataset.name, {b.code: b.asset for b in dataset.bands if b.asset != usual[b.code]}


def _stores(
    name: str, stores: Sequence[str], access: Access | None, further: Mapping[str, str | None]
) -> dict[str, dict[str, str]]:
    if isinstance(stores, str):
        stores = (stores,)
    if access == "requester-pays" and not stores:
        raise SourceError(
            f"dataset {name!r}",
            "access='requester-pays' and no stores",
            "which buckets: stores=['s3://bucket']",
        )
    if further.get("signer") and not stores:
        raise SourceError(
            f"dataset {name!r}", "a signer and no stores", "whose hrefs: stores=['https://host']"
        )
    rule = {"access": access or "anonymous", **{key: text for key, text in further.items() if text}}
    return {urlsplit(s)._replace(path="").geturl() if "://" in s else s: dict(rule) for s in stores}


def _plain(value: Any) -> Any:
    """Return a value as TOML has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _with(
    before: str,
    place: str,
    name: str,
    entry: dict[str, Any],
    dataset: dict[str, Any] | None,
    stores: Mapping[str, dict[str, str]],
) -> str:
    """Return the file's text with these tables in it, and everything else, comments too, as it was."""
    parse_toml(before, place)  # what is broken is told, not mended
    document = tomlkit.parse(before)

    def put(table: str, key: str, fields: dict[str, Any] | None) -> None:
        if fields is None and key not in document.get(table, {}):
            return
        if table not in document:
            document[table] = tomlkit.table(is_super_table=True)
        tables: Any = document[table]
        if fields is None:
            del tables[key]
        else:
            tables[key] = fields

    put("dataset", name, dataset)
    put("entry", name, entry)
    for store, rule in stores.items():
        put("store", store, rule)
    return tomlkit.dumps(document)


def _replace(place: Path, text: str) -> None:
    """Write a file in one step: who reads meanwhile finds the old one, or the new one."""
    new = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, place)
    finally:
        new.unlink(missing_ok=True)
