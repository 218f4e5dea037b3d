"""Every plan worth having: dynamic programming over the modes of all steps."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError

_NS_PER_MS = 1e6
_SLOPES = (0.5, 2.0)
"""Of the total by amplitude, in roots of the noise of every step full."""


class _State(NamedTuple):
    """What the steps so far leave for the next one to build on."""

    gap: int = 0  # steps since the anchor
    guided_anchor: bool = True
    skipped: int = 0  # steps since a graph ran
    unguided: int = 0  # steps since the negative prompt ran


class ErrorParts(NamedTuple):
    """What a plan errs by: `reuse` is an amplitude, `noise` a mean square, of the final latents."""

    reuse: float
    noise: float

    @property
    def total(self) -> float:
        """The mean squared error: errors of reuse go on in one direction for many steps, so that
        it is their sum that is squared; noise adds up by power."""
        return max(0.0, self.reuse**2 + self.noise)


class _Move(NamedTuple):
    """A way on from a state: the next one, and what each step of a loop would add, by step."""

    after: _State
    reuse: Sequence[float]
    noise: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class ReuseErrors:
    """What each way of computing less adds to a plan's error.

    Entry [i, g] of the first three is about step i + g, which builds on step i; column 0 is 0,
    entries of steps beyond T-1 are unused. An array of one column rules its way out.

    Attributes:
        shallow: (T, G+1): reusing the cached feature of anchor i.
        skip: (T, R+1): forecasting from step i, the last that ran a graph. Had that step reused a
            feature or left the negative prompt out, the forecast errs by that too.
        unguided: (T, U+1): forecasting what the negative prompt changes from step i, the last
            that ran it.
        noise: Of each mode (T, T), as `noise_by_mode` gives it; empty without any.
        across: Of each mode (T,): by step, what the square of all that such a step errs by adds to
            the noise, as far as it is like noise; empty without any.
    """

    shallow: NDArray[np.float64]
    skip: NDArray[np.float64]
    unguided: NDArray[np.float64]
    noise: Mapping[Mode, NDArray[np.float64]] = field(default_factory=dict)
    across: Mapping[Mode, NDArray[np.float64]] = field(default_factory=dict)
    _found: dict[_State, dict[Mode, _Move]] = field(default_factory=dict, init=False, repr=False)

    def parts(self, schedule: CacheSchedule) -> ErrorParts:
        """Returns the errors of a schedule's steps, added up.

        Raises:
            ScheduleError: The schedule has another length, or a step that was not measured.
        """
        if len(schedule) != len(self.shallow):
            raise ScheduleError(
                f"the schedule has {len(schedule)} steps and the errors are of "
                f"{len(self.shallow)}: they must be equal"
            )
        state, found = _State(), self._first
        for step, mode in enumerate(schedule.modes[1:], start=1):
            moves = self._moves(state)
            if mode not in moves:
                allowed = " or ".join(moves)
                raise ScheduleError(
                    f"step {step} of {schedule.to_string()} is {mode}, but what it would build on "
                    f"is further back than was measured: make it {allowed}"
                )
            state, reuse, noise = moves[mode]
            found = ErrorParts(found.reuse + reuse[step], found.noise + noise[step])
        return found

    def total(self, schedule: CacheSchedule) -> float:
        """Returns what the dynamic program minimises: the mean squared error of the final latents
        that the sum of a schedule's steps makes.

        Raises:
            ScheduleError: The schedule has another length, or a step that was not measured.
        """
        return self.parts(schedule).total

    @property
    def _first(self) -> ErrorParts:
        """Of the first step, which is full."""
        return ErrorParts(0.0, float(self.noise[Mode.FULL][0, 0]) if self.noise else 0.0)

    def _moves(self, state: _State) -> dict[Mode, _Move]:
        """Returns what a step may be after a state."""
        if state not in self._found:
            # the noise that goes on is of the last full step, or of the last that was guided
            back = state.gap + 1 if state.guided_anchor else state.unguided + 1
            moves = {}
            for mode, after, reuse in self._reusing(state):
                noise = np.zeros(len(reuse))
                if self.noise:
                    noise += self.noise[mode][:, min(back, len(reuse) - 1)]
                if self.across:
                    noise += self.across[mode] * reuse**2
                moves[mode] = _Move(after, reuse.tolist(), noise.tolist())
            self._found[state] = moves
        return self._found[state]

    def _reusing(self, state: _State) -> Iterator[tuple[Mode, _State, NDArray[np.float64]]]:
        """Yields a step's modes with the next state and the (T,) amplitudes that reuse adds."""
        gap, skipped, unguided = state.gap + 1, state.skipped + 1, state.unguided + 1
        nothing = np.zeros(len(self.shallow))
        yield Mode.FULL, _State(), nothing
        shallow, reusable = nothing, gap < self.shallow.shape[1]
        if reusable:
            shallow = _by_step(self.shallow, gap)
        difference, forecastable = nothing, unguided < self.unguided.shape[1]
        if forecastable:
            difference = _by_step(self.unguided, unguided)
        if reusable and state.guided_anchor:
            yield Mode.SHALLOW, _State(gap), shallow
        if forecastable:
            yield Mode.FULL_UNGUIDED, _State(0, guided_anchor=False, unguided=unguided), difference
            if reusable:
                after = _State(gap, state.guided_anchor, 0, unguided)
                yield Mode.SHALLOW_UNGUIDED, after, shallow + difference
        # what the step that a forecast builds on did not compute goes on to be wrong in it
        known = (reusable or gap <= skipped) and (forecastable or unguided <= skipped)
        if known and skipped < self.skip.shape[1]:
            carried = shallow * (gap > skipped) + difference * (unguided > skipped)
            unguided = min(unguided, self.unguided.shape[1])  # beyond that all is too far back
            after = _State(gap, state.guided_anchor, skipped, unguided)
            yield Mode.SKIP, after, _by_step(self.skip, skipped) + carried


def _by_step(errors: NDArray[np.float64], back: int) -> NDArray[np.float64]:
    """Returns (T,) what each step errs by that builds on the one so far back; 0 of the first."""
    return np.concatenate([np.zeros(back), errors[: len(errors) - back, back]])


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """The plans up to a step that end in one state and that none of them beats, fastest first.

    `more_ns` and `more_error` are still to be added to all of `ns` and `error`: most states have
    one way in, with nothing to choose. They were chosen among `parents`, (state before, mode)
    pairs whose labels stood one after the other: `chosen` are places in that row, `starts` where
    each parent's begin.
    """

    ns: NDArray[np.int64]
    error: NDArray[np.float64]
    more_ns: int = 0
    more_error: float = 0.0
    parents: Sequence[tuple[_State, Mode]] = ()
    starts: Sequence[int] = (0,)
    chosen: NDArray[np.int64] | None = None  # None where there was nothing to choose

    def parent(self, label: int) -> tuple[_State, Mode, int]:
        """Returns the state that a label came from, by which mode, and from which label there."""
        place = label if self.chosen is None else int(self.chosen[label])
        index = bisect_right(self.starts, place) - 1
        return *self.parents[index], place - self.starts[index]


_Part: TypeAlias = tuple[tuple[_State, Mode], _Labels, int, float]
"""A state before and the mode after it, its labels, and what all of those have more by then."""


def search_plans(
    errors: ReuseErrors, mode_ms: Mapping[Mode, float]
) -> list[tuple[CacheSchedule, float]]:
    """Returns the schedules that no other found beats in both time and error, each with its
    `ReuseErrors.total`, the fastest first.

    That total is convex in the amplitude of reuse, so that near its best plans it is a weighted
    sum, with the amplitude's slope as its weight; a few weights are searched, each exactly.

    Args:
        errors: Of T steps.
        mode_ms: What a step of each mode takes.
    """
    found = candidate_plans(errors, mode_ms)
    timed = [(sum(mode_ms[mode] for mode in s.modes), errors.total(s), s) for s in found]
    best: list[tuple[CacheSchedule, float]] = []
    for _, total, schedule in sorted(timed, key=lambda plan: plan[:2]):
        if not best or total < best[-1][1]:
            best.append((schedule, total))
    return best


def candidate_plans(
    errors: ReuseErrors, mode_ms: Mapping[Mode, float]
) -> tuple[CacheSchedule, ...]:
    """Returns all schedules that `search_plans` chooses among."""
    searched = (search_frontier(errors, mode_ms, weight) for weight in _weights(errors))
    return tuple({schedule: None for plans in searched for schedule, _ in plans})


def _weights(errors: ReuseErrors) -> tuple[float, ...]:
    """Returns slopes of the total by amplitude: where noise is most of it, to where reuse is."""
    noise = errors.total(CacheSchedule.all_full(len(errors.shallow)))
    return tuple(slope * noise**0.5 for slope in _SLOPES) if noise else (1.0,)


def search_frontier(
    errors: ReuseErrors, mode_ms: Mapping[Mode, float], weight: float = 1.0
) -> list[tuple[CacheSchedule, float]]:
    """Returns the schedules that no other beats in both time and error, each with its error, the
    fastest first.

    Exact for the sum of the steps' times (to a nanosecond) and of their errors. What a forecast
    costs is taken to depend on how far back the last computed value lies, not on how far back
    the one before it does.

    Args:
        errors: Of T steps.
        mode_ms: What a step of each mode takes.
        weight: Of the amplitude of reuse; the error is its multiple and noise together.
    """
    ns = {mode: round(taken * _NS_PER_MS) for mode, taken in mode_ms.items()}
    start = np.array([errors._first.noise])
    layers = [{_State(): _Labels(np.array([ns[Mode.FULL]]), start)}]
    for step in range(1, len(errors.shallow)):
        found = defaultdict(list)
        for state, labels in layers[-1].items():
            for mode, (after, reuse, noise) in errors._moves(state).items():
                error = labels.more_error + weight * reuse[step] + noise[step]
                found[after].append(((state, mode), labels, labels.more_ns + ns[mode], error))
        layers.append({after: _undominated(parts) for after, parts in found.items()})
    ends = layers[-1].items()
    best = _undominated(
        [((state, Mode.FULL), labels, labels.more_ns, labels.more_error) for state, labels in ends]
    )
    return [
        (_traced(layers, best.parent(label)), float(error) + best.more_error)
        for label, error in enumerate(best.error)
    ]


def _undominated(parts: Sequence[_Part]) -> _Labels:
    """Returns the labels of all parts that are faster or better than every other."""
    parents = [part[0] for part in parts]
    if len(parts) == 1:
        _, labels, more_ns, more_error = parts[0]
        return _Labels(labels.ns, labels.error, more_ns, more_error, parents)
    ns = np.concatenate([labels.ns + more for _, labels, more, _ in parts])
    error = np.concatenate([labels.error + more for _, labels, _, more in parts])
    order = ns.argsort(kind="stable")  # merges runs, which the parts are
    ns, error = ns.take(order), error.take(order)
    better = np.ones(len(ns), bool)
    np.less(error[1:], np.minimum.accumulate(error)[:-1], out=better[1:])
    best = better.nonzero()[0]
    fastest = ns.take(best)
    last = np.ones(len(best), bool)  # of equally fast ones the best
    np.greater(fastest[1:], fastest[:-1], out=last[:-1])
    best = best[last]
    starts = [0, *accumulate(len(labels.ns) for _, labels, *_ in parts)]
    return _Labels(ns.take(best), error.take(best), 0, 0.0, parents, starts, order.take(best))


def _traced(
    layers: Sequence[Mapping[_State, _Labels]], end: tuple[_State, Mode, int]
) -> CacheSchedule:
    """Returns the schedule that a label of the last layer stands for."""
    state, _, label = end
    modes = []
    for layer in reversed(layers[1:]):
        state, mode, label = layer[state].parent(label)
        modes.append(mode)
    return CacheSchedule((Mode.FULL, *reversed(modes)))
