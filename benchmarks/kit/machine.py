"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes."""


def machine() -> dict[str, Any]:
    """Processor, memory, system, and the versions of what ran. Linux only."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().split("\n") if line.startswith("model name")]
    return {
        "processor": processor[0].partition(":")[2].strip() if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": MEMORY,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("twinmerge", "torch", "safetensors", "transformers")},
    }


def libraries() -> dict[str, str]:
    """BLAS and LAPACK as torch was built with them."""
    text = torch.__config__.show()
    found = {key: match[1] for key in ("BLAS_INFO", "LAPACK_INFO") if (match := re.search(rf"{key}=(\w+)", text))}
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", text)
    return found | ({"MKL": mkl[1]} if mkl else {}) | {"CPU capability": torch.backends.cpu.get_cpu_capability()}


def torch_here() -> dict[str, Any]:
    """What stands beside scores: processor, threads and version of torch."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
