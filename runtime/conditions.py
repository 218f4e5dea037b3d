"""The machine that is measured: what it is and, where the system tells, how it is."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = {"xnnpack": "executorch", "coreml": "coremltools"}
_THERMAL = Path("/sys/class/thermal")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

NOT_TOLD = "not told by the system"


def machine_conditions(backend: str, threads: int | None) -> dict[str, str | int | float]:
    """Returns what figures of this machine must say of it.

    Args:
        backend: Of the graphs: its library's version is told.
        threads: That were asked for; None: one per core.
    """
    return {
        "engine": f"{backend}, {library(backend)}",
        "threads": threads or cores(),
        "processor": processor(),
        "cores": cores(),
        "governor": _text(_GOVERNOR) or NOT_TOLD,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def thermal_conditions(when: str) -> Mapping[str, str | int | float]:
    """Returns the temperature of the hottest zone, °C, as a condition.

    Args:
        when: "before" or "after" the measurement.
    """
    zones = [_text(zone / "temp") for zone in sorted(_THERMAL.glob("thermal_zone*"))]
    degrees = [int(text) / 1e3 for text in zones if text and text.lstrip("-").isdecimal()]
    return {f"temperature_{when}": f"{max(degrees):.1f} °C" if degrees else NOT_TOLD}


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Returns the processor's model as the system names it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def library(backend: str) -> str:
    """Returns the library that runs a backend's graphs, with its version."""
    name = _LIBRARIES.get(backend, backend)
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} {NOT_TOLD}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
