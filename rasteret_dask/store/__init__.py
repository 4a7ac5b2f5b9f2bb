# SPDX-License-Identifier: Apache-2.0
"""Shards of chips as a Zarr store, written and read."""
