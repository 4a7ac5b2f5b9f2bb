# SPDX-License-Identifier: Apache-2.0
"""STAC items, from an API, a catalog or a table, become records."""
