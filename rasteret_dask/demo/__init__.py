# SPDX-License-Identifier: Apache-2.0
"""A made-up world, the main job on it, and the checks of its result."""
