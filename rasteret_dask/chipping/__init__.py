"""Where the chips lie, which records feed them, and which split each belongs to."""
