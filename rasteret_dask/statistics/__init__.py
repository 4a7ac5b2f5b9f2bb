# SPDX-License-Identifier: Apache-2.0
"""Numbers that describe the pixels of chips, in one pass over shards."""
