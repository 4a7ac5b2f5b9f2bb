"""Real scenes, from items to chips; rasterio, stock stackstac and NumPy are the oracles."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely
import stackstac
import xarray as xr
from numpy.typing import NDArray
from rasterio.windows import Window, from_bounds

import rasteret_dask as rd

S2_FOLDER = "s2_l2a_earthsearch_33TWM"
CLEAR, EDGE, CLOUDY = "S2B_33TWM_20230813_0_L2A", "S2A_33TWM_20230815_0_L2A", "S2A_33TWM_20230818_0_L2A"
CODES = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08"}
CLOUDS = (3, 8, 9, 10)
VEGETATION = 4
ASSET = pa.struct(
    [
        ("href", pa.string()),
        ("band_index", pa.int32()),
        ("scale", pa.float64()),
        ("offset", pa.float64()),
        ("nodata", pa.float64()),
    ]
)


def table_of(records: dict[str, tuple[str, dict[str, dict[str, Any]]]], **columns: list[str]) -> pa.Table:
    """Return a table of {id: (datetime, {band: asset})}, as a user without STAC items would have it."""
    whens = [dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC) for when, _ in records.values()]
    assets = [list(bands.items()) for _, bands in records.values()]
    return pa.table(
        {
            "id": list(records),
            "datetime": pa.array(whens, pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(len(records), pa.binary()),
            "assets": pa.array(assets, pa.map_(pa.string(), ASSET)),
            **columns,
        }
    )


def window(path: Path, bounds: Any, band: int = 1) -> NDArray[Any]:
    """Return what rasterio reads inside bounds, 0 beyond the file; north-up."""
    with rasterio.open(path) as file:
        west, south, east, north = bounds
        if file.transform.e < 0:
            found = from_bounds(west, south, east, north, transform=file.transform)
        else:
            size = file.transform.e
            found = Window(
                (west - file.transform.c) / size, (south - file.transform.f) / size,
                (east - west) / size, (north - south) / size,
            )  # fmt: skip
        whole = Window(*(round(v) for v in (found.col_off, found.row_off, found.width, found.height)))
        assert np.allclose(found.flatten(), whole.flatten(), atol=1e-6), "the window is not on pixel edges"
        pixels = file.read(band, window=whole, boundless=True, fill_value=0)
        return np.asarray(pixels if file.transform.e < 0 else pixels[::-1])


def scaled(dn: NDArray[Any], scale: float, offset: float, nodata: float = 0) -> NDArray[np.float32]:
    """Return float32(float64(DN) x scale + offset), NaN for nodata: the words of the design, in NumPy."""
    result = (dn.astype(np.float64) * scale + offset).astype(np.float32)
    result[dn == nodata] = np.nan
    return result


def record_of(chips: rd.Chips, chip: int) -> str:
    feeds = chips.table.column("feeds")[chip].as_py()
    assert len({f["record"] for f in feeds}) == 1
    return str(feeds[0]["record"])


def computed(chips: rd.Chips) -> xr.Dataset:
    dataset = chips.to_xarray()
    assert isinstance(dataset, xr.Dataset)
    return dataset.compute(scheduler="threads")


def same(a: Any, b: Any) -> bool:
    """Tell whether two float arrays hold the same bits (all NaN being alike)."""
    a, b = np.asarray(a), np.asarray(b)
    floats = a.dtype.kind == "f"
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=floats)


def check_chip_is_cube(source: rd.Collection, chips: rd.Chips, every: int, chosen: bool = False) -> None:
    """chip == cube(bounds=<its bounds>), and a wide cube's window where nothing had to be chosen."""
    dataset = computed(chips)
    wide = source.cube()
    size = float(wide.x[1] - wide.x[0])
    left, top = float(wide.x[0]) - size / 2, float(wide.y[0]) + size / 2
    for chip in range(0, dataset.sizes["chip"], every):
        pixels = dataset["pixels"][chip]
        box = dataset["bounds"].values[chip]
        cube = source.cube(bounds=tuple(box), crs=int(dataset["epsg"][chip]), min_coverage=1.0)
        col, row = round((box[0] - left) / size), round((top - box[3]) / size)
        part = wide[..., row : row + pixels.sizes["y"], col : col + pixels.sizes["x"]]
        if "time" not in dataset.coords:  # a chip is one acquisition
            when = dataset["datetime"].values[chip, :1]
            cube, part = cube.sel(time=when), part.sel(time=when)
        assert same(pixels, cube.values)
        filled = {f["slot"] for f in chips.table.column("feeds")[chip].as_py()}
        slots = sorted(filled) if "time" in dataset.coords else [0]
        assert slots
        if not chosen:
            assert same(pixels[slots], part[slots].values)


def check_chip_is_cube_at_its_bounds(source: rd.Collection, dataset: xr.Dataset) -> None:
    for chip in range(0, dataset.sizes["chip"], 7):
        box = tuple(dataset["bounds"].values[chip])
        cube = source.cube(bounds=box, crs=int(dataset["epsg"][chip]), min_coverage=1.0)
        assert same(dataset["pixels"][chip], cube.sel(time=dataset["datetime"].values[chip]))


def check_zarr_is_xarray(chips: rd.Chips, place: Path) -> None:
    chips.to_zarr(place, progress=False)
    lazy, stored = computed(chips), xr.open_zarr(place, mask_and_scale=False)
    assert lazy.sizes == stored.sizes
    for name in ("pixels", "valid_fraction", "bounds", "epsg"):
        assert same(lazy[name], stored[name]), name
    for name in ("chip_id", "split", "member", "band"):
        assert [str(v) for v in lazy[name].values.flat] == [str(v) for v in stored[name].values.flat], name


# --- 33TWM: the items say offset -0.1, the pixels have it applied -------------------------------------------


@pytest.fixture(scope="module")
def s2_folder(data: Path) -> Path:
    return data / S2_FOLDER


@pytest.fixture(scope="module")
def s2(s2_folder: Path) -> rd.Collection:
    items = sorted(str(p) for p in s2_folder.glob("*/*.json"))
    return rd.build_from_stac(items, name="s2", bands=[*CODES, "SCL"])


def test_s2_items_really_name_the_offset_that_pixels_have(s2: rd.Collection, s2_folder: Path) -> None:
    item = json.loads((s2_folder / CLEAR / f"{CLEAR}.json").read_text())
    assert item["properties"]["earthsearch:boa_offset_applied"] is True
    assert item["assets"]["red"]["raster:bands"][0]["offset"] == -0.1
    for assets in s2.to_table().column("assets").to_pylist():
        red = dict(assets)["B04"]
        assert (red["scale"], red["offset"]) == (1e-4, 0.0)
        assert "boa_offset_applied" in red["rule"]


def test_s2_vegetation_is_as_dark_in_red_as_vegetation_is(s2: rd.Collection, s2_folder: Path) -> None:
    chips = s2.where(id=CLEAR).harmonize(bands=["red"]).chips(size=64)
    reflectance, classes = [], []
    dataset = computed(chips)
    for chip in range(len(chips)):
        reflectance.append(dataset["pixels"].values[chip, 0, 0])
        classes.append(window(s2_folder / CLEAR / "SCL.tif", dataset["bounds"].values[chip]))
    red, scl = np.array(reflectance), np.array(classes)
    assert 0.02 <= np.nanmedian(red[scl == VEGETATION]) <= 0.06
    assert np.mean(red[np.isfinite(red)] < 0) < 0.01


def test_s2_chips_are_the_files_windows(s2: rd.Collection, s2_folder: Path) -> None:
    chips = s2.harmonize(bands=list(CODES)).chips(size=64)
    dataset = computed(chips)
    assert len(chips) > 100
    assert set(dataset["epsg"].values) == {32633}
    assert np.all((dataset["bounds"].values[:, 0] - 499980) % 120 == 0)  # native pixels: no half-pixel shift
    for chip in range(0, len(chips), 2):
        folder = s2_folder / record_of(chips, chip)
        for band, code in enumerate(CODES.values()):
            dn = window(folder / f"{code}.tif", dataset["bounds"].values[chip])
            assert same(dataset["pixels"].values[chip, 0, band], scaled(dn, 1e-4, 0.0))


def test_s2_clouds_are_masked_by_scl(s2: rd.Collection, s2_folder: Path) -> None:
    plain, masked = (
        s2.where(id=CLOUDY).harmonize(bands=["red"], mask=mask).chips(size=64) for mask in (None, "clouds")
    )
    before, after = computed(plain), computed(masked)
    assert before["chip_id"].values.tolist() == after["chip_id"].values.tolist()
    hidden = 0
    for chip in range(len(plain)):
        scl = window(s2_folder / CLOUDY / "SCL.tif", after["bounds"].values[chip])
        clouds = np.isin(scl, CLOUDS)
        hidden += int(clouds.sum())
        expected = before["pixels"].values[chip, 0, 0].copy()
        expected[clouds] = np.nan
        assert same(after["pixels"].values[chip, 0, 0], expected)
        share = np.float32(np.isfinite(expected).mean())
        assert after["valid_fraction"].values[chip, 0] == pytest.approx(share, abs=1e-6)
    assert hidden > 10_000


def test_s2_swath_edge_is_invalid_and_not_zero(s2: rd.Collection, s2_folder: Path) -> None:
    plan = s2.where(id=EDGE)
    chips = plan.harmonize(bands=["red", "nir"]).chips(size=64, min_coverage=0.1)
    dataset = computed(chips)
    partly = 0
    for chip in range(len(chips)):
        box = dataset["bounds"].values[chip]
        red = dataset["pixels"].values[chip, 0, 0]
        empty = window(s2_folder / EDGE / "B04.tif", box) == 0
        assert np.array_equal(np.isnan(red), empty)
        assert not np.any(red == 0)
        partly += bool(empty.any() and not empty.all())
    assert partly > 3
    stored = computed(plan.harmonize(bands=["red"], dtype="uint16").chips(size=64, min_coverage=0.1))
    assert np.all(stored["pixels"].values[:, :, 0][~stored["valid"].values] == 65535)
    assert not stored["valid"].values.all()


def test_s2_month_is_the_clearest_acquisition(s2: rd.Collection, s2_folder: Path) -> None:
    chips = s2.harmonize(bands=["red"], mask="clouds", time="1MS", pick="clearest").chips(size=64)
    dataset = computed(chips)
    assert dataset.sizes["time"] == 1
    days = {CLEAR: "2023-08-13", EDGE: "2023-08-15", CLOUDY: "2023-08-18"}
    for chip in range(0, len(chips), 5):
        box = dataset["bounds"].values[chip]
        feeds = chips.table.column("feeds")[chip].as_py()
        clear = {}
        for name in {f["record"] for f in feeds}:
            scl = window(s2_folder / name / "SCL.tif", box)
            clear[days[name]] = int((~np.isin(scl, (*CLOUDS, 0))).sum())
        picked = str(dataset["datetime"].values[chip, 0])[:10]
        assert clear[picked] == max(clear.values())


def test_s2_chip_is_cube(s2: rd.Collection) -> None:
    plain = s2.harmonize(bands=["red", "nir"])
    check_chip_is_cube(plain, plain.chips(size=64), every=23)
    daily = s2.harmonize(bands=["red", "nir"], mask="clouds", time="1D")
    check_chip_is_cube(daily, daily.chips(size=64), every=19)
    for pick in ("least_cloudy", "clearest", "median", "mean"):
        timed = s2.harmonize(bands=["red", "nir"], mask="clouds", time="5D", pick=pick)
        check_chip_is_cube(timed, timed.chips(size=64), every=67, chosen=True)


def test_s2_zarr_is_xarray(s2: rd.Collection, tmp_path: Path) -> None:
    plan = s2.harmonize(bands=["red", "nir"], mask="clouds", time="5D", dtype="uint16")
    check_zarr_is_xarray(plan.chips(size=64), tmp_path / "chips.zarr")


# --- Brumadinho: Landsat on its own 30 m grid, south of the equator ------------------------------------------


@pytest.fixture(scope="module")
def brumadinho(data: Path) -> rd.Collection:
    records = {}
    for folder in sorted((data / "landsat_c2l2_native_brumadinho").iterdir()):
        day = folder.name.split("_")[3]
        bands = {f"B{n}": {"href": str(folder / f"{folder.name}_SR_B{n}.TIF")} for n in range(2, 8)}
        records[folder.name] = (f"{day[:4]}-{day[4:6]}-{day[6:]}T13:00:00", bands)
    table = table_of(records, platform=["landsat-8"] * len(records))
    return rd.build_from_table(table, name="landsat", dataset="landsat-c2-l2")


def test_landsat_chips_keep_their_30_m_pixels(brumadinho: rd.Collection, data: Path) -> None:
    chips = brumadinho.harmonize(bands=["red", "nir", "swir22"]).chips(size=64, cell_km=1.92)
    dataset = computed(chips)
    assert len(chips) > 20
    assert set(dataset["epsg"].values) == {32623}
    assert np.all(dataset["bounds"].values[:, 3] < 0)  # negative northings of 326zz
    assert np.all(dataset["bounds"].values % 30 == 15)
    folders = data / "landsat_c2l2_native_brumadinho"
    for chip in range(len(chips)):
        name = record_of(chips, chip)
        for band, code in enumerate(("B4", "B5", "B7")):
            dn = window(folders / name / f"{name}_SR_{code}.TIF", dataset["bounds"].values[chip])
            assert same(dataset["pixels"].values[chip, 0, band], scaled(dn, 2.75e-5, -0.2))


def test_landsat_told_in_the_southern_zone_is_only_translated(
    brumadinho: rd.Collection, data: Path, tmp_path: Path
) -> None:
    """A 327zz file, as other providers have it, gives the same chips under the same ids."""
    records = {}
    for name in brumadinho.to_table().column("id").to_pylist():
        source = data / "landsat_c2l2_native_brumadinho" / name / f"{name}_SR_B4.TIF"
        with rasterio.open(source) as file:
            pixels, profile, t = file.read(), file.profile, file.transform
        profile |= {"crs": "EPSG:32723", "transform": rasterio.Affine(t.a, 0, t.c, 0, t.e, t.f + 1e7)}
        with rasterio.open(tmp_path / source.name, "w", **profile) as to:
            to.write(pixels)
        when = f"{name[17:21]}-{name[21:23]}-{name[23:25]}T13:00:00"
        records[name] = (when, {"B4": {"href": str(tmp_path / source.name)}})
    table = table_of(records, platform=["landsat-8"] * len(records))
    south = rd.build_from_table(table, name="landsat", dataset="landsat-c2-l2")
    assert south.to_table().column("proj:epsg").to_pylist() == [32723] * 2
    told, moved = (c.harmonize(bands=["red"]).chips(size=64, cell_km=1.92) for c in (brumadinho, south))
    a, b = computed(told), computed(moved)
    assert a["chip_id"].values.tolist() == b["chip_id"].values.tolist()
    assert same(a["bounds"], b["bounds"])
    assert set(b["epsg"].values) == {32623}
    assert same(a["pixels"], b["pixels"])
    check_chip_is_cube_at_its_bounds(south.harmonize(bands=["red"]), b)


def test_landsat_chip_is_cube_and_zarr(brumadinho: rd.Collection, tmp_path: Path) -> None:
    plain = brumadinho.harmonize(bands=["red", "nir"])
    chips = plain.chips(size=64, cell_km=1.92)
    check_chip_is_cube(plain, chips, every=7)
    check_zarr_is_xarray(chips, tmp_path / "chips.zarr")


# --- Mol: two sensors over one place -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mol(data: Path) -> tuple[rd.Collection, rd.Collection]:
    folder = data / "s2_l8_same_place_mol_belgium"

    def bands(sensor: str, codes: dict[str, str]) -> dict[str, dict[str, Any]]:
        # atmospherically corrected elsewhere: reflectance x 10,000 in both
        return {
            code: {"href": str(folder / f"{sensor}_icor_SR_{file}.tif"), "scale": 1e-4, "offset": 0.0}
            for code, file in codes.items()
        }

    s2 = bands("S2_20190411", {"B02": "B02", "B03": "B03", "B04": "B04"})
    l8 = bands("L8_20200613", {"B2": "B02", "B3": "B03", "B4": "B04"})
    return (
        rd.build_from_table(
            table_of({"s2": ("2019-04-11T10:50:00", s2)}), name="s2", dataset="sentinel-2-l2a"
        ),
        rd.build_from_table(
            table_of({"l8": ("2020-06-13T10:30:00", l8)}), name="l8", dataset="landsat-c2-l2"
        ),
    )


def clear(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return reflectance with NaN for clouds, which both days have."""
    return np.where((image > 0) & (image < 0.2), image, np.nan).astype(np.float64)


def correlation(a: NDArray[np.float64], b: NDArray[np.float64], reach: int = 4) -> NDArray[np.float64]:
    """Return the correlation of ``a`` and ``b`` moved by up to ``reach`` pixels, shape (row shift, col shift)."""
    shifts = range(-reach, reach + 1)
    result = np.empty((len(shifts), len(shifts)))
    for r in shifts:
        for c in shifts:
            pair = np.stack([a, np.roll(b, (r, c), (0, 1))])[:, reach:-reach, reach:-reach]
            pair = pair[:, np.isfinite(pair).all(0)]
            result[r + reach, c + reach] = np.corrcoef(*pair)[0, 1]
    return result


def peak(surface: NDArray[np.float64]) -> tuple[int, int]:
    """Return the (row, col) shift at which a correlation surface peaks."""
    row, col = np.unravel_index(surface.argmax(), surface.shape)
    return int(row) - surface.shape[0] // 2, int(col) - surface.shape[1] // 2


def test_mol_sensors_lie_on_each_other(mol: tuple[rd.Collection, rd.Collection]) -> None:
    merged = rd.merge(*mol).harmonize(bands=["blue", "green", "red"], resolution=60, time="YS")
    middle = shapely.centroid(shapely.from_wkb(mol[0].to_table().column("geometry")[0].as_py()))
    dataset = computed(merged.chips(size=72, at=[middle]))
    assert dataset["member"].values.tolist() == [["s2", "l8"]]
    assert dataset["valid_fraction"].values.min() > 0.99
    cube = merged.cube(bounds=tuple(dataset["bounds"].values[0]), crs=32631, min_coverage=1.0)
    assert same(dataset["pixels"].values[0], cube.values)
    for first, second in np.swapaxes(dataset["pixels"].values[0], 0, 1):
        assert peak(correlation(clear(first), clear(second))) == (0, 0)


def test_mol_chips_add_no_shift_to_the_files(mol: tuple[rd.Collection, rd.Collection], data: Path) -> None:
    """At 10 m these two files themselves are 20 m apart (two thirds of a Landsat pixel): chips are just that."""
    merged = rd.merge(*mol).harmonize(bands=["blue", "red"], resolution=10, time="YS")
    chips = merged.chips(size=128, cell_km=1.28)
    dataset = computed(chips)
    folder = data / "s2_l8_same_place_mol_belgium"
    assert len(chips) >= 9
    assert dataset["member"].values.tolist() == [["s2", "l8"]] * len(chips)
    for chip in range(len(chips)):
        box = dataset["bounds"].values[chip]
        for band, code in enumerate(("B02", "B04")):
            for time, (sensor, nodata) in enumerate((("S2_20190411", 65535), ("L8_20200613", 0))):
                dn = window(folder / f"{sensor}_icor_SR_{code}.tif", box)
                assert same(dataset["pixels"].values[chip, time, band], scaled(dn, 1e-4, 0.0, nodata))
    check_chip_is_cube(merged, chips, every=4)


def test_mol_resampled_sensor_stays_in_place(
    mol: tuple[rd.Collection, rd.Collection], data: Path, tmp_path: Path
) -> None:
    """Sentinel-2 made a 30 m sensor of its own, on a grid 10 m off, comes back onto itself."""
    with rasterio.open(data / "s2_l8_same_place_mol_belgium" / "S2_20190411_icor_SR_B04.tif") as file:
        dn, transform, profile = file.read(1)[1:511, 1:511], file.transform, file.profile
    coarse = dn.reshape(170, 3, 170, 3).mean((1, 3)).round().astype("uint16")
    grid = rasterio.Affine(30, 0, transform.c + 10, 0, -30, transform.f - 10)
    place = tmp_path / "coarse.tif"
    profile.update(width=170, height=170, transform=grid, blockxsize=128, blockysize=128)
    with rasterio.open(place, "w", **profile) as to:
        to.write(coarse, 1)
    asset = {"B4": {"href": str(place), "scale": 1e-4, "offset": 0.0}}
    other = rd.build_from_table(
        table_of({"l8": ("2019-04-12T10:50:00", asset)}), name="l8", dataset="landsat-c2-l2"
    )
    joined = rd.join(fine=mol[0].harmonize(bands=["red"]), coarse=other.harmonize(bands=["red"]))
    tree = joined.chips(size=192, cell_km=1.92).to_xarray()
    assert isinstance(tree, xr.DataTree)
    fine, rough = (
        np.asarray(tree[n].to_dataset()["pixels"].compute(scheduler="threads")) for n in ("fine", "coarse")
    )
    assert (fine.shape[-1], rough.shape[-1]) == (192, 64)
    total = np.zeros((9, 9))
    for a, b in zip(fine[:, 0, 0], rough[:, 0, 0], strict=True):
        total += correlation(a.astype(np.float64), np.kron(b, np.ones((3, 3))))
    assert peak(total) == (0, 0)
    chips = joined.chips(size=192, cell_km=1.92).table
    for chip in range(0, len(rough), 3):  # the resampled source, too, is its own cube over the chip's bounds
        box = tuple(chips.column(n)[chip].as_py() for n in ("xmin", "ymin", "xmax", "ymax"))
        cube = other.harmonize(bands=["red"]).cube(bounds=box, crs=32631, min_coverage=1.0)
        assert same(rough[chip], cube.values)
    assert abs(total[4, 3] - total[4, 5]) < 0.02 * total.max()  # it leans to no side
    assert abs(total[3, 4] - total[5, 4]) < 0.02 * total.max()


# --- AlphaEarth embeddings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aef_file(data: Path) -> Path:
    return data / "aef_annual_2024_16N" / "aef_v1_annual_2024_wi_west.tif"


def embeddings(path: Path, bands: int = 64) -> rd.Collection:
    assets = {f"A{i:02d}": {"href": str(path), "band_index": i} for i in range(bands)}
    table = table_of({"aef": ("2024-01-01", assets)})
    return rd.build_from_table(table, name="aef", dataset="aef-v1-annual")


def dequantized(dn: NDArray[Any]) -> NDArray[np.float64]:
    """Return sign(v) x (|v| / 127.5)^2 scaled to length 1; shape (band, y, x), NaN where any band is -128."""
    v = dn.astype(np.float64) / 127.5
    v = np.sign(v) * v * v
    v[:, (dn == -128).any(0)] = np.nan
    return np.asarray(v / np.sqrt((v * v).sum(0)))


def test_embeddings_have_unit_length(aef_file: Path) -> None:
    chips = embeddings(aef_file).harmonize(units="embedding").chips(size=16, cell_km=0.64)
    dataset = computed(chips)
    pixels = dataset["pixels"].values
    assert pixels.shape[1:] == (1, 64, 16, 16)
    length = np.sqrt(np.sum(pixels.astype(np.float64) ** 2, axis=2))
    known = np.isfinite(length)
    assert 0.9 < known.mean() < 1  # the crop has a corner without data
    assert np.abs(length[known] - 1).max() < 1e-6
    for chip in range(0, len(chips), 4):
        box = dataset["bounds"].values[chip]
        expected = dequantized(np.stack([window(aef_file, box, band) for band in range(1, 65)]))
        np.testing.assert_allclose(pixels[chip, 0], expected, rtol=2e-6, atol=1e-9)


def test_south_up_equals_north_up(aef_file: Path, tmp_path: Path) -> None:
    with rasterio.open(aef_file) as file:
        pixels, profile, t = file.read(), file.profile, file.transform
    turned = tmp_path / "south_up.tif"
    profile["transform"] = rasterio.Affine(t.a, 0, t.c, 0, -t.e, t.f + t.e * pixels.shape[1])
    with rasterio.open(turned, "w", **profile) as to:
        to.write(pixels[:, ::-1])
    for units in ("embedding", "raw"):
        north, south = (
            computed(embeddings(path).harmonize(units=units).chips(16, cell_km=0.64))
            for path in (aef_file, turned)
        )
        assert north["chip_id"].values.tolist() == south["chip_id"].values.tolist()
        assert same(north["pixels"], south["pixels"])
    assert same(embeddings(aef_file).cube(), embeddings(turned).cube())


def test_true_alphaearth_clip_is_read_south_up(data: Path) -> None:
    path = data / "aef_annual_2024_13N" / "aef_v1_annual_2024_13N_clip10x10_yup.tif"
    source = embeddings(path)
    dataset = computed(source.chips(size=8, cell_km=0.08))
    assert dataset.sizes["chip"] == 1
    box = dataset["bounds"].values[0]
    for band in range(64):
        assert same(dataset["pixels"].values[0, 0, band], window(path, box, band + 1))
    length = np.linalg.norm(source.harmonize(units="embedding").cube().values.astype(np.float64), axis=1)
    assert np.abs(length - 1).max() < 1e-6


def test_embeddings_through_stock_stackstac(aef_file: Path) -> None:
    ours = embeddings(aef_file).cube()
    with rasterio.open(aef_file) as file:
        fields = {
            "proj:epsg": file.crs.to_epsg(),
            "proj:transform": list(file.transform[:6]),
            "proj:shape": list(file.shape),
        }
        bounds = tuple(file.bounds)
    assets = {
        f"A{i:02d}": {"href": f"vrt://{aef_file}?bands={i + 1}", "type": "image/tiff"} for i in range(64)
    }
    item = {"id": "aef", "properties": {"datetime": "2024-01-01T00:00:00Z", **fields}, "assets": assets}
    stock = stackstac.stack(
        [item], assets=list(assets), resolution=10, bounds=bounds, snap_bounds=False, rescale=False,
        dtype="int8", fill_value=np.int8(-128), xy_coords="center",
    )  # fmt: skip
    assert same(ours, stock.compute(scheduler="threads"))
    assert np.array_equal(ours.x, stock.x)
    assert np.array_equal(ours.y, stock.y)
    assert ours.rio.crs.to_epsg() == int(stock.epsg)


def test_embeddings_chip_is_cube_and_zarr(aef_file: Path, tmp_path: Path) -> None:
    source = embeddings(aef_file, bands=4).harmonize(units="embedding")
    chips = source.chips(size=16, cell_km=0.64)
    check_chip_is_cube(source, chips, every=5)
    check_zarr_is_xarray(chips, tmp_path / "chips.zarr")


# --- the openEO series of Belgium ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series(data: Path) -> rd.Collection:
    records = {}
    for folder in sorted((data / "s2_l2a_native10m_series_belgium").glob("2023-*")):
        bands = {band: {"href": str(folder / f"{band}.tif")} for band in ("B04", "B08", "B11", "SCL")}
        records[f"s2-{folder.name}"] = (f"{folder.name}T10:50:00", bands)
    baseline = ["02.14"] * len(records)  # the back-end has taken the offset off
    table = table_of(records, **{"s2:processing_baseline": baseline})
    return rd.build_from_table(table, name="series", dataset="sentinel-2-l2a")


def test_series_cube_is_the_netcdf_it_came_from(series: rd.Collection, data: Path) -> None:
    cube = series.cube(bands=["B04", "B08", "B11", "SCL"])
    place = data / "s2_l2a_native10m_series_belgium" / "cdse_sentinel2_l2a.nc"
    with xr.open_dataset(place, engine="h5netcdf") as original:
        assert cube.sizes["time"] == original.sizes["t"] == 12
        assert np.array_equal(
            cube.time.values.astype("datetime64[D]"), original.t.values.astype("datetime64[D]")
        )
        assert np.array_equal(cube.x, original.x)
        assert np.array_equal(cube.y, original.y)
        for band in cube.band.values:
            assert np.array_equal(cube.sel(band=band), original[f"S2-L2A-{band}"]), band


def test_series_chips_compose_as_numpy_does(series: rd.Collection, data: Path, tmp_path: Path) -> None:
    plan = series.harmonize(bands=["red", "nir"], mask="clouds", time="1MS", pick="median")
    chips = plan.chips(size=16, cell_km=0.32)
    dataset = computed(chips)
    folder = data / "s2_l2a_native10m_series_belgium"
    for chip in range(len(chips)):
        box = dataset["bounds"].values[chip]
        stack = []
        for day in sorted(folder.glob("2023-*")):
            scl = window(day / "SCL.tif", box)
            red = scaled(window(day / "B04.tif", box), 1e-4, 0.0)
            red[np.isin(scl, CLOUDS)] = np.nan
            stack.append(red)
        everywhere = np.isfinite(stack).any(0)
        expected = np.nanmedian(np.where(everywhere, stack, 0), 0).astype(np.float32)
        expected[~everywhere] = np.nan
        assert same(dataset["pixels"].values[chip, 0, 0], expected)
    check_chip_is_cube(plan, chips, every=5)
    check_zarr_is_xarray(chips, tmp_path / "chips.zarr")


# --- catalogs and tables of many items -----------------------------------------------------------------------


def test_static_catalogs_build(data: Path) -> None:
    with pytest.warns(UserWarning, match="of its links lead to files that are not there"):
        s2 = rd.build_from_stac(data / S2_FOLDER / "collection.json", name="s2", bands=[*CODES, "SCL"])
    openeo = rd.build_from_stac(data / "static_catalog_openeo" / "collection.json", name="openeo")
    assert (len(s2), len(openeo)) == (3, 3)
    whole = pa.concat_tables([s2.to_table(), openeo.to_table()])
    assert whole.num_rows == 6
    assert whole.schema == rd.RECORD_SCHEMA
    chips = openeo.chips(size=16, cell_km=0.32)
    dataset = computed(chips)
    bands = dataset["band"].values.tolist()
    for chip in range(len(chips)):
        day = str(dataset["datetime"].values[chip, 0])[:10]
        path = data / "static_catalog_openeo" / f"openEO_{day}Z.tif"
        for number, band in enumerate(("B04", "B03", "B02"), 1):
            own = dataset["pixels"].values[chip, 0, bands.index(band)]
            assert same(own, window(path, dataset["bounds"].values[chip], number))


@pytest.fixture(scope="module")
def colorado(data: Path) -> tuple[rd.Collection, rd.Collection]:
    s2, l8 = (
        rd.build_from_stac(data / "stac_items" / f"pc_{file}_100items.parquet", name=name, headers=False)
        for name, file in (("s2", "sentinel_2_l2a"), ("l8", "landsat_c2_l2"))
    )
    return s2, l8


AREA = (-105.9, 39.6, -105.3, 40.2)


def test_two_hundred_items_concatenate_plainly(colorado: tuple[rd.Collection, rd.Collection]) -> None:
    tables = [c.to_table() for c in colorado]
    assert [t.num_rows for t in tables] == [100, 100]
    whole = pa.concat_tables(tables)
    assert whole.schema == rd.RECORD_SCHEMA
    again = rd.as_collection(whole, name="both")
    assert len(again.where(collection="landsat-c2-l2")) == 100


def splits(chips: rd.Chips, *columns: str) -> dict[tuple[Any, ...], str]:
    """Return the split of each place; fails where one place has two."""
    found: dict[tuple[Any, ...], str] = {}
    for *place, split in zip(*(chips.table.column(c).to_pylist() for c in (*columns, "split")), strict=True):
        assert found.setdefault(tuple(place), split) == split
    return found


def test_same_ground_same_split_whatever_the_sensor(colorado: tuple[rd.Collection, rd.Collection]) -> None:
    s2, l8 = (c.harmonize(bands=["red"]) for c in colorado)
    fine = s2.chips(size=384, aoi=AREA).split(0.6, 0.2, 0.2, seed=7)
    rough = l8.chips(size=128, aoi=AREA).split(0.6, 0.2, 0.2, seed=7)
    with pytest.warns(UserWarning, match="split cells"):
        a = splits(fine, "epsg", "cell", "row", "col")
    b = splits(rough, "epsg", "cell", "row", "col")
    shared = a.keys() & b.keys()
    assert len(shared) > 100
    assert {a[k] for k in shared} == {"train", "val", "test"}
    assert all(a[k] == b[k] for k in shared)
    # the chips of another size, date and order of rows
    table = colorado[1].to_table()
    turned = rd.as_collection(table.take(list(range(table.num_rows))[::-1]), name="l8")
    other = turned.subset(cloud_cover_lt=50).harmonize(bands=["red"]).chips(size=64, aoi=AREA)
    c = splits(other.split(0.6, 0.2, 0.2, seed=7), "epsg", "cell")
    d = {(epsg, cell): split for (epsg, cell, *_), split in a.items()}
    assert len(c.keys() & d.keys()) > 10
    assert all(c[k] == d[k] for k in c.keys() & d.keys())


def test_same_ground_same_split_in_merge_and_join(colorado: tuple[rd.Collection, rd.Collection]) -> None:
    days = ("2024-01-01", "2024-05-31")

    def slots(source: rd.Collection) -> rd.Collection:
        return source.subset(date_range=days).harmonize(bands=["red"], time="3MS")

    alone = slots(colorado[0]).chips(size=384, aoi=AREA)
    joined = rd.join(s2=slots(colorado[0]), l8=slots(colorado[1])).chips(size=384, aoi=AREA)
    merged = slots(rd.merge(*colorado)).chips(size=384, aoi=AREA)
    with pytest.warns(UserWarning, match="split cells"):
        found = [splits(c.split(seed=3), "chip_id") for c in (alone, joined, merged)]
    for other in found[1:]:
        assert len(found[0].keys() & other.keys()) > 50
        assert all(found[0][k] == other[k] for k in found[0].keys() & other.keys())
