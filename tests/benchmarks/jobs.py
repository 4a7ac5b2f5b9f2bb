"""What a contender is asked to read: plain values that travel to its process as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

Box = tuple[float, float, float, float]
"""xmin, ymin, xmax, ymax in the job's CRS, metres."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all jobs have; standard library only, for any Python can run it."""

    name: str
    store: str = ""
    """Zarr store to write; empty: the result stays in memory."""
    layout: str = ""
    """Zarr store whose shards and codec are to be copied."""
    pixels: str = ""
    """A ``.npy`` file to leave the pixels in, for comparisons that a digest cannot make."""
    threads: int = 2

    def write(self, path: Path) -> Path:
        """Write the job as JSON, without flags that are off: an older checkout may not know them."""
        off = {
            field.name for field in fields(self) if field.default is False and not getattr(self, field.name)
        }
        path.write_text(json.dumps({k: v for k, v in asdict(self).items() if k not in off}))
        return path

    def replace(self, **values: Any) -> Self:
        """Return the job with some fields changed."""
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """Some boxes of some dates and bands of one collection, as square chips."""

    items: str
    """JSON file: a list of STAC items, one a date, in time order."""
    table: str
    """Parquet file: the same items as a record table of rasteret_dask, headers included."""
    peers: str
    """Folder: the same items as rasteret's collection and as STAC GeoParquet; empty where there is none."""
    bands: tuple[str, ...]
    """In the order of the output; they are the items' asset keys, except in ``planar`` files."""
    dtype: str
    nodata: int
    epsg: int
    resolution: float
    """Of the output, metres."""
    origin: tuple[float, float]
    """A pixel corner (x, y) of the output's grid."""
    boxes: tuple[Box, ...]
    chip_px: int
    grid: str
    """``"tiles"``: the files' own tiles; ``"zone"``: our lattice; ``"box"``: a grid that the files do not share."""
    date_range: tuple[str, str]
    slot: str
    """A time slot's length as a pandas offset, one item each; empty: every date makes chips of its own."""
    resampling: str = "nearest"
    planar: bool = False
    """All bands lie in one band-separate file: the asset ``data``."""
    units: str = "raw"
    """``"raw"``, or ``"reflectance"``: x 1e4, stored as uint16."""

    @property
    def slack(self) -> float:
        """How far pixels of two contenders may lie apart."""
        return 0 if self.resampling == "nearest" else 1

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        for key in ("bands", "origin", "date_range"):
            values[key] = tuple(values[key])
        return cls(**{**values, "boxes": tuple(tuple(box) for box in values["boxes"])})

    def load_items(self) -> list[dict[str, Any]]:
        """Return the STAC items."""
        return list(json.loads(Path(self.items).read_text()))

    def chips(self) -> Iterator[Box]:
        """Yield the chips' bounds in the order of every digest: box by box, from the north-west, row by row."""
        side = self.chip_px * self.resolution
        for west, south, east, north in self.boxes:
            for row in range(round((north - south) / side)):
                for col in range(round((east - west) / side)):
                    x, y = west + col * side, north - row * side
                    yield x, y - side, x + side, y

    @property
    def count(self) -> int:
        """Chips of one time axis."""
        return sum(1 for _ in self.chips())


@dataclass(frozen=True, kw_only=True)
class ReadmeJob(Work):
    """The job of the README: two sensors merged, masked, in monthly slots, joined with embeddings, split, to Zarr."""

    items: str
    """JSON file: {"s2": items, "l8": items, "aef": items}."""
    tables: str
    """Folder: the same as record tables of rasteret_dask, ``<name>.parquet``."""
    epsg: int
    area: Box
    """What chips must touch."""
    dtype: str
    """``"float32"``: reflectance, NaN where invalid; ``"uint16"``: x 1e4, 65535 where invalid."""
    fill: bool
    """Whether what is invalid in a slot's best acquisition comes from the next in rank."""
    fresh: bool = False
    """Whether the whole process is measured, imports and headers included, and not the exit alone."""
    wide: bool = False
    """Whether the ground lies several times side by side, so that there are shards for several processes."""
    bands: tuple[str, ...] = ("red", "green", "blue", "nir")
    dates: tuple[str, str] = ("2024-04-01", "2024-06-30")
    cloud_cover_lt: int = 30
    chip_px: int = 128
    resolution: int = 10
    cell_km: float = 5.12

    @classmethod
    def read(cls, path: Path) -> ReadmeJob:
        """Read what :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        values |= {key: tuple(v) for key, v in values.items() if isinstance(v, list)}
        return cls(**values)

    @property
    def slack(self) -> float:
        """How far resampled pixels of two contenders may lie apart: 1 DN of Landsat's, which a kernel rounds.

        On the wide ground we alone run: all pixels are in the digest, equal to the last bit.
        """
        if self.wide:
            return 0
        return 1 if self.dtype == "uint16" else 2.75e-5 + 1e-7

    def load_items(self) -> dict[str, list[dict[str, Any]]]:
        """Return the STAC items by collection."""
        return dict(json.loads(Path(self.items).read_text()))


@dataclass(frozen=True, kw_only=True)
class MapJob(Work):
    """A model over a whole area, in overlapping windows whose outputs are blended to one map."""

    items: str
    """JSON file: a list of one STAC item."""
    table: str
    """Parquet file: the same as a record table of rasteret_dask, headers included."""
    folder: str
    """Where the item's files lie on this machine, ``<band>.tif``, for packages that read no items."""
    bands: tuple[str, ...]
    epsg: int
    resolution: float
    box: Box
    """The area: windows from its north-west corner on end at its edges."""
    size_px: int
    stride_px: int
    blend: Literal["hann", "mean", "max", "centre"]
    """``"mean"``, ``"hann"``, or ``"centre"``: the window whose middle is nearest."""
    batch: int = 16
    slack: float = 2e-6
    """How far pixels of two contenders may lie apart: sums in another order, of float32 up to 1."""

    @classmethod
    def read(cls, path: Path) -> MapJob:
        """Read what :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**{**values, "bands": tuple(values["bands"]), "box": tuple(values["box"])})

    def load_items(self) -> list[dict[str, Any]]:
        """Return the STAC item, in a list."""
        return list(json.loads(Path(self.items).read_text()))

    @property
    def shape(self) -> tuple[int, int]:
        """The map's pixels: y, x."""
        west, south, east, north = self.box
        return round((north - south) / self.resolution), round((east - west) / self.resolution)


AnyJob = Job | ReadmeJob | MapJob


def read_job(path: Path) -> AnyJob:
    """Read a job of any kind."""
    values = json.loads(path.read_text())
    kind = ReadmeJob if "tables" in values else MapJob if "blend" in values else Job
    return kind.read(path)
