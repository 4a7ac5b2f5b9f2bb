# SPDX-License-Identifier: Apache-2.0
"""What the header of a GeoTIFF says, read once and kept in its record."""
