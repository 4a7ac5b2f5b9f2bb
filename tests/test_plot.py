from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from matplotlib import colors
from matplotlib import pyplot as plt
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.display.colours import INK, NO_SPLIT, SPLIT_COLOURS
from rasteret_dask.errors import MissingExtraError, PlanError
from rasteret_dask.show.maps import explore_chips
from rasteret_dask.show.plot import contact_sheet, plot_chips, plot_demo
from rasteret_dask.show.plotrecords import days_of, plot_records
from rasteret_dask.show.spectra import spectra_of


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
        "no split (1)": NO_SPLIT,
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
    assert [a.get_xlabel() for a in axes[0]] == ["s2, 9 Apr", "no scene", "s2, 9 Apr"]


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
    assert titles == ["Chips by split", "2 of 7 train chips, 0.32 km wide"]


def test_nothing_to_draw(tree: xr.DataTree) -> None:
    with pytest.raises(PlanError, match="no chips"):
        plot_chips(chip_table([]))
    with pytest.raises(PlanError, match="7 chips, 0 asked for"):
        contact_sheet(tree, 0)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r"the extra 'plot'.* pip install 'matplotlib>="):
        plot_chips(chip_table(["train"]))


# Chips of a plan and of a store; records


@pytest.fixture(scope="module")
def planned(small_world: World) -> rd.Chips:
    s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))
    fields = geopandas.GeoDataFrame(
        {"crop": ["maize"]}, geometry=[shapely.box(*(s2.describe().bounds or (0, 0, 0, 0)))], crs=4326
    )
    optical = s2.harmonize(["red", "green", "blue"], time="1MS", mask="clouds")
    chips = optical.chips(32, cell_km=0.64, labels=fields, rasterize="crop", min_coverage=0.5)
    return chips.split(0.5, 0.25, 0.25, seed=1)


def told(figure: Any) -> str:
    """Return all text of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def test_a_preview_reads_only_its_chips(planned: rd.Chips, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    load = rd.Chips.load

    def counted(self: rd.Chips, *args: Any) -> Any:
        read.append(len(self))
        return load(self, *args)

    monkeypatch.setattr(rd.Chips, "load", counted)
    figure = planned.preview(3)
    assert read == [3]
    figure.canvas.draw()
    text = told(figure)
    ids = planned.sample(3).table["chip_id"].to_pylist()
    assert all("_".join(chip.split("_")[-2:]) in text for chip in ids)
    assert "maize" in text
    assert "100% labelled" in text
    assert len(figure.axes) == 3 * 4  # three months, and the mask


def test_a_store_shows_what_its_plan_shows(planned: rd.Chips, tmp_path: Path) -> None:
    some = planned.sample(5, seed=4)
    some.to_zarr(tmp_path / "some.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "some.zarr")
    here, there = some.preview(2), stored.preview(2)
    for one, two in zip(here.axes, there.axes, strict=True):
        np.testing.assert_array_equal(one.images[0].get_array(), two.images[0].get_array())
        assert one.get_xlabel() == two.get_xlabel()
    assert legend(stored.plot()) == legend(some.plot())


def test_pictures_let_the_page_through(planned: rd.Chips) -> None:
    for figure in (planned.preview(1), planned.plot().figure):
        assert figure.patch.get_alpha() == 0
        for text in figure.findobj(mpl.text.Text):
            if text.get_text():
                assert colors.to_hex(text.get_color()) == INK


def test_a_preview_of_nothing(planned: rd.Chips) -> None:
    with pytest.raises(PlanError, match="0 chips asked for"):
        planned.preview(0)


def records(days: list[str], west: list[float], clouds: list[float | None]) -> pa.Table:
    """Return records of 1 x 1 degree."""
    return pa.table(
        {
            "id": [f"r{i}" for i in range(len(days))],
            "datetime": pa.array(np.array(days, "datetime64[us]"), pa.timestamp("us", "UTC")),
            "eo:cloud_cover": pa.array(clouds, pa.float64()),
            "geometry": pa.array([shapely.to_wkb(shapely.box(x, 0, x + 1, 1)) for x in west], pa.binary()),
        }
    )


def test_days_tell_what_is_covered_and_cloudy() -> None:
    table = records(
        ["2024-04-01T10:00", "2024-04-01T10:01", "2024-04-03T10:00", "2024-04-05T10:00"],
        [0, 1, 0, 0.5],
        [20, 40, 100, None],
    )
    days = days_of(table, shapely.box(0, 0, 2, 1))
    assert [str(day.date) for day in days] == ["2024-04-01", "2024-04-03", "2024-04-05"]
    assert [day.covered for day in days] == pytest.approx([1, 0.5, 0.5], rel=1e-6)
    assert [day.cloudy for day in days[:2]] == pytest.approx([0.3, 0.5], rel=1e-6)
    assert np.isnan(days[2].cloudy)
    assert [day.records for day in days] == [2, 1, 1]


def test_a_calendar_has_a_bar_a_day_and_a_row_a_member(s2: rd.Collection, l8: rd.Collection) -> None:
    figure = rd.merge(s2, l8).plot()
    figure.canvas.draw()
    footprints, *calendars = figure.axes
    assert set(legend(footprints)) == {f"s2 ({len(s2)})", f"l8 ({len(l8)})"}
    for axes, one in zip(calendars, (s2, l8), strict=True):
        days = {stamp.date() for stamp in one.to_table(["datetime"])["datetime"].to_pylist()}
        clear, cloudy = axes.containers
        assert len(clear) == len(cloudy) == len(days)
        total = [a.get_height() + b.get_height() for a, b in zip(clear, cloudy, strict=True)]
        assert all(0 < height <= 1 + 1e-9 for height in total)


def test_records_without_an_outline_are_no_picture() -> None:
    with pytest.raises(PlanError, match="no record with an outline"):
        plot_records([("s2", records([], [], []))])


def test_spectra_before_and_after_harmonizing(s2: rd.Collection, l8: rd.Collection) -> None:
    """The values are those of sample_points; the members agree once they are in the same unit."""
    west, south, east, north = s2.describe().bounds or (0, 0, 0, 0)
    point = [(west + 0.6 * (east - west), south + 0.4 * (north - south))]
    merged = rd.merge(s2, l8).harmonize(["red", "nir"], mask="clouds", time="1MS", fill=True)
    found = {(one.member, one.harmonized): one for one in spectra_of(merged.query, point)}
    assert set(found) == {("s2", False), ("s2", True), ("l8", False), ("l8", True)}
    raw = l8.harmonize(["B4", "B5"], units="raw").sample_points(point)["value"].to_numpy()
    np.testing.assert_array_equal(found["l8", False].values.ravel(), raw)
    after = l8.harmonize(["red", "nir"], mask="clouds").sample_points(point)["value"].to_numpy()
    np.testing.assert_array_equal(found["l8", True].values.ravel(), after)
    middle = {key: np.nanmedian(one.values, axis=0) for key, one in found.items()}
    apart = [abs(middle["s2", after] / middle["l8", after] - 1).max() for after in (False, True)]
    assert apart[1] < 0.35 < apart[0]
    figure = merged.plot_spectra(point)
    figure.canvas.draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["as stored", "as harmonized"]
    assert {"s2", "l8", "point 0", "Wavelength (nm)"} <= set(told(figure).split("\n"))


def test_spectra_of_one_collection_as_it_is(s2: rd.Collection) -> None:
    west, south, east, north = s2.describe().bounds or (0, 0, 0, 0)
    figure = s2.plot_spectra([((west + east) / 2, (south + north) / 2)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["as stored"]
    with pytest.raises(PlanError, match="join of several sources"):
        rd.join(a=s2, b=s2).plot_spectra([(15, 50)])


def test_too_many_points_are_refused_before_any_is_read(
    s2: rd.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("rasteret_dask.show.spectra.sample_points")
    with pytest.raises(PlanError, match=r"7 points.*at most 6"):
        s2.plot_spectra([(15, 50)] * 7)


def test_maps_to_explore_hold_every_chip_and_record(planned: rd.Chips, s2: rd.Collection) -> None:
    chips = planned.explore(tiles=None).get_root().render()
    for chip in planned.table["chip_id"].to_pylist():
        assert f"<b>chip</b> {chip}<br>" in chips
    assert "train (" in chips
    records = s2.explore(tiles=None).get_root().render()
    for row in s2.to_table(["id", "eo:cloud_cover"]).to_pylist():
        assert row["id"] in records
        assert f"<b>clouds (%)</b> {row['eo:cloud_cover']:.4g}" in records


def test_names_on_a_map_run_no_script() -> None:
    table = chip_table(["</script><script>alert(1)</script>${alert(2)}`"])
    table = table.append_column("chip_id", pa.array(["<img src=x onerror=alert(3)>"]))
    table = table.append_column("datetime", pa.nulls(1, pa.timestamp("us")))
    text = explore_chips(table, None).get_root().render()
    assert "alert(1)</script>" not in text
    assert "${alert" not in text
    assert "<img src=x" not in text


def test_without_folium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, s2: rd.Collection) -> None:
    monkeypatch.setitem(sys.modules, "folium", None)
    with pytest.raises(MissingExtraError, match=r"the extra 'map'.* pip install 'folium>="):
        s2.explore()


def test_too_many_shapes_for_a_browser(monkeypatch: pytest.MonkeyPatch, planned: rd.Chips) -> None:
    monkeypatch.setattr("rasteret_dask.show.maps.MOST_SHAPES", 3)
    with pytest.raises(PlanError, match=r"at most 3.*sample\(1000\)"):
        planned.explore()
    assert planned.sample(3).explore(tiles=None)
