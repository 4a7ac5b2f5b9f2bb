from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from matplotlib import colors
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from rasteret_dask.errors import MissingExtraError, PlanError
from rasteret_dask.show.plot import SPLIT_COLOURS, contact_sheet, plot_chips, plot_demo


@pytest.fixture(autouse=True)
def _no_screen() -> Iterator[None]:
    with mpl.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")


def chip_table(splits: list[str | None], epsg: list[int] | None = None) -> pa.Table:
    """Return chips of 1 km in a row from (500 km, 5,500 km), and 1 degree apart in lon/lat."""
    west = 500_000.0 + 1000 * np.arange(len(splits))
    lonlat = [shapely.to_wkb(shapely.box(15.0 + i, 60.0, 15.5 + i, 60.5)) for i in range(len(splits))]
    return pa.table(
        {
            "epsg": pa.array(epsg or [32633] * len(splits), pa.int32()),
            "xmin": west,
            "ymin": np.full(len(splits), 5_500_000.0),
            "xmax": west + 1000,
            "ymax": np.full(len(splits), 5_501_000.0),
            "split": pa.array(splits, pa.string()),
            "geometry": pa.array(lonlat, pa.binary()),
        }
    )


def source(
    bands: list[str], slots: list[str], pixels: NDArray[Any], valid: NDArray[Any] | None = None
) -> xr.Dataset:
    chips, times = pixels.shape[:2]
    coordinates: dict[str, Any] = {
        "band": bands,
        "time": ("time", np.array(slots, dtype="datetime64[ns]")),
        "split": ("chip", np.full(chips, "train", dtype=object)),
        "bounds": (("chip", "corner"), np.tile([0.0, 0.0, 320.0, 320.0], (chips, 1))),
        "member": (("chip", "time"), np.full((chips, times), "s2", dtype=object)),
        "datetime": (("chip", "time"), np.full((chips, times), np.datetime64("2024-04-09T10", "ns"))),
    }
    data: dict[str, Any] = {"pixels": (("chip", "time", "band", "y", "x"), pixels)}
    if valid is not None:
        data["valid"] = (("chip", "time", "y", "x"), valid)
    return xr.Dataset(data, coordinates)


@pytest.fixture
def tree() -> xr.DataTree:
    rng = np.random.default_rng(3)
    pixels = rng.uniform(0, 0.3, (7, 2, 4, 32, 32)).astype("float32")
    pixels[:, 0, :, :5] = np.nan
    optical = source(["nir", "blue", "green", "red"], ["2024-04-01", "2024-05-01"], pixels)
    optical["member"][:, 1] = ""
    codes = rng.integers(-127, 128, (7, 1, 8, 32, 32), dtype="int8")
    valid = np.ones((7, 1, 32, 32), dtype=bool)
    valid[..., :3] = False
    embeddings = source([f"A{i:02d}" for i in range(8)], ["2024-01-01"], codes, valid)
    return xr.DataTree.from_dict({"/embeddings": embeddings, "/optical": optical})


def legend(axes: Any) -> dict[str, str]:
    drawn = axes.get_legend()
    handles = drawn.get_patches()
    return {
        t.get_text(): colors.to_hex(h.get_facecolor())
        for t, h in zip(drawn.get_texts(), handles, strict=True)
    }


def test_every_chip_is_drawn_once_in_its_split_s_colour() -> None:
    axes = plot_chips(chip_table(["val", "train", "train", None, "test", "train"]))
    assert legend(axes) == {
        "train (3)": SPLIT_COLOURS["train"],
        "val (1)": SPLIT_COLOURS["val"],
        "test (1)": SPLIT_COLOURS["test"],
        "no split (1)": "#c9c9c9",
    }
    drawn = {
        colors.to_hex(c.get_facecolor()[0]): sorted(p.vertices[0, 0] for p in c.get_paths())
        for c in axes.collections
    }
    assert drawn[SPLIT_COLOURS["train"]] == [501.0, 502.0, 505.0]
    assert sum(map(len, drawn.values())) == 6


def test_one_zone_is_drawn_in_kilometres() -> None:
    axes = plot_chips(chip_table(["train"] * 4))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Easting, UTM zone 33N (km)", "Northing (km)")
    assert axes.dataLim.bounds == pytest.approx((500, 5500, 4, 1))
    assert axes.get_aspect() == 1


def test_several_zones_are_drawn_in_degrees() -> None:
    axes = plot_chips(chip_table(["train", "val"], [32633, 32634]))
    assert axes.get_xlabel() == "Longitude (degrees)"
    assert axes.dataLim.bounds == pytest.approx((15, 60, 1.5, 0.5))
    assert axes.get_aspect() == pytest.approx(2, abs=0.05)  # at 60 degrees north


def test_labels_of_one_s_own_and_no_split_at_all() -> None:
    assert set(legend(plot_chips(chip_table(["urban", "rural", "urban"])))) == {"rural (1)", "urban (2)"}
    assert list(legend(plot_chips(chip_table([None, None])))) == ["chips (2)"]


def test_draws_on_the_axes_given() -> None:
    axes = plt.subplots()[1]
    assert plot_chips(chip_table(["train"]), ax=axes) is axes


def test_a_row_a_chip_and_a_column_a_slot(tree: xr.DataTree) -> None:
    axes = np.array(contact_sheet(tree, 4).axes).reshape(4, 3)
    assert [a.get_title() for a in axes[0]] == ["optical\nApr 2024", "optical\nMay 2024", "embeddings\n2024"]
    assert not any(a.get_title() for a in axes[1:].ravel())
    assert [a.get_xlabel() for a in axes[0]] == ["s2, 9 Apr", "no scene", "s2"]


def test_invalid_pixels_are_hatched_and_not_black(tree: xr.DataTree) -> None:
    axes = np.array(contact_sheet(tree, 4).axes).reshape(4, 3)
    april, may, embeddings = (a.images[0].get_array() for a in axes[0])
    assert april.shape == (32, 32, 4)
    assert not april[:5, :, 3].any()
    assert april[5:, :, 3].all()
    assert may[..., 3].all()
    assert not embeddings[:, :3, 3].any()
    assert [[c.get_hatch() for c in a.collections] for a in axes[0]] == [["////"], [], ["////"]]
    assert all(a.collections[0].get_zorder() < a.images[0].get_zorder() for a in axes[0, [0, 2]])


def test_natural_colours_keep_their_order() -> None:
    pixels = np.zeros((1, 1, 3, 8, 8), dtype="float32")
    pixels[0, 0, :, :4] = np.array([0.30, 0.20, 0.10])[:, None, None]  # bands are blue, green, red
    sheet = contact_sheet(source(["blue", "green", "red"], ["2024-04-01"], pixels), 1)
    image = sheet.axes[0].images[0].get_array()
    red, green, blue = image[0, 0, :3]
    assert blue == 1
    assert 0 < red < green < blue
    assert not image[7, 7, :3].any()


def test_fewer_chips_than_asked_for(tree: xr.DataTree) -> None:
    assert len(contact_sheet(tree["optical"].to_dataset().isel(chip=[0, 1]), 9).axes) == 4


def test_a_source_without_a_single_valid_pixel(tree: xr.DataTree) -> None:
    empty = tree["optical"].to_dataset()
    empty["pixels"][:] = np.nan
    assert len(contact_sheet(empty, 2).axes) == 4


def test_both_in_one_figure(tree: xr.DataTree) -> None:
    figure = plot_demo(chip_table(["train", "val"]), tree, 2)
    figure.canvas.draw()
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles == ["Chips by split", "2 of 7 train chips, 0.32 km wide (hatched: cloud or no data)"]


def test_nothing_to_draw(tree: xr.DataTree) -> None:
    with pytest.raises(PlanError, match="no chips"):
        plot_chips(chip_table([]))
    with pytest.raises(PlanError, match="7 chips, 0 asked for"):
        contact_sheet(tree, 0)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r"the extra 'plot'.* pip install 'matplotlib>="):
        plot_chips(chip_table(["train"]))
