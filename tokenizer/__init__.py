"""Image tokenizers: images become grids of discrete codes, and codes become images again."""
