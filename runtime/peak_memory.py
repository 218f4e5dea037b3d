"""How much memory this process has needed."""

import resource
import sys
from pathlib import Path


def peak_memory_mib() -> float:
    """Returns the process's largest resident size so far.

    Linux tells it in KiB, and of this program alone; getrusage's figure (bytes on macOS, KiB
    elsewhere) starts from what the process that started this one had needed.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
