"""Tests of evaluations/t2i/."""
