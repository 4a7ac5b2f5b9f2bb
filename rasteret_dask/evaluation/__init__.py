# SPDX-License-Identifier: Apache-2.0
"""How well predictions agree with labels, by split, region and distance to the train ground."""
