"""DeviceProfile: how long a bundle's graphs take on one device, and so how long a plan does."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import OutputExistsError, UsageError

QUIET = "quiet"
"""The condition "noise" of a profile whose machine did nothing else."""
GRAPHS = ("encode", "denoise", "denoise_shallow", "decode")
NEEDED_GRAPHS = GRAPHS[1:]
"""Those that every bundle has; nothing is encoded where pictures are not prompted."""
_LOADS = ("cold", "warm")
_QUANTILES = ("p10_ms", "p50_ms", "p90_ms", "p99_ms")
_RANGE = ("low_ms", "high_ms")


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """What was measured of one graph; None where it was not.

    Attributes:
        p50_ms: Median of a run; above 0, as every figure here.
        p10_ms: A tenth of the runs took this or less; p90_ms and p99_ms likewise.
        low_ms: With high_ms the spread that is stated: the medians of 95 of 100 processes lie
            between them, with 95 % confidence. None, both, where one process alone ran.
        load_ms: Of loading it in a fresh process: "cold" with its file read from the disk,
            "warm" with the file in the system's cache.
        peak_memory_mib: What the graph adds to a process that loads and runs it.
        runs: How many runs the quantiles are of, warm-up apart; 1 or more.
    """

    p50_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    load_ms: Mapping[str, float] = field(default_factory=dict)
    peak_memory_mib: float | None = None
    runs: int | None = None

    def check(self, name: str) -> None:
        """Refuses figures that cannot have been measured.

        Args:
            name: What messages call the row, e.g. "graphs.encode".

        Raises:
            UsageError: Names the field and what is allowed.
        """
        _check_number(f"{name}.p50_ms", self.p50_ms)
        for key in ("p10_ms", "p90_ms", "p99_ms", *_RANGE, "peak_memory_mib", "runs"):
            if getattr(self, key) is not None:
                _check_number(f"{name}.{key}", getattr(self, key))
        if not isinstance(self.load_ms, Mapping):
            raise UsageError(f"{name}.load_ms must be an object with {' and '.join(_LOADS)}")
        _check_known(f"{name}.load_ms.", self.load_ms, _LOADS)
        for key, taken in self.load_ms.items():
            _check_number(f"{name}.load_ms.{key}", taken)
        if self.runs is not None and self.runs != int(self.runs):
            raise UsageError(f"{name}.runs is {self.runs}: it must be a whole number above 0")
        for keys, rule in (
            (_QUANTILES, "quantiles must rise"),
            ((_RANGE[0], "p50_ms", _RANGE[1]), "the median must lie within"),
        ):
            known = [(k, getattr(self, k)) for k in keys if getattr(self, k) is not None]
            for (low, below), (high, above) in pairwise(known):
                if below > above:
                    raise UsageError(f"{name}.{low} is {below:g}, above {high} {above:g}: {rule}")

    def as_json(self) -> dict[str, Any]:
        """Returns the row of the JSON file: the fields that were measured."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row["load_ms"] = dict(self.load_ms)
        order = (*_QUANTILES, *_RANGE, "load_ms", "peak_memory_mib", "runs")
        return {key: row[key] for key in order if row[key] is not None and row[key] != {}}


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Median milliseconds of each graph on one device and engine.

    Attributes:
        engine: The backend that was measured, e.g. "xnnpack".
        graphs_sha256: Digest of the graphs that were measured.
        graphs_ms: Median of a run, by graph: encode, denoise, denoise_shallow, decode.
        step_ms: What a step takes beside its graphs: the noise scheduler's arithmetic.
        conditions: Where and how: machine, threads, runs, whether the machine was quiet.
        figures: All that was measured of a graph, by graph; may lack graphs.
    """

    engine: str
    graphs_sha256: str
    graphs_ms: Mapping[str, float]
    step_ms: float = 0.0
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    figures: Mapping[str, GraphFigures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a profile that lacks a graph, or holds a number that cannot be measured."""
        _check_known("graphs.", self.graphs_ms, GRAPHS)
        for graph in NEEDED_GRAPHS:
            if graph not in self.graphs_ms:
                raise UsageError(f"graphs.{graph} is missing: measure {', '.join(GRAPHS)}")
        for graph, taken_ms in self.graphs_ms.items():
            _check_number(f"graphs.{graph}.p50_ms", taken_ms)
        _check_number("step_ms", self.step_ms, zero=True)
        for graph, row in self.figures.items():
            row.check(f"graphs.{graph}")
        for key, value in self.conditions.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"conditions.{key} is {value}: it must be a finite number")
            if not isinstance(value, str | int | float):
                raise UsageError(f"conditions.{key} must be a text or a number")

    @property
    def noise(self) -> str | None:
        """Why its figures are not to be trusted, or None: other work ran on the device."""
        verdict = str(self.conditions.get("noise", QUIET))
        return None if verdict == QUIET else verdict

    def mode_ms(self, mode: Mode, branches: int) -> float:
        """Returns what a step of a mode takes.

        Args:
            mode: Of the step.
            branches: Runs of a graph per guided step: 2 with guidance, 1 without.
        """
        if mode is Mode.SKIP:
            return self.step_ms
        graph = "denoise" if mode.is_full else "denoise_shallow"
        runs = 1 if mode.is_unguided else mode.runs * branches
        return self.step_ms + runs * self.graphs_ms[graph]

    def loop_ms(self, schedule: CacheSchedule, branches: int) -> float:
        """Returns what the denoising loop takes.

        Args:
            schedule: The mode of each step.
            branches: Runs of a graph per guided step: 2 with guidance, 1 without.
        """
        return sum(self.mode_ms(mode, branches) for mode in schedule.modes)

    def picture_ms(self, schedule: CacheSchedule, branches: int) -> float:
        """Returns what a picture takes: prompts, denoising loop, decoding."""
        around = branches * self.graphs_ms.get("encode", 0.0) + self.graphs_ms["decode"]
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

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the JSON file."""
        rows = {g: GraphFigures(taken).as_json() for g, taken in self.graphs_ms.items()}
        rows.update({graph: row.as_json() for graph, row in self.figures.items()})
        return {
            "engine": self.engine,
            "graphs_sha256": self.graphs_sha256,
            "graphs": rows,
            "step_ms": self.step_ms,
            "conditions": dict(self.conditions),
        }

    def save(self, path: Path) -> None:
        """Writes the profile as JSON.

        Raises:
            OutputExistsError: The path is taken.
        """
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(self.as_json(), indent=2) + "\n")
        except FileExistsError:
            raise OutputExistsError(f"{path} exists: delete it, or write elsewhere") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the profile in a JSON file; of a graph's figures only `p50_ms` is needed.

        Raises:
            UsageError: The file cannot be read, lacks a field, has an unknown one, or holds a
                number that cannot be measured; the message names the field and what is allowed.
        """
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as a device profile: {error}") from error
        try:
            return cls._from_json(content)
        except UsageError as error:
            raise UsageError(f"{path} is no device profile: {error}") from error

    @classmethod
    def _from_json(cls, content: Any) -> Self:
        known = ("engine", "graphs_sha256", "graphs", "step_ms", "conditions")
        _check_known("", content, known)
        for key in known[:3]:
            if key not in content:
                raise UsageError(f"{key} is missing")
        for key in known[:2]:
            if not isinstance(content[key], str) or not content[key]:
                raise UsageError(f"{key} must be a text that is not empty")
        if not isinstance(content.get("conditions", {}), dict):
            raise UsageError("conditions must be an object")
        _check_known("graphs.", content["graphs"], GRAPHS)
        figures = {}
        for graph, row in content["graphs"].items():
            _check_known(f"graphs.{graph}.", row, tuple(f.name for f in fields(GraphFigures)))
            if "p50_ms" not in row:
                raise UsageError(f"graphs.{graph}.p50_ms is missing")
            nulls = [key for key, value in row.items() if value is None]
            if nulls:
                raise UsageError(f"graphs.{graph}.{nulls[0]} is null: leave it out, or measure it")
            figures[graph] = GraphFigures(**row)
        return cls(
            content["engine"],
            content["graphs_sha256"],
            {graph: row.p50_ms for graph, row in figures.items()},
            content.get("step_ms", 0.0),
            content.get("conditions", {}),
            {graph: row for graph, row in figures.items() if row != GraphFigures(row.p50_ms)},
        )


def _check_known(where: str, content: Any, known: tuple[str, ...]) -> None:
    """Refuses what is no object, or has a field that means nothing here."""
    if not isinstance(content, Mapping):
        raise UsageError(f"{where.rstrip('.') or 'the file'} must be an object")
    for key in content:
        if key not in known:
            raise UsageError(f"{where}{key} is unknown: allowed are {', '.join(known)}")


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuses what is no finite number above 0, or 0 where it is allowed."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # a whole number may be too large for a float
    if not number or not 0 <= value <= sys.float_info.max or (value == 0 and not zero):
        least = "of 0 or more" if zero else "above 0"
        raise UsageError(f"{name} is {value!r:.40}: it must be a finite number {least}")
