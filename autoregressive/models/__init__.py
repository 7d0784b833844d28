"""The GPT itself: pure torch, tensors in, tensors out. Knows no files, arguments or process groups."""
