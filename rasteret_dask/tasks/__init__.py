# SPDX-License-Identifier: Apache-2.0
"""A frozen job of chips becomes Dask tasks, one a shard, and those become pixels."""
