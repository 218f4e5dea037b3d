"""Whether a machine did other work while it was measured."""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.latency import QUIET

_MOST_OTHER_CORES = 0.15  # that others kept busy
_MOST_STOLEN = 0.02  # of the time, by the machines that share the processor with this one
_MOST_SPREAD = 1.4  # of a work that is always the same: its p90 over its median
_WORK_FLOATS = 60_000  # half a millisecond of sines


@dataclass(frozen=True, slots=True)
class Watched:
    """What a watch saw in the seconds that it looked, of which a verdict can be made together with
    those of other processes.

    Attributes:
        wall_s: How long it looked.
        other_s: Work of other processes, summed over the cores; None where the system does not
            tell.
        stolen_s: What the hypervisor gave to others, likewise.
        work_ms: What a work that is always the same took, time after time.
    """

    wall_s: float
    other_s: float | None
    stolen_s: float
    work_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Noise:
    """What else went on.

    Attributes:
        other_cores: How many cores other processes kept busy; None where the system does not
            tell.
        stolen_share: Of the time of all cores, what the hypervisor gave to others; likewise.
        work_spread: p90 over p50 of the time of a work that is always the same, done between
            the runs on as many threads as the graphs have.
    """

    other_cores: float | None
    stolen_share: float | None
    work_spread: float

    @property
    def verdict(self) -> str:
        """The word "quiet", or what makes the figures untrustworthy."""
        reasons = []
        if self.other_cores is not None and self.other_cores > _MOST_OTHER_CORES:
            reasons.append(f"other processes kept {self.other_cores:.2f} cores busy")
        if self.stolen_share is not None and self.stolen_share > _MOST_STOLEN:
            reasons.append(f"the hypervisor took {self.stolen_share:.0%} of the time")
        if self.work_spread > _MOST_SPREAD:
            reasons.append(f"the same work took up to {self.work_spread:.1f} times its median time")
        return f"noisy: {', '.join(reasons)}" if reasons else QUIET

    @classmethod
    def of(cls, watched: Sequence[Watched]) -> Self:
        """Returns what went on while one watch looked, or several one after the other."""
        wall_s = sum(w.wall_s for w in watched)
        work_ms = [ms for w in watched for ms in w.work_ms]
        others = [w.other_s for w in watched if w.other_s is not None]
        if not wall_s or len(others) < len(watched):
            return cls(None, None, _spread(work_ms))
        stolen = sum(w.stolen_s for w in watched) / wall_s / (os.cpu_count() or 1)
        return cls(sum(others) / wall_s, stolen, _spread(work_ms))

    def as_conditions(self) -> Mapping[str, str | int | float]:
        """Returns it as conditions of a device profile."""
        found: dict[str, str | int | float] = {"noise": self.verdict}
        if self.other_cores is not None:
            found["other_cores_busy"] = round(self.other_cores, 3)
        if self.stolen_share is not None:
            found["stolen_share"] = round(self.stolen_share, 4)
        return {**found, "work_spread": round(self.work_spread, 3)}


def speed_conditions(watched: Sequence[Watched]) -> Mapping[str, float]:
    """Returns how fast the processor was, as conditions of a device profile.

    Args:
        watched: Of each process.

    Returns:
        `work_ms`, the median time of the work that is always the same, and `work_drift`, how many
        times as long it took in the slowest process as in the fastest.
    """
    medians = [median(w.work_ms) for w in watched if w.work_ms]
    if not medians:
        return {}
    return {
        "work_ms": round(median(medians), 4),
        "work_drift": round(max(medians) / min(medians), 4),
    }


class NoiseWatch:
    """Watches the machine between two moments: from its making to `noise`.

    Args:
        threads: Of the graphs; the fixed work runs on as many.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._array = np.linspace(0, 1, _WORK_FLOATS)
        # new memory would be fetched from the system, which takes longer than the work
        self._results = [np.empty_like(self._array) for _ in range(threads)]
        for _ in range(3):  # starts the threads
            self._work_ms()
        self._taken_ms: list[float] = []
        self._start = _Clock.now()

    def tick(self) -> None:
        """Does the fixed work once; call it between runs."""
        self._taken_ms.append(self._work_ms())

    def noise(self) -> Noise:
        """Returns what went on since the watch was made."""
        return Noise.of([self.watched()])

    def watched(self) -> Watched:
        """Returns what it saw since it was made."""
        end, start = _Clock.now(), self._start
        other_s = None
        if start.busy_s is not None and end.busy_s is not None:
            own_s = end.own_s - start.own_s
            other_s = max(0.0, end.busy_s - start.busy_s - own_s)
        stolen_s = end.stolen_s - start.stolen_s
        return Watched(end.wall_s - start.wall_s, other_s, stolen_s, tuple(self._taken_ms))

    def _work_ms(self) -> float:
        return max(self._pool.map(self._timed_ms, self._results))

    def _timed_ms(self, result: NDArray[np.float64]) -> float:
        """Times itself: how long the system takes to wake its thread is no other's work."""
        start = time.perf_counter()
        np.sin(self._array, out=result)
        return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds since some moment: of all cores' work (None: not told), of this process's."""

    wall_s: float
    own_s: float
    busy_s: float | None
    stolen_s: float

    @classmethod
    def now(cls) -> Self:
        busy_s, stolen_s = _machine_s()
        return cls(time.perf_counter(), time.process_time(), busy_s, stolen_s)


def _machine_s() -> tuple[float | None, float]:
    """Returns the seconds that all cores worked, and that they were taken away.

    Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; the time of
    guests is within user's.
    """
    path = Path("/proc/stat")
    if not path.exists():
        return None, 0.0
    ticks = [int(word) for word in path.read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    rate = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / rate, steal / rate


def _spread(taken_ms: Sequence[float]) -> float:
    if not taken_ms:
        return 1.0
    p50, p90 = np.percentile(taken_ms, (50, 90))
    return float(p90 / p50)
