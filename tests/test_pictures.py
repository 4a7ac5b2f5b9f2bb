"""Chips as colours: classes, radar, labels, one band, many bands; and what stands beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.display.colours import NO_LABEL, class_colours
from rasteret_dask.errors import PlanError
from rasteret_dask.show.pictures import Sheet, evenly, sheet_of
from rasteret_dask.table.itemkinds import CLASSES
from rasteret_dask.table.records import NS_RANGE


def source(
    pixels: NDArray[Any], bands: dict[str, str], units: list[str] | None = None, slots: int | None = None
) -> xr.Dataset:
    """Return chips as ``load()`` gives them: band -> kind."""
    chips, times = pixels.shape[:2]
    coordinates: dict[str, Any] = {
        "band": list(bands),
        "band_kind": ("band", np.array(list(bands.values()), dtype=object)),
        "chip_id": ("chip", np.array([f"33_0.32km_32px_10m_{i}_7" for i in range(chips)], dtype=object)),
        "split": ("chip", np.full(chips, "train", dtype=object)),
        "member": (("chip", "time"), np.full((chips, times), "s1", dtype=object)),
        "datetime": (("chip", "time"), np.full((chips, times), np.datetime64("2024-04-09T10", "us"))),
    }
    if units:
        coordinates["units"] = ("band", np.array(units, dtype=object))
    if slots:
        coordinates["time"] = (
            "time",
            np.arange("2024-01", "2026-01", dtype="datetime64[M]")[:slots].astype("datetime64[ns]"),
        )
    return xr.Dataset({"pixels": (("chip", "time", "band", "y", "x"), pixels)}, coordinates)


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def only(sheet: Sheet) -> NDArray[np.float32]:
    """Return the only picture."""
    ((picture,),) = (row.pictures for row in sheet.rows)
    return picture.rgba


def test_classes_have_their_colours_and_names() -> None:
    codes = np.array([[10, 10, 20, 255]], dtype="uint8")[None, None, None]
    chips = source(codes, {"map": "class"})
    chips["valid"] = (("chip", "time", "y", "x"), codes[:, :, 0] != 255)
    chips.attrs[CLASSES] = {
        "map": [{"value": 10, "name": "tree"}, {"value": 20, "name": "<b>"}, {"value": 30, "name": "x"}]
    }
    sheet = sheet_of(chips, 1)
    colours = class_colours([10, 20, 30])
    assert sheet.columns[0].legend == (("tree", colours[10]), ("<b>", colours[20]))
    image = only(sheet)
    painted = np.array([rgb(colours[10]), rgb(colours[10]), rgb(colours[20]), [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(image[0, :, :3], painted, atol=1e-6)
    assert image[0, :, 3].tolist() == [1, 1, 1, 0]
    assert sheet.has_gaps


def test_measured_bands_and_codes_beside_them_have_columns_of_their_own() -> None:
    pixels = np.ones((2, 3, 4, 8, 8), dtype="float32")
    kinds = {"red": "reflectance", "green": "reflectance", "blue": "reflectance", "SCL": "class"}
    sheet = sheet_of(source(pixels, kinds, slots=3), 2)
    titles = [column.title for column in sheet.columns]
    assert titles == ["Jan 2024", "Feb 2024", "Mar 2024", "SCL\nJan 2024", "SCL\nFeb 2024", "SCL\nMar 2024"]
    assert all(len(row.pictures) == 6 for row in sheet.rows)


@pytest.mark.parametrize("kind", ["backscatter", "amplitude"])
def test_radar_is_stretched_in_decibels(kind: str) -> None:
    """Equal ratios of power are equal steps of grey, before the gamma that all pictures have."""
    power = np.logspace(-3, 0, 101, dtype="float32").reshape(1, 1, 1, 1, 101)
    sheet = sheet_of(source(power, {"vv": kind}), 1)
    grey = only(sheet)[0, :, 0].astype(np.float64) ** (1 / 0.75)
    assert sheet.columns[0].title == "vv (dB)"
    inside = grey[2:97]
    np.testing.assert_allclose(np.diff(inside), np.diff(inside).mean(), rtol=0.02)


def test_two_polarizations_are_red_green_and_their_ratio() -> None:
    rng = np.random.default_rng(0)
    sheet = sheet_of(
        source(
            rng.uniform(0.01, 1, (1, 1, 2, 16, 16)).astype("float32"),
            {"vv": "backscatter", "vh": "backscatter"},
        ),
        1,
    )
    assert sheet.columns[0].title == "vv, vh, ratio (dB)"
    assert np.ptp(only(sheet)[..., 2]) > 0.5


def test_decibels_stay_what_they_are_and_zero_power_is_no_fault() -> None:
    values = np.linspace(-30, 0, 50, dtype="float32").reshape(1, 1, 1, 1, 50)
    already = only(sheet_of(source(values, {"vv": "backscatter"}, ["decibel"]), 1))
    power = only(sheet_of(source(10 ** (values / 10), {"vv": "backscatter"}, ["scaled"]), 1))
    np.testing.assert_allclose(already, power, atol=1e-3)
    assert only(sheet_of(source(np.zeros((1, 1, 1, 4, 4), "float32"), {"vv": "backscatter"}), 1))[
        ..., 3
    ].all()


def test_one_measured_band_is_a_ramp_with_its_ends() -> None:
    heights = np.linspace(100, 900, 64, dtype="float32").reshape(1, 1, 1, 8, 8)
    sheet = sheet_of(source(heights, {"elevation": "continuous"}), 1)
    (low, _), (high, _) = sheet.columns[0].legend
    assert float(low) == pytest.approx(100, abs=5)
    assert float(high) == pytest.approx(900, abs=5)
    lightness = only(sheet)[..., :3].sum(-1).ravel()
    assert (np.diff(lightness) >= -1e-6).all(), "a ramp only gets lighter"


def test_labels_are_painted_and_what_none_covers_is_grey() -> None:
    chips = source(
        np.ones((1, 1, 3, 1, 4), "float32"), dict.fromkeys(("red", "green", "blue"), "reflectance")
    )
    chips["mask"] = (
        ("chip", "y", "x"),
        np.array([[[0, 1, 2, 2]]], "uint8"),
        {"classes": ["", "maize", "wheat"]},
    )
    chips = chips.assign_coords(owner=("chip", np.array(["Ann"], dtype=object)), yield_t=("chip", [4.25]))
    sheet = sheet_of(chips, 1)
    assert [column.title for column in sheet.columns] == ["", "mask"]
    colours = class_colours([1, 2])
    assert sheet.columns[1].legend == (("maize", colours[1]), ("wheat", colours[2]), ("no label", NO_LABEL))
    picture = sheet.rows[0].pictures[1]
    assert picture.caption == "75% labelled"
    np.testing.assert_allclose(picture.rgba[0, 0, :3], rgb(NO_LABEL), atol=1e-6)
    assert sheet.rows[0].labels == (("owner", "Ann"), ("yield_t", "4.25"))


def test_labels_that_begin_with_a_class_have_no_background() -> None:
    chips = source(np.ones((1, 1, 1, 1, 2), "float32"), {"nir": "reflectance"})
    chips["mask"] = (("chip", "y", "x"), np.array([[[0, 1]]], "uint8"), {"classes": ["water", "land"]})
    assert sheet_of(chips, 1).rows[0].pictures[1].caption == "100% labelled"


def test_some_slots_of_many_are_shown_evenly() -> None:
    pixels = np.ones((1, 24, 1, 2, 2), "float32")
    sheet = sheet_of(source(pixels, {"red": "reflectance"}, slots=24), 1, slots=3)
    assert [column.title for column in sheet.columns] == ["red\nJan 2024", "red\nJan 2025", "red\nDec 2025"]
    assert evenly(24, 3).tolist() == [0, 12, 23]
    assert evenly(2, 9).tolist() == [0, 1]


def test_a_layer_that_does_not_change_is_of_no_year() -> None:
    heights = source(np.ones((1, 1, 1, 2, 2), "float32"), {"height": "continuous"})
    heights = heights.assign_coords(time=[NS_RANGE[0].astype("datetime64[ns]")])
    assert [column.title for column in sheet_of(heights, 1).columns] == ["height\nstatic"]


def test_a_source_without_a_valid_pixel_has_pictures_all_the_same() -> None:
    for kinds in ({"a": "continuous"}, dict.fromkeys("abcd", "embedding"), {"vv": "backscatter"}):
        pixels = np.full((1, 1, len(kinds), 4, 4), np.nan, "float32")
        assert not only(sheet_of(source(pixels, kinds), 1))[..., 3].any()


def test_a_chip_that_is_one_acquisition_tells_its_date() -> None:
    sheet = sheet_of(source(np.ones((1, 1, 1, 2, 2), "float32"), {"red": "reflectance"}), 1)
    assert sheet.rows[0].pictures[0].caption == "s1, 9 Apr 2024"


def test_nothing_to_show() -> None:
    with pytest.raises(PlanError, match="1 chips, 0 asked for"):
        sheet_of(source(np.ones((1, 1, 1, 2, 2), "float32"), {"red": "reflectance"}), 0)
