# SPDX-License-Identifier: Apache-2.0
"""Two sensors become one source, embeddings lie beside it; the cluster writes only the train chips."""

from __future__ import annotations

import os

import rasteret_dask as rd

BBOX = (11.0, 46.4, 11.6, 46.8)
DATES = ("2024-04-01", "2024-06-30")
STORE = "s3://BUCKET/train.zarr"


def main() -> None:
    """Plan, tell what it will take, write."""
    s2 = rd.build("earthsearch/sentinel-2-l2a", name="s2", bbox=BBOX, date_range=DATES)
    l8 = rd.build("earthsearch/landsat-c2-l2", name="l8", bbox=BBOX, date_range=DATES)
    aef = rd.build("aef/v1-annual", name="aef", bbox=BBOX, date_range=DATES)

    optical = (
        rd.merge(s2, l8)
        .subset(cloud_cover_lt=30)
        .harmonize(bands=["red", "green", "blue", "nir"], resolution=10, time="1MS", mask="clouds")
    )
    chips = (
        rd.join(optical=optical, embeddings=aef)
        .chips(size=256)
        .split(train=0.7, val=0.15, test=0.15, seed=42)
    )

    train = chips.select("train")
    print(train.explain(), flush=True)
    train.to_zarr(STORE, client=os.environ["DASK_SCHEDULER_ADDRESS"])


if __name__ == "__main__":
    main()
