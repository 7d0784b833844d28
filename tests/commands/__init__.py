"""Every command, started for real as a user would start it, on tiny data."""
