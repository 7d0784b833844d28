"""The small programs around the project."""
