"""The VQGAN of taming-transformers, kept to read and compare its published checkpoints."""
