"""How much memory this process has needed."""

import resource
import sys


def peak_memory_mib() -> float:
    """Returns the process's largest resident size so far (Linux counts it in KiB, macOS in
    bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
