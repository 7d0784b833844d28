"""Tests of drawing pictures."""
