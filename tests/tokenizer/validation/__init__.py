"""Tests of tokenizer/validation/."""
