"""Tests in vLLM's own environment (scripts/setup_vllm.sh); tests/autoregressive/serve/test_vllm.py runs them."""
