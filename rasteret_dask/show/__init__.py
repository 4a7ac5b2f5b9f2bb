# SPDX-License-Identifier: Apache-2.0
"""What will be done and what was chosen, for people to look at."""
