"""Floor 4: small programs around the project: planning and reporting the quick start."""
