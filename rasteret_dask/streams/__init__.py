# SPDX-License-Identifier: Apache-2.0
"""Batches for a training loop, in an order that can be resumed."""
