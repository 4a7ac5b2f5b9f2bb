# SPDX-License-Identifier: Apache-2.0
"""Records: one Arrow row per scene, and the files that such tables come from and go to."""
