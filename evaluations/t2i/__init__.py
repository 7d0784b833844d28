"""Evaluation of text-conditional pictures."""
