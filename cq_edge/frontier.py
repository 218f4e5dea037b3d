"""Every plan worth having: dynamic programming over the modes of all steps."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import REPEATED, CacheSchedule, Mode
from cq_edge.errors import ScheduleError

_NS_PER_MS = 1e6
_REPEATED_LAST = 8
"""The last steps, which the search lets be full several times: later ones mend the noise of earlier
ones, and more moves take it longer."""


class _State(NamedTuple):
    """What the steps so far leave for the next one to build on."""

    gap: int = 0  # steps since the anchor
    guided_anchor: bool = True
    skipped: int = 0  # steps since a graph ran
    unguided: int = 0  # steps since the negative prompt ran


class ErrorParts(NamedTuple):
    """What a plan errs by, as parts of the mean squared error of the final latents; by the paper's
    objective `reuse` is its sum."""

    reuse: float
    noise: float

    @property
    def total(self) -> float:
        """Both together."""
        return max(0.0, self.reuse + self.noise)


class _Move(NamedTuple):
    """A way on from a state: the next one, and what each step of a loop would add, by step."""

    after: _State
    reuse: Sequence[float]
    noise: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class ReuseErrors:
    """What each way of computing less adds to a plan's error.

    Errors of reuse go on in one direction from one full step to the next, so that they add up
    before they are squared; over full steps the squares add up. Entry [i, g] of the first three is
    such an error of step i + g, which builds on step i; column 0 is 0, entries of steps beyond T-1
    are unused. An array of one column rules its way out.

    Attributes:
        shallow: (T, G+1): reusing the cached feature of anchor i.
        skip: (T, R+1): forecasting from step i, the last that ran a graph. Had that step reused a
            feature or left the negative prompt out, the forecast errs by that too.
        unguided: (T, U+1): forecasting what the negative prompt changes from step i, the last
            that ran it. Had that step reused a feature, the step right after it errs by that too
            (with the influence of that step, not its own: up to three times apart at the last
            steps); later ones are taken not to, as the states do not tell.
        noise: Of each mode (T, T), as `noise_by_mode` or `averaged_noise` gives it; empty without
            any. A step may be full several times if its mode is there.
        across: Of each mode (T,): by step, what the square of all that such a step errs by adds to
            the noise, as far as it is like noise; empty without any.
        squared: Whether errors of reuse are squared; otherwise all of them add up as they are, as
            in the paper's objective.
    """

    shallow: NDArray[np.float64]
    skip: NDArray[np.float64]
    unguided: NDArray[np.float64]
    noise: Mapping[Mode, NDArray[np.float64]] = field(default_factory=dict)
    across: Mapping[Mode, NDArray[np.float64]] = field(default_factory=dict)
    squared: bool = True
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
        """Returns what the dynamic program minimises: the sum of what a schedule's steps add.

        Raises:
            ScheduleError: The schedule has another length, or a step that was not measured.
        """
        return self.parts(schedule).total

    def once(self) -> Self:
        """Returns the errors of plans in which no step is full several times."""
        noise = {mode: noise for mode, noise in self.noise.items() if mode not in REPEATED}
        return replace(self, noise=noise)

    @property
    def _first(self) -> ErrorParts:
        """Of the first step, which is full."""
        return ErrorParts(0.0, float(self.noise[Mode.FULL][0, 0]) if self.noise else 0.0)

    def _moves(self, state: _State) -> dict[Mode, _Move]:
        """Returns what a step may be after a state."""
        if state not in self._found:
            # the noise that goes on is of the last full step, or of the last that was guided
            back = state.gap + 1 if state.guided_anchor else state.unguided + 1
            so_far, moves = self._so_far(state), {}
            for mode, after in self._nexts(state):
                amplitude = added = self._reused(after)
                if mode.is_unguided and not (state.skipped or state.unguided):
                    amplitude = added = amplitude + np.r_[0, self._reused(state)[:-1]]
                if self.squared:
                    run = 0 if mode.is_full else so_far
                    added = amplitude * (amplitude + 2 * run)
                noise = np.zeros(len(added))
                if self.noise:
                    noise += self.noise[mode][:, min(back, len(noise) - 1)]
                if self.across:
                    noise += self.across[mode] * amplitude**2
                moves[mode] = _Move(after, added.tolist(), noise.tolist())
            self._found[state] = moves
        return self._found[state]

    def _nexts(self, state: _State) -> Iterator[tuple[Mode, _State]]:
        """Yields the modes that a step may have, with the state after it."""
        gap, skipped, unguided = state.gap + 1, state.skipped + 1, state.unguided + 1
        reusable, forecastable = gap < self.shallow.shape[1], unguided < self.unguided.shape[1]
        yield Mode.FULL, _State()
        for mode in REPEATED:
            if mode in self.noise:
                yield mode, _State()
        if reusable and state.guided_anchor:
            yield Mode.SHALLOW, _State(gap)
        if forecastable:
            yield Mode.FULL_UNGUIDED, _State(0, guided_anchor=False, unguided=unguided)
            if reusable:
                yield Mode.SHALLOW_UNGUIDED, _State(gap, state.guided_anchor, 0, unguided)
        known = (reusable or gap <= skipped) and (forecastable or unguided <= skipped)
        if known and skipped < self.skip.shape[1]:
            unguided = min(unguided, self.unguided.shape[1])  # beyond that all is too far back
            yield Mode.SKIP, _State(gap, state.guided_anchor, skipped, unguided)

    def _reused(self, state: _State) -> NDArray[np.float64]:
        """Returns (T,) what each step errs by that leaves a state. What the step that a forecast
        builds on did not compute goes on to be wrong in it."""
        reused = _by_step(self.skip, state.skipped)
        if state.gap > state.skipped:
            reused = reused + _by_step(self.shallow, state.gap)
        if state.unguided > state.skipped:
            reused = reused + _by_step(self.unguided, state.unguided)
        return reused

    def _so_far(self, state: _State) -> NDArray[np.float64]:
        """Returns (T,) what has added up since the last full step, by the step after a state; what
        a state does not tell of the steps before is taken to have been shallow, and unguided as
        far back as the last of them were."""
        so_far = np.zeros(len(self.shallow))
        for back in range(min(state.gap + 1, len(so_far))):
            skipped, unguided = (max(since - back, 0) for since in state[2:])
            reused = self._reused(_State(state.gap - back, state.guided_anchor, skipped, unguided))
            so_far[back + 1 :] += reused[: len(so_far) - back - 1]
        return so_far


def _by_step(errors: NDArray[np.float64], back: int) -> NDArray[np.float64]:
    """Returns (T,) what each step errs by that builds on the one so far back; 0 of the first."""
    by_step = np.zeros(len(errors))
    by_step[back:] = errors[: len(errors) - back, back]
    return by_step


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


def search_frontier(
    errors: ReuseErrors, mode_ms: Mapping[Mode, float]
) -> list[tuple[CacheSchedule, float]]:
    """Returns the schedules that no other beats in both time and the sum of `ReuseErrors.parts`,
    each with that, the fastest first.

    Exact for that sum, and for the steps' times to a nanosecond, but that only the last steps may
    be full several times. What a forecast costs is taken to depend on how far back the last
    computed value lies, not on how far back the one before it does.

    Args:
        errors: Of T steps.
        mode_ms: What a step of each mode takes.
    """
    ns = {mode: round(taken * _NS_PER_MS) for mode, taken in mode_ms.items()}
    several = [mode for mode in ns if mode.runs > 1]
    start = np.array([errors._first.noise])
    layers = [{_State(): _Labels(np.array([ns[Mode.FULL]]), start)}]
    for step in range(1, len(errors.shallow)):
        never = several if step < len(errors.shallow) - _REPEATED_LAST else ()
        found = defaultdict(list)
        for state, labels in layers[-1].items():
            for mode, (after, reuse, noise) in errors._moves(state).items():
                if mode in never:
                    continue
                error = labels.more_error + reuse[step] + noise[step]
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
