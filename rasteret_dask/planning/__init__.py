# SPDX-License-Identifier: Apache-2.0
"""What was asked for, as frozen values, and the records that it chooses."""
