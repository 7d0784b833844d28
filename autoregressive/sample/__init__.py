"""Floor 3: pictures from trained models."""
