"""Shards of chips as a Zarr store, written and read."""
