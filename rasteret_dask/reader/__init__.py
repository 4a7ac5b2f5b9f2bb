# SPDX-License-Identifier: Apache-2.0
"""Pixels of many windows of many files, in one batch: the engine of tasks and of cubes."""
