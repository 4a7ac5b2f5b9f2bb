"""Numbers that describe the pixels of chips, in one pass over shards."""
