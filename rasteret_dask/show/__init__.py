"""What will be done and what was chosen, for people to look at."""
