# SPDX-License-Identifier: Apache-2.0
"""Dask clusters by one word: started for a block of code, with workers as large as a plan's tasks need."""
