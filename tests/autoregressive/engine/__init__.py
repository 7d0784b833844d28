"""Tests of autoregressive/engine."""
