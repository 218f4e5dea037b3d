"""DeviceProfile: how long a bundle's graphs take on one device, and so how long a plan does."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import OutputExistsError, UsageError

_GRAPHS = ("encode", "denoise", "denoise_shallow", "decode")


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Median milliseconds of each graph on one device and engine.

    Attributes:
        engine: The backend that was measured, e.g. "xnnpack".
        graphs_sha256: Digest of the file of graphs that was measured.
        graphs_ms: Median of a run, by graph: encode, denoise, denoise_shallow, decode.
        step_ms: What a step takes beside its graphs: the noise scheduler's arithmetic.
        conditions: Where and how: machine, threads, runs.
    """

    engine: str
    graphs_sha256: str
    graphs_ms: Mapping[str, float]
    step_ms: float = 0.0
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a profile that lacks a graph, or holds a time that is none."""
        for graph in _GRAPHS:
            taken = self.graphs_ms.get(graph)
            if taken is None:
                raise UsageError(f"a device profile has no time of graph {graph}: measure all four")
            if not (math.isfinite(taken) and taken > 0):
                raise UsageError(
                    f"a device profile's time of graph {graph} is {taken} ms: "
                    "it must be above 0 and finite"
                )
        if not (math.isfinite(self.step_ms) and self.step_ms >= 0):
            raise UsageError(
                f"a device profile's step_ms is {self.step_ms}: it must be 0 or more and finite"
            )

    def mode_ms(self, mode: Mode, branches: int) -> float:
        """Returns what a step of a mode takes.

        Args:
            mode: Of the step.
            branches: Runs of a graph per guided step: 2 with guidance, 1 without.
        """
        if mode is Mode.SKIP:
            return self.step_ms
        graph = "denoise" if mode.is_full else "denoise_shallow"
        return self.step_ms + (1 if mode.is_unguided else branches) * self.graphs_ms[graph]

    def loop_ms(self, schedule: CacheSchedule, branches: int) -> float:
        """Returns what the denoising loop takes.

        Args:
            schedule: The mode of each step.
            branches: Runs of a graph per guided step: 2 with guidance, 1 without.
        """
        return sum(self.mode_ms(mode, branches) for mode in schedule.modes)

    def picture_ms(self, schedule: CacheSchedule, branches: int) -> float:
        """Returns what a picture takes: prompts, denoising loop, decoding."""
        around = branches * self.graphs_ms["encode"] + self.graphs_ms["decode"]
        return around + self.loop_ms(schedule, branches)

    def require_graphs(self, engine: str, graphs_sha256: str) -> None:
        """Refuses a profile of another engine or of other graphs.

        Raises:
            UsageError: Names what was measured and what is there.
        """
        if self.engine != engine:
            raise UsageError(
                f"the device profile is of engine {self.engine!r}, but the bundle is for "
                f"{engine!r}: measure this bundle"
            )
        if self.graphs_sha256 != graphs_sha256:
            raise UsageError(
                f"the device profile is of graphs with sha256 {self.graphs_sha256}, but the "
                f"bundle's have {graphs_sha256}: measure this bundle"
            )

    def save(self, path: Path) -> None:
        """Writes the profile as JSON.

        Raises:
            OutputExistsError: The path is taken.
        """
        content = {
            "engine": self.engine,
            "graphs_sha256": self.graphs_sha256,
            "graphs": {graph: {"p50_ms": taken} for graph, taken in self.graphs_ms.items()},
            "step_ms": self.step_ms,
            "conditions": dict(self.conditions),
        }
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(content, indent=2) + "\n")
        except FileExistsError:
            raise OutputExistsError(f"{path} exists: delete it, or write elsewhere") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the profile in a JSON file; of a graph's figures only `p50_ms` is needed.

        Raises:
            UsageError: The file cannot be read or is no device profile.
        """
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as a device profile: {error}") from error
        try:
            return cls(
                engine=str(content["engine"]),
                graphs_sha256=str(content["graphs_sha256"]),
                graphs_ms={g: float(row["p50_ms"]) for g, row in content["graphs"].items()},
                step_ms=float(content.get("step_ms", 0.0)),
                conditions=dict(content.get("conditions", {})),
            )
        except KeyError as error:
            raise UsageError(f"{path} is no device profile: it lacks {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no device profile: {error}") from error
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
