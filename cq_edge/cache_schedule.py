"""Which steps run the full graph, which reuse its cached feature, and the best such choice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import ScheduleError


class Mode(StrEnum):
    """What a step runs: the full graph, the shallow graph, or none.

    An unguided step runs its graph for the prompt alone; what the negative prompt would change
    is forecast from guided steps. A step that is full twice or four times runs its graph so often
    on latents that are moved apart a little, and takes the mean: quantised layers round otherwise
    each time.
    """

    FULL = "full"
    SHALLOW = "shallow"
    SKIP = "skip"
    FULL_UNGUIDED = "full unguided"
    SHALLOW_UNGUIDED = "shallow unguided"
    FULL_TWICE = "full twice"
    FULL_FOUR_TIMES = "full four times"

    @property
    def is_full(self) -> bool:
        """Whether the full graph runs, which makes the step an anchor."""
        return self in {Mode.FULL, Mode.FULL_UNGUIDED} or self.runs > 1

    @property
    def is_shallow(self) -> bool:
        """Whether the shallow graph runs."""
        return self in {Mode.SHALLOW, Mode.SHALLOW_UNGUIDED}

    @property
    def is_unguided(self) -> bool:
        """Whether a graph runs, but not for the negative prompt."""
        return self in {Mode.FULL_UNGUIDED, Mode.SHALLOW_UNGUIDED}

    @property
    def runs(self) -> int:
        """How often a branch's graph runs, if it does."""
        return _RUNS.get(self, 1)


_RUNS = {Mode.FULL_TWICE: 2, Mode.FULL_FOUR_TIMES: 4}
REPEATED = tuple(_RUNS)
"""Modes of steps that are full several times."""
_LETTERS = dict(zip("FSKfsDQ", Mode, strict=True))


@dataclass(frozen=True, slots=True)
class CacheSchedule:
    """The mode of each of the T steps; step 0 is full, and a shallow step that is guided reuses
    an anchor that is guided too."""

    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        """Refuses a schedule whose first step has nothing to reuse."""
        if not self.modes:
            raise ScheduleError("a cache schedule needs at least one step: this one has none")
        for step, mode in enumerate(self.modes):
            if not isinstance(mode, Mode):
                raise ScheduleError(f"step {step} has mode {mode!r}: it must be a Mode")
        if self.modes[0] is not Mode.FULL:
            why = (
                "only later steps may be"
                if self.modes[0].runs > 1
                else "nothing was computed before"
            )
            raise ScheduleError(f"step 0 is {self.modes[0]}, but {why}: make it full")
        for step, anchor in enumerate(self.anchors):
            if self.modes[step] is Mode.SHALLOW and self.modes[anchor].is_unguided:
                raise ScheduleError(
                    f"step {step} is shallow and guided, but its anchor, step {anchor}, ran "
                    f"without the negative prompt: make step {step} unguided or step {anchor} "
                    "guided"
                )

    def __len__(self) -> int:
        return len(self.modes)

    @property
    def anchors(self) -> tuple[int, ...]:
        """For each step the last full step at or before it: (T,) step indices."""
        anchors, anchor = [], 0
        for step, mode in enumerate(self.modes):
            anchor = step if mode.is_full else anchor
            anchors.append(anchor)
        return tuple(anchors)

    @property
    def counts(self) -> dict[str, int]:
        """How many steps are full, shallow and skip, guided or not."""
        return {
            "full": sum(mode.is_full for mode in self.modes),
            "shallow": sum(mode.is_shallow for mode in self.modes),
            "skip": self.modes.count(Mode.SKIP),
        }

    @property
    def unguided(self) -> int:
        """How many steps run a graph without the negative prompt."""
        return sum(mode.is_unguided for mode in self.modes)

    @property
    def repeated(self) -> int:
        """How many full steps run twice or four times."""
        return sum(mode.runs > 1 for mode in self.modes)

    @property
    def max_gap(self) -> int:
        """The largest distance of a shallow step to its anchor; 0 if there is none."""
        gaps = (step - anchor for step, anchor in enumerate(self.anchors))
        shallow = (mode.is_shallow for mode in self.modes)
        return max((gap for gap, used in zip(gaps, shallow, strict=True) if used), default=0)

    def segments(self) -> tuple[range, ...]:
        """Returns each anchor with the steps that follow it, in order."""
        starts = [step for step, mode in enumerate(self.modes) if mode.is_full]
        ends = [*starts[1:], len(self.modes)]
        return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))

    @classmethod
    def all_full(cls, step_count: int) -> Self:
        """Returns the schedule of the uncached loop of T steps."""
        return cls((Mode.FULL,) * step_count)

    @classmethod
    def uniform(cls, step_count: int, interval: int) -> Self:
        """Returns T steps of which every `interval`-th is full and the others shallow.

        Raises:
            ScheduleError: There is no step, or the interval is below 1.
        """
        if interval < 1:
            raise ScheduleError(f"interval is {interval}: it must be 1 (all full) or more")
        return cls._with_full(step_count, frozenset(range(0, step_count, interval)))

    @classmethod
    def from_string(cls, text: str) -> Self:
        """Returns the schedule of one letter a step: F full, S shallow, K skip; f and s unguided,
        D and Q full twice (double) and four times (quadruple).

        Raises:
            ScheduleError: Another letter stands there, the first is not F, or S reuses f.
        """
        for step, letter in enumerate(text):
            if letter not in _LETTERS:
                raise ScheduleError(
                    f'step {step} of "{text}" is "{letter}": '
                    "use F for full, S for shallow, K for skip, f and s for unguided ones, "
                    "D and Q for full twice and four times"
                )
        return cls(tuple(_LETTERS[letter] for letter in text))

    def to_string(self) -> str:
        """Returns one letter a step, as `from_string` reads it."""
        letters = {mode: letter for letter, mode in _LETTERS.items()}
        return "".join(letters[mode] for mode in self.modes)

    @classmethod
    def _with_full(cls, step_count: int, full: frozenset[int]) -> Self:
        return cls(tuple(Mode.FULL if s in full else Mode.SHALLOW for s in range(step_count)))


def plan_full_steps(
    errors: NDArray[np.float64],
    full_steps: int,
    *,
    min_segment: int = 1,
    max_segment: int | None = None,
) -> CacheSchedule:
    """Returns the schedule of least total error with a given number of full steps.

    Exact, by dynamic programming in O(K·T·G). Of equally good schedules the one whose anchors
    come first in lexicographic order is returned; equally good means equal as float64 sums.

    Args:
        errors: (T, G+1) float64: errors[i, g] is the reuse error of step i+g with anchor i;
            column 0 is 0, entries of steps beyond T-1 are unused.
        full_steps: K, 1 to T.
        min_segment: Fewest steps of a segment, its anchor included; 1 or more.
        max_segment: Most steps of a segment; None stands for G+1, and more than G+1 cannot be
            planned.

    Raises:
        ScheduleError: The table is malformed, or T steps do not split so; the message says which
            numbers of full steps and which segments would do.

    Source: dynamic programming schedule of CacheQuant, arXiv 2503.01323. We differ in that the
    segments' bounds are the caller's, and in that its code fails where T < 2N.
    """
    _check_errors(errors)
    step_count, columns = errors.shape
    longest = columns if max_segment is None else max_segment
    _check_segments(step_count, columns, full_steps, min_segment, longest)
    costs = _segment_costs(errors)
    # best[i] = least cost of covering steps i … T-1 with the segments counted so far
    best = np.full(step_count + 1, math.inf)
    best[step_count] = 0.0
    choices = []
    for _ in range(full_steps):
        best, lengths = _prepend_segment(best, costs, min_segment, longest)
        choices.append(lengths)
    anchors, step = [], 0
    for lengths in reversed(choices):
        anchors.append(step)
        step += int(lengths[step])
    return CacheSchedule._with_full(step_count, frozenset(anchors))


def paper_segment_bounds(step_count: int, full_steps: int) -> tuple[int, int]:
    """Returns the fewest and the most steps of a segment that the paper allows.

    That is ⌈N/2⌉ and 2N, where N = T / K rounded to the nearest whole number (halves up).

    Raises:
        ScheduleError: `full_steps` is not in 1 to `step_count`.

    Source: CacheQuant, arXiv 2503.01323. We differ from its code, which takes N as the argument
    and fails where T < 2N: here the bounds are always such that T steps split into K segments.
    """
    if not 1 <= full_steps <= step_count:
        raise ScheduleError(
            f"{step_count} steps cannot have {full_steps} full ones: ask for 1 to {step_count}"
        )
    interval = (2 * step_count + full_steps) // (2 * full_steps)
    return (interval + 1) // 2, 2 * interval


def _check_errors(errors: NDArray[np.float64]) -> None:
    if errors.ndim != 2 or 0 in errors.shape:
        raise ScheduleError(f"the error table has shape {errors.shape}: it must be (T, G+1)")
    anchor, gap = np.indices(errors.shape)
    usable = np.isfinite(errors) & (errors >= 0) & ((gap > 0) | (errors == 0))
    wrong = np.argwhere(~usable & (anchor + gap < len(errors)))
    if len(wrong):
        i, g = (int(index) for index in wrong[0])
        allowed = "it must be 0" if g == 0 else "it must be a number of 0 or more"
        raise ScheduleError(
            f"the reuse error of step {i + g} with anchor {i} is {errors[i, g]}: {allowed}"
        )


def _segment_costs(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns (T, G+1): the cost of the segment of length g+1 that starts at i; inf beyond T."""
    anchor, gap = np.indices(errors.shape)
    beyond = anchor + gap >= len(errors)
    costs = np.cumsum(np.where(beyond, 0.0, errors), axis=1)
    return np.where(beyond, math.inf, costs)


def _prepend_segment(
    best: NDArray[np.float64], costs: NDArray[np.float64], shortest: int, longest: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns the least costs with one more segment in front, and that segment's length.

    Both (T+1,), by the step at which the segment starts. argmin takes the first minimum: the
    shortest length, hence the earliest next anchor.
    """
    step_count = len(best) - 1
    lengths = np.arange(shortest, longest + 1)
    ends = np.minimum(np.arange(step_count)[:, None] + lengths, step_count)
    totals = costs[:, lengths - 1] + best[ends]
    choice = totals.argmin(axis=1)
    least = np.append(totals[np.arange(step_count), choice], math.inf)
    return least, np.append(lengths[choice], 0)


def _check_segments(
    step_count: int, columns: int, full_steps: int, shortest: int, longest: int
) -> None:
    """Refuses a split that cannot be; says which full steps and which bounds could."""
    if shortest < 1 or longest < shortest:
        raise ScheduleError(
            f"segments of {shortest} to {longest} steps do not exist: "
            "min_segment must be 1 or more and max_segment no less than min_segment"
        )
    if longest > columns:
        raise ScheduleError(
            f"segments of up to {longest} steps need reuse errors up to gap {longest - 1}, but "
            f"they are known up to {columns - 1}: lower max_segment to {columns}, or calibrate "
            "with a larger max_gap"
        )
    if full_steps >= 1 and full_steps * shortest <= step_count <= full_steps * longest:
        return
    raise ScheduleError(_split_refusal(step_count, full_steps, shortest, longest, columns))


def _split_refusal(
    step_count: int, full_steps: int, shortest: int, longest: int, columns: int
) -> str:
    too_few = full_steps * longest < step_count
    bound = f"at most {longest}" if too_few else f"at least {shortest}"
    found = f"{step_count} steps do not split into {full_steps} segments of {bound}"
    cures = list(_split_cures(step_count, full_steps, shortest, longest, columns))
    return f"{found}: {', or '.join(cures)}"


def _split_cures(
    step_count: int, full_steps: int, shortest: int, longest: int, columns: int
) -> Iterator[str]:
    fewest, most = -(-step_count // longest), step_count // shortest
    if fewest <= most:
        span = f"{fewest} to {most}" if fewest < most else f"exactly {fewest}"
        yield f"ask for {span} full steps"
    if full_steps >= 1 and full_steps * longest < step_count:
        needed = -(-step_count // full_steps)
        known = f" (calibrated with max_gap {needed - 1})" if needed > columns else ""
        yield f"raise max_segment to {needed}{known}"
    elif 1 <= full_steps <= step_count:
        yield f"lower min_segment to {step_count // full_steps}"
    elif fewest > most:
        yield f"widen the bounds {shortest} to {longest}"
