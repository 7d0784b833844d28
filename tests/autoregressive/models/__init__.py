"""Tests of the GPT models."""
