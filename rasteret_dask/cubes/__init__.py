"""Records as lazy xarray cubes, built by stackstac."""
