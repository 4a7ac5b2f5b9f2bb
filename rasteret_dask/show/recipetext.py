# SPDX-License-Identifier: Apache-2.0
"""A plan as the text of a recipe."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import tomlkit

from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.areas import as_area, as_points
from rasteret_dask.planning.functions import Function
from rasteret_dask.planning.origins import BuildCall
from rasteret_dask.planning.plan import (
    TIME,
    ChipSpec,
    CutChips,
    Filter,
    FilterChips,
    FilterPixels,
    Folds,
    Harmonize,
    HarmonizeSpec,
    Join,
    Map,
    Merge,
    Node,
    Predicate,
    Random,
    Sample,
    Select,
    Source,
    Split,
    SplitSpec,
    WithTable,
    changes,
    children,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import token_of
from rasteret_dask.rules.masks import AnyOf, Mask, Named
from rasteret_dask.rules.picks import PICKS
from rasteret_dask.rules.units import UNITS, Units
from rasteret_dask.rules.values import RuleValue
from rasteret_dask.table import geoparquet
from rasteret_dask.zones import BoxGrid, ChipGrid, CrsGrid, FileGrid, TileGrid, UtmGrid

__all__ = ["recipe_text"]

Table = dict[str, Any]

_KEYS = {"source": "stac", "path": "records", "filter": "cql2"}
"""{argument of a function that makes a table: its key in a recipe}, where that is another one."""

_STEPS: dict[type, str] = {Filter: "filter", Sample: "sample", Harmonize: "harmonize", Map: "map"}
_ORDER = tuple(_STEPS.values())
"""Steps of a collection, in the order in which a recipe takes them."""

_LOOSE_POINTS = 100
"""Points that are written into the recipe itself, at most."""

_PACKAGE = __name__.partition(".")[0]


def recipe_text(
    query: Query,
    path: str | os.PathLike[str] | None = None,
    cells: pa.Table | None = None,
    folds: pa.Table | None = None,
) -> str:
    """Return the recipe of a plan of chips.

    Parameters
    ----------
    query
        The plan, and the tables and functions that it names.
    path
        Where the recipe will lie: tables that no call made again are written beside it. None: such a plan is refused.
    cells, folds
        Split cells with the splits, and with the folds, that were dealt by what they hold, which the recipe keeps;
        None: it deals them again.

    Raises
    ------
    PlanError
        When a table or a function of the plan has no name that a file could hold.
    """
    tables = {step: table for step, table in (("split", cells), ("folds", folds)) if table is not None}
    query = query.then(query.plan, {token_of(table): table for table in tables.values()})
    dealt = {step: token_of(table) for step, table in tables.items()}
    return _Writer(query, None if path is None else Path(path).expanduser().absolute(), dealt).text()


class _Writer:
    """Turns nodes into tables, each collection once."""

    def __init__(self, query: Query, path: Path | None, dealt: Mapping[str, str]) -> None:
        self.query = query
        self.dealt = dealt
        self.path = path
        self.tables: dict[str, Table] = {}
        self.names: dict[Node, str] = {}
        self.uses = Counter(child for node in _every(query.plan) for child in children(node))

    def text(self) -> str:
        """Return the whole recipe."""
        steps: list[Node] = []
        node = self.query.plan
        while not isinstance(node, CutChips):
            steps.insert(0, node)
            (node,) = children(node)
        cut = self._cut(node.spec)
        chosen = self.collection(node.child)
        lines = ["# A recipe of rasteret_dask, written from a plan.", ""]
        for name, table in self.tables.items():
            lines += [*_lines(("collections", name), table), ""]
        lines += [*_lines(("chips",), {"collection": chosen, **cut}), ""]
        if steps and isinstance(first := steps[0], Split):
            lines += [*_lines(("split",), self._split(first.spec)), ""]
            del steps[0]
        for step in steps:
            key, value = self._step(step)
            lines += ["[[steps]]", f"{_key(key)} = {_value(value)}", ""]
        return "\n".join(lines)

    def collection(self, node: Node, wish: str = "merged") -> str:
        """Return the name of the collection that a node is; its table is written before.

        A merge has no name of its own: it is called ``wish``.
        """
        if node in self.names:
            return self.names[node]
        if isinstance(node, Filter | Sample | Harmonize | Map):
            below = self.collection(node.child, wish)
            key = _STEPS[type(node)]
            table = self.tables[below]
            last = max((_ORDER.index(one) for one in table if one in _ORDER), default=-1)
            if self.uses[node.child] > 1 or _ORDER.index(key) <= last:
                below, table = self._new(f"{below}_{key}", {"from": below})
            table[key] = self._record_step(node)
            self.names[node] = below
            return below
        name, table = self._begun(node, wish)
        self.names[node] = name
        return name

    def _begun(self, node: Node, wish: str) -> tuple[str, Table]:
        if isinstance(node, Merge):
            return self._new(wish, {"merge": [self.collection(child) for child in node.children]})
        if isinstance(node, Join):
            parts = zip(node.names, node.children, strict=True)
            table: Table = {"join": {name: self.collection(child, name) for name, child in parts}}
            if node.require is not None:
                table["require"] = list(node.require)
            return self._new("joined", table)
        assert isinstance(node, Source)
        name, table = self._new(_bare(node.name), self._source(node))
        if name != node.name:
            table["name"] = node.name
        return name, table

    def _new(self, wish: str, table: Table) -> tuple[str, Table]:
        name, number = wish, 2
        while name in self.tables:
            name, number = f"{wish}_{number}", number + 1
        self.tables[name] = table
        return name, table

    def _source(self, node: Source) -> Table:
        """Return how records are had again: the call that made them, else a file beside the recipe."""
        origin = self.query.origins.get(node)
        if origin is not None and origin.obstacle is None:
            return _call(origin)
        why = (
            "a table in this process's memory" if origin is None else f"{origin.function}({origin.obstacle})"
        )
        return {"records": self._beside(node.token, node.name, f"collection {node.name!r}", why)}

    def _beside(self, token: str, name: str, subject: str, why: str) -> str:
        """Write a table beside the recipe; return its name."""
        if self.path is None:
            raise PlanError(
                f"to_recipe: {subject}", f"{why}, which no text can say", "what a file or a dataset's name holds",
                "chips.to_recipe('train.toml') writes the recipe, and such tables into files beside it.",
            )  # fmt: skip
        data = self.query.tables[token]
        place = self.path.with_name(f"{self.path.stem}-{_bare(name)}.parquet")
        table = data if isinstance(data, pa.Table) else data.to_table()
        if "geometry" in table.column_names:
            geoparquet.write(table, place)
        else:
            pq.write_table(table, place)
        return place.name

    # Steps

    def _record_step(self, node: Filter | Sample | Harmonize | Map) -> Any:
        match node:
            case Filter():
                return [_triple(one) for one in node.where]
            case Sample():
                return _sample(node)
            case Harmonize():
                return _harmonize(node.spec)
            case Map():
                return self._called(node.function, source=node.source)

    def _step(self, node: Node) -> tuple[str, Any]:
        match node:
            case Split():
                return "split", self._split(node.spec)
            case Folds():
                return "folds", self._folds(node.spec)
            case FilterChips():
                return "filter", [_triple(one) for one in node.where]
            case Sample():
                return "sample", _sample(node)
            case Random(_, n, seed, size, balance, places):
                columns: Any = balance[0] if len(balance) == 1 else list(balance) or None
                if places is not None:
                    columns = self._beside(places, "places", "random(balance=<places>)", "a table")
                return "random", {"n": n, **_some({"seed": seed or None, "size": size, "balance": columns})}
            case Select():
                return "select", list(node.splits)
            case Map():
                return "map", self._called(node.function, source=node.source)
            case FilterPixels():
                rule = node.spec
                function = {} if rule.function is None else self._called(rule.function)
                shares = {name: getattr(rule, name) for name in ("min_valid", "max_cloud", "min_labelled")}
                rest = {**shares, "source": rule.source}
                return "filter_pixels", {**function, **_some(rest)}
            case WithTable():
                return "with_table", self._beside(node.token, "chips", "with_table", "a table")
        raise AssertionError(node)

    def _called(self, function: Function, source: str | None = None) -> Table:
        """Return how a function is named; it is imported once, to see that this name is its own."""
        text = f"{function.module}:{function.name}"
        version = function.source.removeprefix("version ") if function.source.startswith("version ") else None
        _check_importable(text, self.query.functions[function], f"function {text}")
        return {"function": text, **_some({"source": source, "version": version})}

    def _split(self, spec: SplitSpec) -> Table:
        table = _split(spec)
        if spec.by == TIME:
            ranges = {name: list(own) for name, own in spec.values if own is not None}
            table |= {name: [".." if edge is None else edge for edge in own] for name, own in ranges.items()}
        if spec.regions is not None:
            table.pop("regions")
            table["by"] = self._beside(spec.regions, spec.by, "split(by=<regions>)", "a table")
        return self._with_deal(table, spec)

    def _folds(self, spec: SplitSpec) -> Table | int:
        others = changes(spec, SplitSpec(spec.ratios, salt=spec.salt))
        return self._with_deal({"k": len(spec.ratios), **others}, spec) if others else len(spec.ratios)

    def _with_deal(self, table: Table, spec: SplitSpec) -> Table:
        """Add what decides the deal of split cells."""
        if len(spec.stratify) == 1:
            table["stratify"] = spec.stratify[0]
        if spec.raster is not None:
            del table["raster"]
            table["stratify"] = self._beside(
                spec.raster, f"{spec.step}-classes", f"{spec.step}(stratify={spec.stratify[0]!r})",
                "classes counted in a raster",
            )  # fmt: skip
        cells = self.dealt.get(spec.step) if spec.stratify else None
        if cells is not None or spec.cells is not None:
            name = "cells" if spec.step == "split" else "fold-cells"
            table["cells"] = self._beside(cells or str(spec.cells), name, f"{spec.step}(cells=)", "a table")
        return table

    # Chips

    def _cut(self, spec: ChipSpec) -> Table:
        table: Table = {"size": spec.size, **changes(spec, spec.plain)}
        if spec.by_file:
            raise PlanError(
                "to_recipe", "chips that are files, of rd.read_chips", "chips that are cut out of scenes",
                "Keep the plan itself: chips.save_plan(path); or call rd.read_chips in a script.",
            )  # fmt: skip
        if "grid" in table:
            table["grid"] = _grid(spec.grid, spec.cell_km)
            if isinstance(table["grid"], dict):
                table["cell_km"] = spec.cell_km
        if spec.aoi is not None:
            table["aoi"] = _area(spec.aoi)
        if spec.at is not None:
            table["at"] = self._points(spec.at)
        if spec.labels is not None:
            table["labels"] = self._beside(spec.labels, "labels", "chips(labels=)", "a table")
        if spec.context_m:
            table["context_m"] = dict(spec.context_m)
        if isinstance(spec.rasterize, tuple):
            table["rasterize"] = list(spec.rasterize)
        if spec.classes:
            several = isinstance(spec.rasterize, tuple)
            table["classes"] = {k: list(v) for k, v in spec.classes} if several else list(spec.classes)
        return table

    def _points(self, token: str) -> Any:
        data = self.query.tables[token]
        assert isinstance(data, pa.Table)
        shapes = shapely.from_wkb(data.column("geometry").to_numpy())
        if len(shapes) <= _LOOSE_POINTS and all(shape.geom_type == "Point" for shape in shapes):
            points = [[float(shape.x), float(shape.y)] for shape in shapes]
            if token_of(as_points(points)) == token:
                return points
        return self._beside(token, "at", "chips(at=)", "a table")


def _every(node: Node) -> Iterator[Node]:
    """Yield each node once, however often it is used."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            yield one
            waiting += children(one)


def _call(origin: BuildCall) -> Table:
    """Return the call that made a table as keys of a recipe, what it begins with first."""
    table = {_KEYS.get(key, key): value for key, value in origin.arguments}
    if isinstance(table.get("date_range"), list):  # an open end, as STAC writes it
        table["date_range"] = [".." if end is None else end for end in table["date_range"]]
    for key, value in table.items():
        if _holds_none(value):
            raise PlanError(
                f"to_recipe: {origin.function}({key}=)", "None inside of it", "what TOML can say",
                "Build the collection without it, and filter behind: subset(...), filter(...).",
            )  # fmt: skip
    table.setdefault("cache_dir", table.pop("workspace_dir", None))
    return _some(table)


def _holds_none(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(one is None or _holds_none(one) for one in inside)


def _triple(predicate: Predicate) -> Any:
    column, operator, value = predicate
    if value is None:
        return {"column": column, "operator": operator}
    if isinstance(value, tuple):
        ends = [".." if one is None and operator == "overlaps" else one for one in value]
        if None not in ends:
            return [column, operator, ends]
    else:
        return [column, operator, value]
    raise PlanError(
        f"to_recipe: filter on {column!r}", repr(value)[:100], "a value of TOML: text, a number, true or false",
        "Write the filter by a function in Python, or without that value.",
    )  # fmt: skip


def _sample(node: Sample) -> Table:
    return {"n": node.n, **_some({"seed": node.seed or None, "by": node.by})}


def _split(spec: SplitSpec) -> Table:
    values = {name: list(own) for name, own in spec.values if own is not None}
    others = changes(spec, SplitSpec(spec.ratios, by=spec.by, values=spec.values))
    return {**dict(spec.ratios), **values, **({} if spec.by == "ground" else {"by": spec.by}), **others}


def _harmonize(spec: HarmonizeSpec) -> Table:
    table = changes(spec, HarmonizeSpec())
    if spec.bands is not None:
        table["bands"] = list(spec.bands)
    if isinstance(spec.time, tuple):
        table["time"] = list(spec.time)
    if spec.units is not None:
        table["units"] = None if spec.units == Units() else _units(spec.units)
    if spec.mask is not None:
        table["mask"] = _mask(spec.mask)
    if spec.pick is not None:
        table["pick"] = _word(spec.pick, PICKS)
    if spec.kinds is not None:
        table["kinds"] = dict(spec.kinds)
    if spec.meta is not None:
        table["meta"] = list(spec.meta)
    return _some(table)


def _units(units: Units) -> Any:
    if units.bands:
        return {band: _word(unit, UNITS) for band, unit in units.bands}
    return _word(units.default, UNITS)


def _mask(mask: Mask) -> Any:
    if isinstance(mask, AnyOf):
        return [
            part for one in mask.masks for part in (one.words if isinstance(one, Named) else [_rule(one)])
        ]
    return list(mask.words) if isinstance(mask, Named) else _rule(mask)


def _word(rule: Any, words: Mapping[str, Any]) -> Any:
    """Return the word that stands for a rule, else its fields."""
    return next((word for word, one in words.items() if one == rule), None) or _rule(rule)


def _rule(rule: RuleValue) -> Table:
    cls = type(rule)
    if cls.__module__.partition(".")[0] == _PACKAGE:
        name = cls.__name__
    else:
        name = f"{cls.__module__}:{cls.__qualname__}"
        _check_importable(name, cls, f"rule {name}")
    table: Table = {"rule": name}
    for one in fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, one.name)
        if value != one.default or one.default is MISSING:
            table[one.name] = _field(value)
    return table


def _field(value: Any) -> Any:
    if isinstance(value, RuleValue):
        return _rule(value)
    return [_field(one) for one in value] if isinstance(value, tuple) else value


def _check_importable(name: str, value: Any, subject: str) -> None:
    """Refuse what a recipe cannot import by its name: lambdas, what lies in functions, what a notebook defines."""
    module, _, path = name.partition(":")
    again: Any = None
    if module != "__main__" and "<" not in path:
        try:
            again = importlib.import_module(module)
            for part in path.split("."):
                again = getattr(again, part)
        except (ImportError, AttributeError):
            again = None
    if again is not value:
        raise PlanError(
            f"to_recipe: {subject}", "what no import finds by this name", "a function or class of a module",
            "Write it into a file such as mycode.py, import it from there, and put the file beside the recipe.",
        )  # fmt: skip


def _grid(grid: ChipGrid, cell_km: float) -> Any:
    """Return a grid's word, CRS or numbers; None for the default."""
    match grid:
        case UtmGrid():
            return None
        case TileGrid() | FileGrid():
            return str(grid)
        case BoxGrid():
            box = [grid.x0, grid.y0 - grid.height * grid.pixel, grid.x0 + grid.width * grid.pixel, grid.y0]
            return {"crs": grid.crs, "bbox": box, "resolution": grid.pixel}
        case CrsGrid(pixel=None):
            return grid.crs
        case CrsGrid():
            assert grid.pixel is not None
            side = max(1, round(cell_km * 1000.0 / grid.pixel))
            size = {"tile_shape": [side, side], "resolution": grid.pixel, "origin": list(grid.origin)}
            return {"crs": grid.crs, **size}


def _area(wkb: str) -> Any:
    """Return an area as a box or GeoJSON where that says exactly the same, else as it is."""
    shape = shapely.from_wkb(bytes.fromhex(wkb))
    box = [float(edge) for edge in shape.bounds]
    if as_area(box) == wkb:
        return box
    plain = _listed(shapely.geometry.mapping(shape))
    return plain if as_area(plain) == wkb else {"wkb": wkb}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, tuple | list) else value


def _some(table: Mapping[str, Any]) -> Table:
    return {key: value for key, value in table.items() if value is not None}


# TOML


def _lines(path: tuple[str, ...], table: Table) -> Iterator[str]:
    """Yield the lines of a table: long tables in it come behind, as tables of their own."""
    yield f"[{'.'.join(map(_key, path))}]"
    apart = {key: value for key, value in table.items() if isinstance(value, dict) and len(value) > 3}
    for key, value in table.items():
        if key not in apart:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in apart.items():
        yield ""
        yield from _lines((*path, key), value)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    text: str = tomlkit.item(value.tolist() if hasattr(value, "tolist") else value).as_string()
    return text


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else tomlkit.string(text).as_string()


def _bare(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "collection"
