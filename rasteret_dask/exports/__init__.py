# SPDX-License-Identifier: Apache-2.0
"""Chips in the formats of others: GeoTIFF with STAC items, WebDataset, windows of rslearn."""
