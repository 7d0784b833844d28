"""Dependent launches: a kernel starts while the one before it ends, and waits for it only where it needs its results.

Every kernel first waits and then lets the next one start, so whatever ran before its predecessor is complete from its
first instruction on: that may be read, or asked for in the L2 cache, before the wait.

They are used where LLAMAGEN_DEPENDENT_LAUNCH is 1 in the environment: on an H200 they made small products faster and
some large ones slower, each by itself; whole steps were not timed yet.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether they are asked for and the GPU has them (compute capability 9.0 and later)."""
    asked = os.environ.get("LLAMAGEN_DEPENDENT_LAUNCH") == "1"
    return asked and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_inputs():
    """Wait for the kernel before this one, then let the one after it start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the 128 bytes around each pointer in the L2 cache, and go on without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
