"""Measure the memory of this process.

On a CPU it is the resident memory (Linux), and on CUDA the memory of the allocator.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from bench.support.timing import synchronize

MB = 1e6
# With these variables, glibc returns freed memory to the system at once. Otherwise resident memory would include it.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def count_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in `tree`.

    Tensors on the meta device count too.
    """
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def resident_bytes(device: str) -> int:
    """Return the bytes in use now."""
    synchronize(device)
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def peak_bytes(device: str) -> int:
    """Return the largest number of bytes in use since `reset_peak`."""
    synchronize(device)
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def reset_peak(device: str) -> None:
    """Reset the peak to the bytes that are in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
