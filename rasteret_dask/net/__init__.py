# SPDX-License-Identifier: Apache-2.0
"""Bytes from wherever they lie: which hrefs are trusted, how they are fetched, and how much of it at a time."""
