"""How busy the cores were that the benchmark does not run on."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class BusyCores:
    """Watches from its making to `others`."""

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), _others_s()

    def others(self) -> float:
        """Returns how many of the cores that this process may not use were busy, on average."""
        return (_others_s() - self._before) / (time.perf_counter() - self._start)


def _others_s() -> float:
    """Returns the seconds that the other cores have worked since the system started.

    Source: proc_stat(5); its fields are user, nice, system, idle, iowait, …
    """
    if not _STAT.exists():
        return 0.0
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)} | {"cpu"}
    ticks = 0
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name not in own:
            ticks += sum(int(field) for field in fields[:3])
    return ticks / os.sysconf("SC_CLK_TCK")
