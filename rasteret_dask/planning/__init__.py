"""What was asked for, as frozen values, and the records that it chooses."""
