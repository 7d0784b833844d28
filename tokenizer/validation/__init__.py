"""The originals that reconstructions are measured against."""
