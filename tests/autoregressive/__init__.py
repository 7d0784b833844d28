"""Tests of the GPT: models, training and sampling."""
