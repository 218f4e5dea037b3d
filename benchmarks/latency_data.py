"""What was timed on machines, kept in the repository: fits and documents need no machine again.

`latency_data/operators.json` holds what every graph computes, which is alike everywhere;
`latency_data/<device>.json` what its turns took on one machine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Self

from benchmarks.latency_machine import Point
from benchmarks.latency_setting import Setting
from cq_edge.operators import Operators, load_operators, save_operators

DATA = Path(__file__).with_name("latency_data")
_OPERATORS = DATA / "operators.json"
_BACKEND = "xnnpack"


@dataclass(slots=True)
class Timings:
    """What was timed on one machine, one thread.

    Attributes:
        machine: Its name for people.
        date: Year-month-day.
        turns_ms: By setting's name, the median of each turn; one number where only their median
            was kept.
        loads_ms: By setting's name, what loading took.
        load_ms: Of loading a graph apart from its weights, where `loads_ms` were not kept.
        load_gb_per_s: Of weights, likewise.
        plans_ms: Of a picture by each plan of a bundle, by its modes.
        plans_of: Names of that bundle's graphs.
    """

    machine: str
    date: str
    turns_ms: dict[str, list[float]] = field(default_factory=dict)
    loads_ms: dict[str, float] = field(default_factory=dict)
    load_ms: float | None = None
    load_gb_per_s: float | None = None
    plans_ms: dict[str, float] = field(default_factory=dict)
    plans_of: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, device: str) -> Self:
        """Returns what was timed on a device, by the name of its file."""
        return cls(**json.loads((DATA / f"{device}.json").read_text(encoding="utf-8")))

    @classmethod
    def load_or_new(cls, device: str, machine: str) -> Self:
        """Returns the same, or that nothing was timed there yet."""
        return cls.load(device) if device in timed_devices() else cls(machine, "")

    def save(self, device: str) -> None:
        """Writes the file, a field a line and a graph a line."""
        lines = []
        for key, value in asdict(self).items():
            if isinstance(value, dict):
                rows = [f"  {json.dumps(k)}: {json.dumps(_rounded(v))}" for k, v in value.items()]
                lines.append(
                    f' "{key}": {{\n' + ",\n".join(rows) + "\n }" if rows else f' "{key}": {{}}'
                )
            else:
                lines.append(f' "{key}": {json.dumps(value)}')
        DATA.mkdir(exist_ok=True)
        text = "{\n " + ",\n ".join(lines) + "\n}\n"
        (DATA / f"{device}.json").write_text(text, encoding="utf-8")

    def points(self) -> list[Point]:
        """Returns every graph with its operators and the median of its turns."""
        known = known_operators()
        return [
            Point(Setting.from_name(name), known[name], *_summary(turns))
            for name, turns in self.turns_ms.items()
        ]


def timed_devices() -> list[str]:
    """Returns the names of the machines' files."""
    return sorted(path.stem for path in DATA.glob("*.json") if path != _OPERATORS)


def known_operators() -> Mapping[str, Operators]:
    """Returns what graphs compute, by setting's name."""
    return load_operators(_OPERATORS)[_BACKEND] if _OPERATORS.exists() else {}


def keep_operators(found: Mapping[str, Operators]) -> None:
    """Adds graphs to those whose operators are kept."""
    save_operators(_OPERATORS, {_BACKEND: {**known_operators(), **found}})


def _summary(turns: Sequence[float]) -> tuple[float, float | None]:
    """Returns the median of a graph's turns and their interquartile range over it; None of a
    single turn."""
    if len(turns) < 2:
        return turns[0], None
    low, _, high = quantiles(turns, n=4)
    middle = median(turns)
    return middle, (high - low) / middle


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value
