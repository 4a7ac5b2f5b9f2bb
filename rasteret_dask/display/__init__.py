# SPDX-License-Identifier: Apache-2.0
"""How values look at a prompt, in a notebook and on a page."""
