# SPDX-License-Identifier: Apache-2.0
"""The version, alone so that anything may import it."""

__version__ = "0.1.0"
