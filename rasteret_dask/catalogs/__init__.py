# SPDX-License-Identifier: Apache-2.0
"""Datasets by name: what a catalog says of them, and how a request to their stores is let in."""
