# SPDX-License-Identifier: Apache-2.0
"""From the tables of a recipe to collections and chips, by the functions that the tables are called after."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from rasteret_dask.building import build, build_from_stac
from rasteret_dask.chipset import Chips
from rasteret_dask.collection import Collection, join, merge
from rasteret_dask.errors import PlanError
from rasteret_dask.net.hrefs import is_local
from rasteret_dask.openers import build_from_files, build_from_table, load
from rasteret_dask.recipes.blame import blamed
from rasteret_dask.recipes.functions import named
from rasteret_dask.recipes.lines import KeyPath
from rasteret_dask.recipes.models import RECORD_STEPS, beginning_of, step_of
from rasteret_dask.recipes.shapes import shapes_of
from rasteret_dask.recipes.source import RecipeSource, nearest
from rasteret_dask.rules import masks, picks, units
from rasteret_dask.rules.values import RuleValue

__all__ = ["Assembly", "codec_of", "references"]

Values = Mapping[str, Any]

_BUILDERS: dict[str, tuple[Callable[..., Collection], str]] = {
    "dataset": (build, "dataset"),
    "stac": (build_from_stac, "source"),
    "stac_api": (build_from_stac, "stac_api"),
    "files": (build_from_files, "files"),
    "table": (build_from_table, "table"),
    "records": (load, "path"),
}
"""The key that a collection begins with -> the function that makes it, and its argument of that key."""

_PLACES = ("stac", "files", "table", "records", "cache_dir")
"""Keys whose text is a path or URL."""


_SHAPES = (".parquet", ".geoparquet", ".geojson", ".json", ".gpkg", ".shp")
"""Ends of files of regions: no column that decides a split is called so."""


_RASTERS = (".tif", ".tiff", ".jp2", ".parquet", ".pq")
"""Ends of files of classes, and of what was counted in some: no column of classes is called so."""


class Assembly:
    """Makes each collection of a recipe once, and chips of them."""

    def __init__(self, source: RecipeSource) -> None:
        self.source = source
        self._made: dict[str, Collection] = {}

    def collection(self, name: str) -> Collection:
        """Return a collection of the recipe; those that it refers to are made before it."""
        if name not in self._made:
            table: Values = self.source.document["collections"][name]
            self._made[name] = self._with_steps(self._begun(name, table), table, ("collections", name))
        return self._made[name]

    def chips(self) -> Chips:
        """Return the chips, with all steps."""
        document = self.source.document
        table: Values = document["chips"]
        collection = self.collection(self.chosen())
        arguments = {key: value for key, value in table.items() if key != "collection"}
        with blamed(self.source, ("chips",)):
            for key in ("aoi", "at", "labels"):
                if key in arguments:
                    with blamed(self.source, ("chips", key)):
                        arguments[key] = shapes_of(arguments[key], self.place)
            if "grid" in arguments:
                arguments["grid"] = _grid(arguments["grid"])
            chips = collection.chips(**arguments)
        if "split" in document:
            with blamed(self.source, ("split",)):
                chips = chips.split(**self._split(document["split"]))
        for number, step in enumerate(document.get("steps", ())):
            kind = step_of(step)
            assert kind is not None
            with blamed(self.source, ("steps", number, kind)):
                chips = self._step(chips, kind, step[kind])
        return chips

    def chosen(self) -> str:
        """Return the collection that chips are cut from.

        Raises
        ------
        RecipeError
            When the recipe does not say, and several are used by no other.
        """
        document = self.source.document
        name = document["chips"].get("collection")
        if name is not None:
            return str(name)
        used = {other for table in document["collections"].values() for _, other in references(table)}
        used |= {other for table in _deals(document) for other in _dealt_by(table)}
        last = [name for name in document["collections"] if name not in used]
        if len(last) == 1:
            return str(last[0])
        raise self.source.error(
            ("chips",), f"no key 'collection' in chips, and several that no other uses: {', '.join(last)}",
            "the collection that chips are cut from", f"Write collection = {last[-1]!r}." if last else "",
        )  # fmt: skip

    def place(self, text: str) -> str:
        """Return the path or URL that a text of the recipe names: relative ones begin at its folder."""
        return str(self.source.folder / os.path.expanduser(text)) if _is_path(text) else text

    def _begun(self, name: str, table: Values) -> Collection:
        key = beginning_of(table)
        path: KeyPath = ("collections", name)
        assert key is not None
        if key == "from":
            return self.collection(table["from"])
        if key == "merge":
            parts = [self.collection(other) for other in table["merge"]]
            with blamed(self.source, (*path, key)):
                return merge(*parts)
        if key == "join":
            sources = {source: self.collection(other) for source, other in table["join"].items()}
            with blamed(self.source, (*path, "require" if "require" in table else key)):
                return join(require=table.get("require"), **sources)
        function, argument = _BUILDERS[key]
        arguments = {
            k: self._located(k, v) for k, v in table.items() if k not in (*RECORD_STEPS, key, "cql2")
        }
        arguments |= {argument: self._located(key, table[key]), "name": table.get("name", name)}
        if "cql2" in table:
            arguments["filter"] = table["cql2"]
        with blamed(self.source, path, key):
            return function(**arguments)

    def _located(self, key: str, value: Any) -> Any:
        if key not in _PLACES:
            return value
        return [self.place(one) for one in value] if isinstance(value, list) else self.place(value)

    def _with_steps(self, collection: Collection, table: Values, path: KeyPath) -> Collection:
        for step in RECORD_STEPS:
            if step not in table:
                continue
            with blamed(self.source, (*path, step)):
                collection = self._record_step(collection, step, table[step], (*path, step))
        return collection

    def _record_step(self, collection: Collection, step: str, value: Any, path: KeyPath) -> Collection:
        match step:
            case "subset":
                arguments = dict(value)
                if "geometries" in arguments:
                    with blamed(self.source, (*path, "geometries")):
                        arguments["geometries"] = shapes_of(arguments["geometries"], self.place)
                return collection.subset(**arguments)
            case "filter":
                return collection.filter(*map(_triple, value))
            case "sample":
                return collection.sample(**(value if isinstance(value, Mapping) else {"n": value}))
            case "harmonize":
                return collection.harmonize(**{key: self._rules(one) for key, one in value.items()})
            case _:
                return collection.map(**self._called(value))

    def _step(self, chips: Chips, step: str, value: Any) -> Chips:
        match step:
            case "split":
                return chips.split(**self._split(value))
            case "folds":
                return chips.folds(**(self._split(value) if isinstance(value, Mapping) else {"k": value}))
            case "fold":
                return chips.fold(**(value if isinstance(value, Mapping) else {"i": value}))
            case "filter":
                return chips.filter(*map(_triple, value))
            case "sample":
                return chips.sample(**(value if isinstance(value, Mapping) else {"n": value}))
            case "random":
                return chips.random(**self._drawn(value))
            case "select":
                return chips.select(*value)
            case "map":
                return chips.map(**self._called(value))
            case "filter_pixels":
                return chips.filter_pixels(**(self._called(value) if "function" in value else value))
            case _:
                return chips.with_table(self.place(value))

    def _drawn(self, value: int | Values) -> dict[str, Any]:
        """Return arguments of random with the table of places that they name."""
        arguments: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"n": value}
        if str(arguments.get("balance")).endswith(".parquet"):
            arguments["balance"] = pq.read_table(self.place(arguments["balance"]))
        return arguments

    def _split(self, value: Values) -> dict[str, Any]:
        """Return arguments of split or folds with the table of cells, the raster and the regions that they name."""
        arguments = {key: self.place(one) if key == "cells" else one for key, one in value.items()}
        classes = arguments.get("stratify")
        for name in _dealt_by(value):
            names = list(self.source.document["collections"])
            if name not in names:
                raise PlanError(
                    "stratify", f"collection {name!r}", f"one of {', '.join(names)}", nearest(name, names)
                )
            arguments["stratify"] = self.collection(name)
        if isinstance(classes, str) and str(classes).lower().endswith(_RASTERS):
            arguments["stratify"] = self.place(str(classes))
        if str(arguments.get("by")).endswith(_SHAPES):
            arguments["by"] = shapes_of(arguments["by"], self.place)
        return arguments

    def _called(self, value: str | Values) -> dict[str, Any]:
        """Return arguments with the function that they name."""
        arguments = {"function": value} if isinstance(value, str) else dict(value)
        return {**arguments, "function": named(arguments["function"], self.source.folder)}

    def _rules(self, value: Any) -> Any:
        """Return a value with the rules that its tables name."""
        if isinstance(value, Mapping) and "rule" in value:
            return self._rule(value)
        if isinstance(value, Mapping):
            return {key: self._rules(one) for key, one in value.items()}
        return [self._rules(one) for one in value] if isinstance(value, list) else value

    def _rule(self, table: Values) -> RuleValue:
        word = table["rule"]
        rule: Any = next((vars(room)[word] for room in (masks, picks, units) if word in vars(room)), None)
        if rule is None:
            rule = named(word, self.source.folder)
        if not (isinstance(rule, type) and issubclass(rule, RuleValue)):
            raise PlanError(f"rule {word!r}", "something else", "a class of rd.masks, rd.picks or rd.units")
        fields = {key: _tuples(self._rules(one)) for key, one in table.items() if key != "rule"}
        try:
            return rule(**fields)
        except TypeError as error:
            names = [one.name for one in dataclasses.fields(rule)]  # type: ignore[arg-type]
            wrong = next((key for key in fields if key not in names), "")
            raise PlanError(
                f"rule {word!r}", str(error), f"its fields: {', '.join(names)}", nearest(wrong, names)
            ) from error


def codec_of(value: str | Values) -> Any:
    """Return the codec of Zarr that an output's ``compression`` names.

    Raises
    ------
    PlanError
        When its settings are none of the codec's.
    """
    if value in ("auto", "none"):
        return None if value == "none" else value
    from zarr import codecs

    settings: dict[str, Any] = {"codec": value} if isinstance(value, str) else dict(value)
    name = settings.pop("codec")
    kind = {"zstd": codecs.ZstdCodec, "gzip": codecs.GzipCodec, "blosc": codecs.BloscCodec}[name]
    if name == "blosc" and "level" in settings:
        settings["clevel"] = settings.pop("level")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise PlanError(f"compression {name!r}", str(error), "settings of that codec") from error


def references(table: Values) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path in the table, name) of the collections that a table refers to."""
    if "from" in table:
        yield ("from",), table["from"]
    for number, name in enumerate(table.get("merge", ())):
        yield ("merge", number), name
    for source, name in table.get("join", {}).items():
        yield ("join", source), name


def _deals(document: Values) -> Iterator[Values]:
    """Yield the tables of a recipe that deal split cells."""
    steps = [step[key] for step in document.get("steps", ()) for key in ("split", "folds") if key in step]
    for table in (document.get("split"), *steps):
        if isinstance(table, Mapping):
            yield table


def _dealt_by(table: Values) -> Iterator[str]:
    """Yield the collection whose classes decide a deal of split cells, if one does."""
    classes = table.get("stratify")
    if isinstance(classes, Mapping):
        yield classes["collection"]


def _is_path(text: str) -> bool:
    return is_local(text) and not text.startswith("file:")


def _triple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        value = [value["column"], value["operator"], value.get("value")]
    if list(value[1:2]) == ["overlaps"] and isinstance(value[-1], list):  # TOML has no null for an open end
        value = [*value[:-1], [None if one == ".." else one for one in value[-1]]]
    return tuple(_tuples(one) for one in value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _grid(value: str | Values) -> Any:
    """Return a grid by its word or CRS, or a GridSpec or GeoBox of numbers."""
    if isinstance(value, str):
        return value
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.gridspec import GridSpec
    from odc.geo.types import XY

    pixel = value["resolution"]
    if "tile_shape" in value:
        x, y = value.get("origin", (0.0, 0.0))
        return GridSpec(value["crs"], tuple(value["tile_shape"]), resolution=pixel, origin=XY(x, y))
    xmin, ymin, xmax, ymax = value["bbox"]
    width, height = (xmax - xmin) / pixel, (ymax - ymin) / pixel
    if min(width, height) < 0.5 or max(abs(side - round(side)) for side in (width, height)) > 1e-6:
        raise PlanError(
            "chips(grid=)", f"a box of {width:g} x {height:g} pixels", "one of whole pixels",
            "Change bbox, or resolution.",
        )  # fmt: skip
    return GeoBox((round(height), round(width)), Affine(pixel, 0, xmin, 0, -pixel, ymax), value["crs"])
