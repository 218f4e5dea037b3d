"""The last steps of a plan, exchanged as long as the plan gets better.

How the noise of the last steps adds up depends on all of them, and on the shares of forecasts in
them: no sum over steps tells the best ends apart. The walk of `plan_error` does, so the end of the
one plan that is to run is looked at once more.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

from cq_edge.cache_schedule import REPEATED, CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.plan_error import plan_errors
from cq_edge.reuse_table import ReuseTable

_END = 12
"""Steps that are looked at, the last: for eight plans of the demo model, looking at twice as many
took up to six times as long and was worth 0.3 % at most, which no command here repeats."""
_MODES = (Mode.FULL, Mode.SHALLOW, *REPEATED)
_LEAST_GAIN = 5e-4
"""Of the error, what an exchange must be worth."""


def better_end(
    table: ReuseTable,
    noise_scheduler: NoiseScheduler,
    schedule: CacheSchedule,
    fits: Callable[[CacheSchedule], bool],
) -> CacheSchedule:
    """Returns a schedule that would hardly err less, by `plan_errors`, with one of its last steps
    shallow or full instead, once or several times, or with two of them exchanged; the best such
    change is made as long as there is one.

    Args:
        table: Says what steps err by.
        noise_scheduler: That of the table.
        schedule: Of its T steps, to start from.
        fits: Whether a schedule is fast enough.

    Raises:
        ScheduleError: The schedule has another length or a step that was not measured, or the
            noise scheduler is not that of the table.
    """
    (error,) = plan_errors(table, noise_scheduler, [schedule])
    errors = table.reuse_errors()

    def allowed(modes: tuple[Mode, ...]) -> CacheSchedule | None:
        try:
            changed = CacheSchedule(modes)
            if not fits(changed):
                return None
            errors.parts(changed)
        except ScheduleError:
            return None
        return changed

    while True:
        found = [*filter(None, map(allowed, _changed(schedule.modes)))]
        if not found:
            return schedule
        changed_errors = plan_errors(table, noise_scheduler, found)
        best = changed_errors.argmin()
        if not changed_errors[best] < (1 - _LEAST_GAIN) * error:
            return schedule
        schedule, error = found[best], changed_errors[best]


def _changed(modes: tuple[Mode, ...]) -> Iterator[tuple[Mode, ...]]:
    """Yields the modes with one or two of the last steps changed; the first step stays."""
    end = range(max(1, len(modes) - _END), len(modes))
    for step in end:
        for mode in _MODES:
            if mode is not modes[step]:
                yield *modes[:step], mode, *modes[step + 1 :]
    for one, other in combinations(end, 2):
        if modes[one] is not modes[other]:
            exchanged = list(modes)
            exchanged[one], exchanged[other] = modes[other], modes[one]
            yield tuple(exchanged)
