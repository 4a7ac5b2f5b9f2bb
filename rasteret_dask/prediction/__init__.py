# SPDX-License-Identifier: Apache-2.0
"""From a trained model to a map, or to a table of vectors."""
