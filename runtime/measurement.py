"""What has been measured of a bundle so far; valid at any time, so that Ctrl-C loses nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cq_edge.latency import GRAPHS, NEEDED_GRAPHS, DeviceProfile
from runtime.measure import TimedRun, counted, counted_ms, figures
from runtime.noise import Noise
from runtime.operator_time import OperatorTime
from runtime.sustain import drift


@dataclass(frozen=True, slots=True)
class BlockTime:
    """A part of the full graph, exported and timed alone.

    Attributes:
        name: Of the part.
        p50_ms: Median of its runs.
        multiply_adds: Of one run.
    """

    name: str
    p50_ms: float
    multiply_adds: int


@dataclass(slots=True)
class Measurement:
    """Grows while a device is measured.

    Attributes:
        engine: The backend, e.g. "xnnpack".
        graphs_sha256: Digest of the graphs.
        conditions: Where and how.
        runs: Of the graphs, as they were done.
        step_ms: What a step takes beside its graphs.
        noise: What else went on during the runs; None until they are done.
        load_ms: By graph: "cold" and "warm", as far as they were measured.
        peak_memory_mib: By graph.
        sustained: Runs of the full graph without a pause: when, in s, and what it took, in ms.
        operators: What single operators take, where the engine tells.
        blocks: The parts of the full graph, in the order they run, if they were asked for.
        interrupted: Whether it ended before its time.
    """

    engine: str
    graphs_sha256: str
    conditions: dict[str, str | int | float]
    runs: list[TimedRun] = field(default_factory=list)
    step_ms: float = 0.0
    noise: Noise | None = None
    load_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory_mib: dict[str, float] = field(default_factory=dict)
    sustained: list[tuple[float, float]] = field(default_factory=list)
    operators: list[OperatorTime] = field(default_factory=list)
    blocks: list[BlockTime] = field(default_factory=list)
    interrupted: bool = False

    @property
    def is_profile(self) -> bool:
        """Whether every graph has run, so that there is a profile; `encode` runs first."""
        return {run.graph for run in self.runs} >= set(NEEDED_GRAPHS)

    @property
    def rounds(self) -> int:
        """How many rounds were done, those that warm up apart."""
        return max((run.round_index for run in self.runs), default=0)

    @property
    def longest_s(self) -> float:
        """The seconds that the graph which ran longest has run, warm-ups included."""
        spent_ms = dict.fromkeys(GRAPHS, 0.0)
        for run in self.runs:
            spent_ms[run.graph] += run.taken_ms
        return max(spent_ms.values()) / 1e3

    def add(self, runs: Sequence[TimedRun], process: int, done: int) -> None:
        """Takes in a round of a process.

        Args:
            runs: Of the round.
            process: Which it is.
            done: Rounds of the processes before it.
        """
        for run in runs:
            index = 0 if run.warms_up else done + run.round_index
            self.runs.append(replace(run, round_index=index, process=process))

    def profile(self) -> DeviceProfile:
        """Returns the device profile of what was measured.

        Raises:
            UsageError: A graph has not run yet.
        """
        rows = {graph: figures(runs) for graph, runs in counted(self.runs).items()}
        rows = {
            graph: replace(
                row,
                load_ms={k: round(ms, 4) for k, ms in self.load_ms.get(graph, {}).items()},
                # a graph too small to move the process's peak has none
                peak_memory_mib=round(self.peak_memory_mib.get(graph, 0.0), 3) or None,
            )
            for graph, row in rows.items()
        }
        medians = {graph: row.p50_ms for graph, row in rows.items()}
        given = (medians, round(self.step_ms, 5), self._conditions(), rows)
        return DeviceProfile(self.engine, self.graphs_sha256, *given)

    def noise_of_runs(self) -> Noise:
        """Returns the noise that the runs themselves tell, for devices that tell nothing else:
        the full graph's runs are the work that is always the same."""
        p50, p90 = np.percentile(counted_ms(self.runs)["denoise"], (50, 90))
        return Noise(None, None, float(p90 / p50))

    def _conditions(self) -> dict[str, Any]:
        found = {**self.conditions, "complete": "no: interrupted" if self.interrupted else "yes"}
        if self.noise is not None:
            found.update(self.noise.as_conditions())
        if self.sustained:
            found["sustained_s"] = round(self.sustained[-1][0], 1)
        ratio = drift(self.sustained)
        if ratio is not None:
            found["sustained_drift"] = round(ratio, 4)
        return found
