# SPDX-License-Identifier: Apache-2.0
"""A job as one TOML file: read, checked, run, and written from a plan."""
