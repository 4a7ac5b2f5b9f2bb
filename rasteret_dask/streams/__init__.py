"""Batches for a training loop, in an order that can be resumed."""
