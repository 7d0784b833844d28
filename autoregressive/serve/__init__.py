"""Serving: many users' pictures from one set of models."""
