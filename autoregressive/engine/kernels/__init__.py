"""Triton kernels of one decode step; each has a plain PyTorch reference in its test."""
