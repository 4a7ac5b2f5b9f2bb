"""Pixels of the places that one names: geometries, points, lattice cells."""
