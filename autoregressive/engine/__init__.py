"""Engines: faster ways to compute what `autoregressive.models.generate` asks a model for."""
