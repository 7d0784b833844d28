"""Tests of training the GPT."""
