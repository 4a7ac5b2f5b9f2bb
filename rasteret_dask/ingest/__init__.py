"""STAC items, from an API, a catalog or a table, become records."""
