"""Where there is no Triton (it comes with PyTorch for NVIDIA GPUs), there are no kernels to test."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
