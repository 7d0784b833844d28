"""OpenAI's consistency decoder, to compare with."""
