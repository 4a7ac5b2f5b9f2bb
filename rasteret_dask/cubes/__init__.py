# SPDX-License-Identifier: Apache-2.0
"""Records as lazy xarray cubes, built by stackstac."""
