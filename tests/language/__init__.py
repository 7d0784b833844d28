"""Tests of language/."""
