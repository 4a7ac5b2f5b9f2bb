"""What chips are cut from has the grid and the assets that stackstac would give it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, table
from numpy.typing import NDArray
from stackstac.prepare import prepare_items

from rasteret_dask.cubes.cube import Read, group_cube, plain_items
from rasteret_dask.reader.cogreader import grid_of
from rasteret_dask.table.records import Records

BANDS = ("B04", "B08")
ZONES = (32633, 32632, 32733)


@st.composite
def rasters(draw: st.DrawFn) -> tuple[float, float, int, int]:
    """Draw (west, north, side, CRS) around a chip at (500 km, 5400 km); its southern twin counts from 10,000 km."""
    east, up = (draw(st.integers(-30, 30)) * 100.0 for _ in range(2))
    epsg = draw(st.sampled_from(ZONES))
    west = 500_000.0 + east + (440_000.0 if epsg == 32632 else 0.0)
    return west, 5_400_000.0 + up + (10_000_000.0 if epsg == 32733 else 0.0), draw(st.integers(1, 300)), epsg


def bounds_of(corners: list[tuple[int, int]]) -> NDArray[np.float64]:
    return np.array([(500_000.0 + x, 5_400_000.0 + y, 500_640.0 + x, 5_400_640.0 + y) for x, y in corners])


@settings(max_examples=60)
@given(
    st.lists(rasters(), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=3),
)
def test_grid_and_assets_are_those_of_stackstac(
    places: list[tuple[float, float, int, int]], cells: list[tuple[int, int]]
) -> None:
    records = Records(
        table(
            *(
                record(f"r{n}", west=west, north=north, px=(side, side), epsg=epsg, bands=BANDS)
                for n, (west, north, side, epsg) in enumerate(places)
            )
        )
    )
    bounds = bounds_of([(x * 640, y * 640) for x, y in cells])
    box = (*bounds[:, :2].min(0).tolist(), *bounds[:, 2:].max(0).tolist())
    rows = range(len(places))
    group = group_cube(records, rows, BANDS, 32633, np.arange(len(bounds)), bounds, 10.0)
    items = plain_items(records, {row: {band: Read(band) for band in BANDS} for row in rows}, 32633)
    urls, spec, _, kept = prepare_items(
        items, assets=list(BANDS), epsg=32633, resolution=10.0, bounds=box, snap_bounds=False, rescale=False
    )
    expected = {
        (int(kept[item]["id"]), href.asset.band) for (item, _), href in np.ndenumerate(urls["url"]) if href
    }
    assert set(group.assets) == expected
    assert group.grid == grid_of(spec)
    for (row, band), asset in group.assets.items():
        assert (asset.record_id, asset.band) == (f"r{row}", band)
