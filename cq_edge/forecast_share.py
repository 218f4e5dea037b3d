"""How much of a step's noise prediction is better forecast than computed: what the noise of
quantised layers is averaged away by.

What a step's graph errs by is noise that is new, or much of it, and what its forecast errs by is
that of the steps before. The mean of both has less noise, and what is left of it is more like that
of its neighbours, which a multistep noise scheduler weighs with changing signs. So a share is worth
what it does to the final latents, not to its own step; and that depends on what the steps around it
do. The shares of a plan that is to run are chosen for it. A table's are for plans that are
compared: of full steps, by how far back the last full step is before the one that was computed
last, each chosen in loops in which every full step is like that.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.plan_error import LAST, forecast_errors, noise_powers
from cq_edge.reuse_table import ReuseTable

_WORTH, _WORTH_IN_PLAN = 4.0, 2.0
"""By how much more what a forecast errs by reuse counts here than in a plan's prediction, as a
power; what of it goes on as noise does counts as there. Forecasts of steps in a row lag behind in
one direction, and shares that the prediction alone would choose are too large: for a table's, from
1 to 14, those from 3 to 6 were the best for plans of the demo model, for a plan's own, of 1, 2 and
4, it was 2."""
_SWEEPS, _SWEEPS_IN_PLAN = 3, 2
"""How often all shares are chosen anew, each for the others: in a plan's, which somebody waits for,
a third sweep was worth 0.3 % of the error at most."""
_PARTS = 256
"""A plan's shares are whole parts of so many, so that they are the same on every machine."""


def forecast_share(table: ReuseTable, noise_scheduler: NoiseScheduler) -> NDArray[np.float32]:
    """Returns (T, G+1), 0 to 1, as `ReuseTable.forecast_share`: the shares with which plans are
    predicted to err least, had what forecasts err by its `_WORTH`; 0 of steps too early for their
    noise to be followed to the end.

    Args:
        table: Says what quantisation and reuse err by; its own shares are not looked at.
        noise_scheduler: That of the table.

    Raises:
        ScheduleError: The noise scheduler is not that of the table.
    """
    total, gaps = table.noise_pred.shape
    places = [(gap, first) for gap in range(gaps) for first in range(gap + 1)]
    loops = [_loop(total, *place) for place in places]
    found = np.zeros((total, gaps), np.float32)
    full = np.array([[mode.is_full for mode in loop.modes] for loop in loops])
    least = _least(table, noise_scheduler, loops, full, _WORTH, _SWEEPS)
    for (gap, first), shares in zip(places, least, strict=True):
        for anchor in range(first, total - gap - 1, gap + 1):
            found[anchor, gap] = shares[anchor + gap + 1]
    return found


def plan_shares(
    table: ReuseTable, noise_scheduler: NoiseScheduler, schedule: CacheSchedule
) -> NDArray[np.float32]:
    """Returns (T,), 0 to 1, how much of each step's noise prediction is to be forecast: of steps
    that run a graph after one that did, shallow ones too, with which the plan is predicted to err
    least, had what forecasts err by its worth. A tenth of a second to four for 51 steps.

    Args:
        table: Says what quantisation and reuse err by; its own shares are not looked at.
        noise_scheduler: That of the table.
        schedule: Of its T steps.

    Raises:
        ScheduleError: The noise scheduler is not that of the table, or the schedule has a step that
            was not measured or another length.
    """
    table.reuse_errors().parts(schedule)  # all of it was measured
    runs = [mode is not Mode.SKIP for mode in schedule.modes]
    may = np.array([[False, *(one and other for one, other in pairwise(runs))]])
    given = (table, noise_scheduler, [schedule], may)
    (shares,) = _least(*given, _WORTH_IN_PLAN, _SWEEPS_IN_PLAN)
    return np.asarray((shares * _PARTS).round() / _PARTS, np.float32)


def _loop(total: int, gap: int, first: int) -> CacheSchedule:
    """Returns T steps: full ones up to `first`, then one after every `gap` shallow ones."""
    full = (step <= first or (step - first) % (gap + 1) == 0 for step in range(total))
    return CacheSchedule(tuple(Mode.FULL if f else Mode.SHALLOW for f in full))


def _least(
    table: ReuseTable,
    noise_scheduler: NoiseScheduler,
    loops: list[CacheSchedule],
    may: NDArray[np.bool_],
    worth: float,
    sweeps: int,
) -> NDArray[np.float64]:
    """Returns (P, T) shares of P loops' steps that (P, T) `may` have one, each of least error with
    the others as they are, the last of a loop first."""
    total = len(table.timesteps)
    shares = np.zeros(may.shape)
    if table.skip.shape[1] == 1:  # no forecast was measured
        return shares
    reuse = worth * np.square([forecast_errors(table, loop) for loop in loops])
    followed = [step for step in range(max(1, total - LAST), total) if may[:, step].any()]
    for step in sweeps * followed[::-1]:
        tried = np.repeat(shares[None], 3, axis=0)
        tried[:, :, step] = np.array([0.0, 0.5, 1.0])[:, None]
        none, half, whole = noise_powers(
            table, noise_scheduler, 3 * loops, tried.reshape(-1, total)
        ).reshape(3, -1)
        square = 2 * (none - 2 * half + whole)  # error: none + linear·share + square·share²
        linear = whole - none - square
        square = square + reuse[:, step]
        share = np.divide(-linear, 2 * square, out=np.zeros(len(loops)), where=square > 0)
        shares[:, step] = np.where(may[:, step], share.clip(0, 1), 0)
    return shares
