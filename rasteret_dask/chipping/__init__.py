# SPDX-License-Identifier: Apache-2.0
"""Where the chips lie, which records feed them, and which split each belongs to."""
