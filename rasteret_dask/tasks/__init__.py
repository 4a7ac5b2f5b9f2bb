"""A frozen job of chips becomes Dask tasks, one a shard, and those become pixels."""
