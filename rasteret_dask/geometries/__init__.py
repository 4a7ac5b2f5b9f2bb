# SPDX-License-Identifier: Apache-2.0
"""Pixels of the places that one names: geometries, points, lattice cells."""
