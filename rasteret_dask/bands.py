"""What each sensor's bands are called and measure: common names, scale, offset, nodata, quality bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DATASETS", "Band", "Dataset", "Radiometry", "dataset_of", "radiometry"]

Role = Literal["reflectance", "temperature", "quality", "class", "embedding", "data"]


@dataclass(frozen=True, slots=True)
class Band:
    """One layer of a sensor."""

    code: str
    """The sensor's own code (``B04``, ``SCL``, ``A00``): what a record calls the band."""
    asset: str
    """The provider's usual asset key (``red`` on Earth Search, ``B04`` on Planetary Computer uses the code)."""
    common_name: str | None = None
    """STAC's common name (``red``), or None where it has none."""
    role: Role = "reflectance"
    """What the numbers are."""
    band_index: int = 0
    """Position in its file, counted from 0."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is known about a published collection without reading a file."""

    name: str
    """STAC collection id this describes."""
    bands: tuple[Band, ...]
    """All bands that records keep."""
    scale: float = 1.0
    """Physical value = DN x scale + offset, for reflectance bands."""
    offset: float = 0.0
    """See ``scale``."""
    nodata: float | None = None
    """DN that means no data in reflectance bands."""
    quality: Literal["scl", "qa_pixel"] | None = None
    """How clouds are told; the band is ``SCL`` or ``qa_pixel``."""


_S2 = (
    ("B01", "coastal", "coastal"),
    ("B02", "blue", "blue"),
    ("B03", "green", "green"),
    ("B04", "red", "red"),
    ("B05", "rededge1", "rededge071"),
    ("B06", "rededge2", "rededge075"),
    ("B07", "rededge3", "rededge078"),
    ("B08", "nir", "nir"),
    ("B8A", "nir08", "nir08"),
    ("B09", "nir09", "nir09"),
    ("B11", "swir16", "swir16"),
    ("B12", "swir22", "swir22"),
)
_S2_BANDS = (*(Band(*row) for row in _S2), Band("SCL", "scl", None, "quality"))
_LANDSAT_BANDS = (
    Band("B1", "coastal", "coastal"),
    Band("B2", "blue", "blue"),
    Band("B3", "green", "green"),
    Band("B4", "red", "red"),
    Band("B5", "nir08", "nir"),
    Band("B6", "swir16", "swir16"),
    Band("B7", "swir22", "swir22"),
    Band("B10", "lwir11", "lwir11", "temperature"),
    Band("qa_pixel", "qa_pixel", None, "quality"),
    Band("qa_radsat", "qa_radsat", None, "quality"),
    Band("qa_aerosol", "qa_aerosol", None, "quality"),
)
_AEF_BANDS = tuple(Band(f"A{i:02d}", "data", None, "embedding", i) for i in range(64))

DATASETS: Mapping[str, Dataset] = {
    d.name: d
    for d in (
        Dataset("sentinel-2-l2a", _S2_BANDS, 1e-4, -0.1, 0, "scl"),
        Dataset("sentinel-2-c1-l2a", _S2_BANDS, 1e-4, -0.1, 0, "scl"),
        Dataset("landsat-c2-l2", _LANDSAT_BANDS, 2.75e-5, -0.2, 0, "qa_pixel"),
        Dataset("aef-v1-annual", _AEF_BANDS, 1.0, 0.0, -128, None),
    )
}
"""Known datasets by STAC collection id. A constant: nothing is added to it at run time."""

_ALIASES = {
    "sentinel-2-l2a-cogs": "sentinel-2-l2a",
    "sentinel-s2-l2a-cogs": "sentinel-2-l2a",
    "landsat-c2l2-sr": "landsat-c2-l2",
    "landsat-c2l2-st": "landsat-c2-l2",
    "aef/v1-annual": "aef-v1-annual",
    "earthsearch/sentinel-2-l2a": "sentinel-2-l2a",
    "pc/sentinel-2-l2a": "sentinel-2-l2a",
    "earthsearch/landsat-c2-l2": "landsat-c2-l2",
    "pc/landsat-c2-l2": "landsat-c2-l2",
}


def dataset_of(collection: str | None) -> Dataset | None:
    """Return the dataset that a STAC collection id or alias names, or None when it is not known."""
    if collection is None:
        return None
    return DATASETS.get(_ALIASES.get(collection, collection))


@dataclass(frozen=True, slots=True)
class Radiometry:
    """How DN become physical values in one record: ``value = DN x scale + offset``."""

    scale: float
    offset: float
    rule: str
    """Where the two numbers come from, in words; shown by ``explain()`` and kept in the output's attributes."""


def radiometry(
    dataset: Dataset | None,
    role: Role,
    properties: Mapping[str, Any],
    scale: float | None,
    offset: float | None,
) -> Radiometry:
    """Settle the scale and offset of one asset of one item.

    Parameters
    ----------
    dataset
        The known dataset, or None.
    role
        The band's role; only reflectance bands of known datasets have rules of their own.
    properties
        The STAC item's properties.
    scale, offset
        What the item's own ``raster:bands`` or ``bands`` say, None where they are silent.

    Notes
    -----
    Sentinel-2 L2A since processing baseline 04.00 (25 January 2022) carries an offset of -1000 DN. In Earth
    Search's ``sentinel-2-l2a`` the pixels have it applied already where ``earthsearch:boa_offset_applied`` is
    true, although ``raster:bands`` says -0.1 in both cases; ``sentinel-2-c1-l2a`` never has it applied.
    """
    if dataset is None or role != "reflectance":
        said = "item" if scale is not None or offset is not None else "identity"
        return Radiometry(1.0 if scale is None else scale, 0.0 if offset is None else offset, said)
    found_scale = dataset.scale if scale is None else scale
    if dataset.name == "sentinel-2-l2a":
        if properties.get("earthsearch:boa_offset_applied") is True:
            return Radiometry(
                found_scale, 0.0, "offset 0: earthsearch:boa_offset_applied, pixels have it applied"
            )
        baseline = properties.get("s2:processing_baseline", properties.get("processing:version"))
        if baseline is not None and float(baseline) < 4.0:
            return Radiometry(found_scale, 0.0, f"offset 0: baseline {baseline} is before 04.00")
        if baseline is not None:
            return Radiometry(
                found_scale, dataset.offset, f"offset -0.1: baseline {baseline} is 04.00 or later"
            )
        return Radiometry(
            found_scale, 0.0 if offset is None else offset, "item; no processing baseline known"
        )
    found_offset = dataset.offset if offset is None else offset
    return Radiometry(found_scale, found_offset, "item" if scale is not None else f"{dataset.name} default")
