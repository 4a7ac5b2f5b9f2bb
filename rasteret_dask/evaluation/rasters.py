# SPDX-License-Identifier: Apache-2.0
"""What users call a map (a store, files, arrays of xarray) becomes rasters that chips are read from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.crs import number
from rasteret_dask.errors import GridError, PlanError, StoreError
from rasteret_dask.evaluation.reading import (
    ArrayPixels,
    FilePixels,
    PixelGrid,
    Raster,
    RasterPixels,
    Rasters,
    ZarrPixels,
)
from rasteret_dask.lists import listed
from rasteret_dask.net import remote
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.hrefs import is_local, redact
from rasteret_dask.net.places import Place
from rasteret_dask.prediction.openmap import map_zones, zarr_place

__all__ = ["MapRequest", "rasters_of"]

FILES = (".tif", ".tiff")

CLASSES, PROBABILITIES, VALUES = "classes", "probabilities", "values"
"""The variables of a map that ``Chips.predict`` writes."""

_NODES = ("zarr.json", ".zgroup", ".zmetadata")
_YX = (("y", "x"), ("latitude", "longitude"), ("lat", "lon"))
_EXPECTED = (
    "the path of a Zarr store, a GeoTIFF or a folder of them, or an xarray DataArray or Dataset with a CRS"
)


@dataclass(frozen=True, slots=True)
class MapRequest:
    """What is asked of a map."""

    subject: str
    """What it is for, in messages: ``evaluate(predictions=)``."""
    is_class: bool | None
    """Whether pixels are to be classes; None: as the map has them, integers are."""
    nodata: float | None = None
    """The number of invalid pixels; None: as the map says."""
    band: int | str | None = None
    """Which band, of several: its place from 0 on, or its name; None: the only one, or the likeliest class."""
    codes: Mapping[str, int] | None = None
    """Name -> class, for bands that are called after classes."""


def rasters_of(value: Any, request: MapRequest) -> Rasters:
    """Return the rasters that are meant.

    Parameters
    ----------
    value
        What the user gave.
    request
        What is asked of them.

    Raises
    ------
    PlanError
        When it is no map, or has no such band.
    GridError
        When it has no CRS, or its pixels lie on no grid of rows and columns.
    StoreError, ReadError
        When nothing lies there, or it cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        found = _of_path(Place.of(value).url, request)
    elif hasattr(value, "variables") or hasattr(value, "dims") or hasattr(value, "subtree"):
        found = [_of_array(one, request) for one in _arrays_of(value, "a map in memory", request)]
    else:
        raise PlanError(request.subject, f"a {type(value).__name__}", _EXPECTED)
    kinds = {one.is_class for one in found}
    names: dict[int, str] = {}
    for one in found:
        names |= one.names
    if len(kinds) > 1:
        raise PlanError(request.subject, "rasters of integers and of floats", "all of one kind")
    text = redact(Place.of(value).url) if isinstance(value, str | os.PathLike) else "a map in memory"
    return Rasters(text, tuple(one.raster for one in found), kinds.pop(), names)


@dataclass(frozen=True, slots=True)
class _Named:
    raster: Raster
    is_class: bool
    names: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class _Array:
    """One array of a map, as xarray has it."""

    name: str
    array: Any
    """An xarray DataArray whose last dimensions are y and x."""
    crs: int
    store: tuple[str, str] | None = None
    """Where it lies, as a Zarr store and a path in it; None: in memory, or wherever xarray has it."""


# Files


def _of_path(url: str, request: MapRequest) -> list[_Named]:
    if is_local(url) and not os.path.exists(url):
        raise StoreError(request.subject, f"nothing at {redact(url)}", _EXPECTED)
    if url.lower().endswith(FILES) or (is_local(url) and os.path.isfile(url)):
        return [_of_file(url, request)]
    if any(remote.exists(remote.join(url, name)) for name in _NODES):
        return [_of_array(one, request) for one in _stored(url, request)]
    files = _files_in(url)
    if not files:
        raise StoreError(
            request.subject, f"neither a Zarr store nor a GeoTIFF in {redact(url)}", _EXPECTED,
            "Give the folder that predict wrote.",
        )  # fmt: skip
    return [_of_file(one, request) for one in files]


def _files_in(url: str) -> list[str]:
    if is_local(url):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(url) for name in names)
    else:
        found = (remote.join(url, name) for name in remote.listing(url))
    return sorted(one for one in found if one.lower().endswith(FILES))


def _of_file(href: str, request: MapRequest) -> _Named:
    import rasterio

    try:
        if is_local(href):
            with rasterio.open(href) as file:
                return _described(href, file, request)
        place = GdalFile(href)
        try:
            opened = place.open("GTiff")
            return place.call(lambda: _described(href, opened, request))
        finally:
            place.close()
    except rasterio.errors.RasterioError as error:
        raise StoreError(request.subject, f"{redact(href)}: {error}", "a GeoTIFF") from error


def _described(href: str, file: Any, request: MapRequest) -> _Named:
    name, turn = redact(href), file.transform
    if file.crs is None:
        raise _no_crs(request, name)
    if turn.b or turn.d or turn.a <= 0 or turn.e == 0:
        raise GridError(
            f"{request.subject}: {name}", "rows and columns that are no axes of its CRS", "a north-up raster",
            "Warp it: gdalwarp -r near in.tif out.tif.",
        )  # fmt: skip
    grid = PixelGrid(number(file.crs), turn.c, turn.f, turn.a, turn.e, file.height, file.width)
    whole = np.dtype(file.dtypes[0]).kind in "iu"
    labels = [text or str(n) for n, text in enumerate(file.descriptions, 1)]
    classes = [_classes_of(file, band) for band in file.indexes]
    scores = {code: text for own in classes if len(own) == 1 for code, text in own.items()}
    codes: tuple[int, ...] | None
    if request.is_class and request.band is None and not whole and 1 < len(classes) == len(scores):
        names, bands, codes = scores, tuple(range(len(classes))), tuple(scores)
    else:
        names, (bands, codes) = classes[0], _bands(labels, whole, name, request)
    pixels = FilePixels(href, request.nodata, tuple(band + 1 for band in bands))
    is_class = whole if request.is_class is None else request.is_class
    return _Named(Raster(name, grid, pixels, codes), is_class, _plain(names) if is_class else {})


def _classes_of(file: Any, band: int) -> dict[int, str]:
    """Return the classes that the tags of a band name."""
    tags = {
        key.removeprefix("CLASS_"): text for key, text in file.tags(band).items() if key.startswith("CLASS_")
    }
    return {int(code): text for code, text in tags.items() if code.isdecimal()}


def _no_crs(request: MapRequest, name: str) -> GridError:
    return GridError(
        f"{request.subject}: {name}", "no CRS", "a map that says where it lies",
        "Set it: da.rio.write_crs('EPSG:32633'), or gdal_edit.py -a_srs EPSG:32633 map.tif.",
    )  # fmt: skip


def _bands(
    labels: Sequence[object], whole: bool, name: str, request: MapRequest
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the places of bands to read, and of several the class that each stands for."""
    texts = [str(label) for label in labels]
    if request.band is not None:
        place = texts.index(str(request.band)) if str(request.band) in texts else request.band
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise PlanError(
                f"{request.subject}: {name}", f"no band {request.band!r}",
                f"one of {listed(texts)}, or its place from 0 on",
            )  # fmt: skip
        return (place,), None
    if len(labels) == 1:
        return (0,), None
    if not request.is_class or whole:
        raise PlanError(
            f"{request.subject}: {name}", f"{len(labels)} bands", "one, or of classes how likely each is, as floats",
            f"Choose one: band={texts[0]!r}.",
        )  # fmt: skip
    return tuple(range(len(labels))), tuple(_code(text, name, request) for text in texts)


def _code(text: str, name: str, request: MapRequest) -> int:
    """Return the class of a band that is called after it."""
    known = request.codes or {}
    if text in known:
        return known[text]
    try:
        return int(text)
    except ValueError:
        raise PlanError(
            f"{request.subject}: {name}", f"a band {text!r}",
            f"bands called after classes ({listed(list(known))}) or numbers",
            "Say what bands are: da.assign_coords(band=[1, 2]), or classes={1: 'water'}.",
        ) from None  # fmt: skip


# Arrays of xarray


def _stored(url: str, request: MapRequest) -> Iterator[_Array]:
    import xarray as xr

    place = zarr_place(url)
    root = (
        json.loads(remote.get(remote.join(url, "zarr.json")))
        if remote.exists(remote.join(url, "zarr.json"))
        else {}
    )
    options: dict[str, Any] = {
        "engine": "zarr",
        "mask_and_scale": False,
        "decode_times": False,
        "chunks": None,
    }
    if "rasteret_dask" in root.get("attributes", {}):  # what lies beside the arrays of its root is no Zarr
        zones = {
            zone or "/": xr.open_dataset(place, group=zone or None, consolidated=not zone, **options)
            for zone in map_zones(url)
        }
        tree = xr.DataTree.from_dict(zones)
    else:
        whole = "consolidated_metadata" in root
        tree = xr.open_datatree(place, consolidated=whole, **options)
    for one in _arrays_of(tree, redact(url), request):
        yield _Array(one.name, one.array, one.crs, (url, one.array.encoding["node"]))


def _arrays_of(value: Any, name: str, request: MapRequest) -> Iterator[_Array]:
    """Yield the arrays of a DataArray, Dataset or DataTree that hold the map, a zone each."""
    if hasattr(value, "subtree"):
        some = False
        maps: list[str] = []
        for node in value.subtree:
            below = any(
                f"{node.path}/".startswith(one) for one in maps
            )  # coarser levels of a map lie below it
            if not below and _variable(node.to_dataset(), request) is not None:
                some = True
                maps.append(f"{node.path.rstrip('/')}/")
                for one in _arrays_of(node.to_dataset(), f"{name}{node.path.rstrip('/')}", request):
                    one.array.encoding["node"] = f"{node.path}/{one.array.name}".strip("/")
                    yield one
        if not some:
            raise _no_map(request, name)
        return
    if hasattr(value, "data_vars"):
        variable = _variable(value, request)
        if variable is None:
            raise _no_map(request, name)
        array, around = value[variable], value
    else:
        array, around = value, value.coords
    pair = next((pair for pair in _YX if set(pair) <= set(array.dims)), None)
    if pair is None:
        raise PlanError(
            f"{request.subject}: {name}", f"dimensions {', '.join(map(str, array.dims))}", "y and x"
        )
    others = [dim for dim in array.dims if dim not in pair]
    array = array.isel({dim: 0 for dim in others if array.sizes[dim] == 1 and dim != "band"}, drop=True)
    array = array.transpose(..., *pair)
    if array.ndim > 3:
        raise PlanError(
            f"{request.subject}: {name}", f"dimensions {', '.join(map(str, array.dims))}", "y, x and at most bands",
            "Choose one entry of the others: da.isel(time=0).",
        )  # fmt: skip
    yield _Array(name, array, _crs(array, around, name, request))


def _no_map(request: MapRequest, name: str) -> PlanError:
    return PlanError(
        f"{request.subject}: {name}", "no array (y, x) that is the map",
        f"{CLASSES}, {PROBABILITIES} or {VALUES}, or a single one",
        "Choose it: ds['map'].",
    )  # fmt: skip


def _variable(dataset: Any, request: MapRequest) -> str | None:
    order = (
        (VALUES, CLASSES, PROBABILITIES) if request.is_class is False else (CLASSES, PROBABILITIES, VALUES)
    )
    own = [str(name) for name, v in dataset.data_vars.items() if any(set(p) <= set(v.dims) for p in _YX)]
    named = [name for name in order if name in own]
    return named[0] if named else own[0] if len(own) == 1 else None


def _crs(array: Any, around: Any, name: str, request: MapRequest) -> int:
    mapping = array.attrs.get("grid_mapping") or array.encoding.get("grid_mapping") or "spatial_ref"
    attrs = around[mapping].attrs if mapping in around else {}
    for text in (
        attrs.get("crs_wkt"),
        attrs.get("spatial_ref"),
        array.attrs.get("crs"),
        array.attrs.get("proj:code"),
    ):
        if text:
            return number(text)
    raise _no_crs(request, name)


def _of_array(one: _Array, request: MapRequest) -> _Named:
    array = one.array
    whole = array.dtype.kind in "iub"
    names = _names(array.attrs)
    bands: tuple[int, ...] | None = None
    codes = None
    if array.ndim == 3:
        dim = array.dims[0]
        labels = array[dim].values.tolist() if dim in array.coords else list(range(array.shape[0]))
        if dim not in array.coords and array.shape[0] > 1 and request.is_class and request.band is None:
            raise PlanError(
                f"{request.subject}: {one.name}", f"a dimension {dim!r} without a coordinate",
                "a class for each entry of it",
                f"Say it: da.assign_coords({dim}=[1, 2]).",
            )  # fmt: skip
        stated = array.attrs.get("codes", ())
        if request.is_class and request.band is None and 1 < len(stated) == len(labels):
            bands, codes = tuple(range(len(labels))), tuple(int(code) for code in stated)
            names = _plain(dict(zip(codes, map(str, labels), strict=True)))
        else:
            bands, codes = _bands(labels, whole, one.name, request)
    elif request.band is not None:
        _bands([array.name if array.name is not None else "0"], whole, one.name, request)
    y, x = array.dims[-2:]
    origin_x, dx = _edges(_centres(array, x), one.name, request)
    origin_y, dy = _edges(_centres(array, y), one.name, request)
    if dx < 0:
        raise GridError(
            f"{request.subject}: {one.name}", "x that falls", "x that rises", "Sort it: da.sortby('x')."
        )
    grid = PixelGrid(one.crs, origin_x, origin_y, dx, dy, *array.shape[-2:])
    nodata = _nodata(array) if request.nodata is None else request.nodata
    pixels: RasterPixels
    pixels = ArrayPixels(array, nodata, bands) if one.store is None else ZarrPixels(*one.store, nodata, bands)
    is_class = whole if request.is_class is None else request.is_class
    return _Named(Raster(one.name, grid, pixels, codes), is_class, names if is_class else {})


def _centres(array: Any, dim: Any) -> NDArray[np.float64]:
    return np.asarray(array[dim].values, dtype=np.float64) if dim in array.coords else np.zeros(0)


def _edges(centres: NDArray[np.float64], name: str, request: MapRequest) -> tuple[float, float]:
    """Return where the first pixel begins, and the step to the next, of the coordinates of pixel centres."""
    steps = np.diff(centres)
    step = float((centres[-1] - centres[0]) / len(steps)) if len(steps) else 0.0
    if not step or np.abs(steps - step).max() > 1e-3 * abs(step):
        raise GridError(
            f"{request.subject}: {name}",
            "coordinates that are not evenly spaced" if step else "no coordinates of two pixels",
            "x and y of pixel centres, in even steps",
        )  # fmt: skip
    return float(centres[0]) - step / 2, step


def _nodata(array: Any) -> float | None:
    attrs = array.attrs
    for found in (attrs.get("_FillValue"), attrs.get("nodata"), attrs.get("missing_value")):
        if found is not None:
            return float(found)
    stored = array.encoding.get("_FillValue")  # of decoded floats, invalid ones are NaN already
    return float(stored) if stored is not None and array.dtype.kind in "iu" else None


def _names(attrs: Mapping[Any, Any]) -> dict[int, str]:
    """Return the names of classes: as CF says them (flag_values, flag_meanings), or STAC, or a plain mapping."""
    values, meanings = attrs.get("flag_values"), attrs.get("flag_meanings")
    if values is not None and isinstance(meanings, str):
        codes = np.atleast_1d(values).astype(int).tolist()
        texts = list(attrs.get("class_names", meanings.split()))  # CF's words hold no spaces
        return _plain(dict(zip(codes, map(str, texts), strict=True))) if len(codes) == len(texts) else {}
    classes = attrs.get("classes", attrs.get("classification:classes"))
    if isinstance(classes, Mapping):
        return {int(value): str(name) for value, name in classes.items()}
    if isinstance(classes, list | tuple) and all(isinstance(one, Mapping) for one in classes):
        return {int(one["value"]): str(one.get("name", one["value"])) for one in classes}
    return {}


def _plain(names: dict[int, str]) -> dict[int, str]:
    """Return names without those that only say the number again."""
    return {code: name for code, name in names.items() if name != str(code)}
