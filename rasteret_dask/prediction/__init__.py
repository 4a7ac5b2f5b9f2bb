# SPDX-License-Identifier: Apache-2.0
"""Models run over chips, and what they say becomes maps, vectors and tables."""
