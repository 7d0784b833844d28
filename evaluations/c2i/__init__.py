"""Evaluation of pictures that were generated for classes, or reconstructed."""
