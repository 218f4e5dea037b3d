"""The best plan for what a device can give: the frontier of error against time, and picks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, plan_full_steps, total_error
from cq_edge.errors import UsageError
from cq_edge.latency import DeviceProfile


@dataclass(frozen=True, slots=True)
class Plan:
    """A cache schedule with what it is predicted to cost.

    `error` is the sum of its reuse errors, `picture_ms` the time of a picture (prompts, loop,
    decoding), `speedup` how many times faster its loop is than the same steps all full.
    """

    schedule: CacheSchedule
    error: float
    picture_ms: float
    speedup: float


def plan_frontier(
    errors: NDArray[np.float64], profile: DeviceProfile, branches: int
) -> tuple[Plan, ...]:
    """Returns the plans that no other beats in both error and time, the fastest first.

    Exact over the modes full and shallow, since a loop's time depends on how many steps are full
    and not on which.

    Args:
        errors: (T, G+1) reuse errors.
        profile: Of the device.
        branches: Runs of a graph per step: 2 with guidance, 1 without.
    """
    step_count, columns = errors.shape
    full_ms = profile.loop_ms(CacheSchedule.all_full(step_count), branches)
    plans: list[Plan] = []
    for count in range(-(-step_count // columns), step_count + 1):
        schedule = plan_full_steps(errors, count)
        error, loop_ms = total_error(errors, schedule), profile.loop_ms(schedule, branches)
        if not plans or error < plans[-1].error:
            picture_ms = profile.picture_ms(schedule, branches)
            plans.append(Plan(schedule, error, picture_ms, full_ms / loop_ms))
    return tuple(plans)


def best_within_ms(frontier: Sequence[Plan], budget_ms: float) -> Plan:
    """Returns the plan of least error whose picture takes no longer than a budget.

    Raises:
        UsageError: None is fast enough; names the least budget that is.
    """
    fits = [plan for plan in frontier if plan.picture_ms <= budget_ms]
    if not fits:
        raise UsageError(
            f"no plan takes {budget_ms:.0f} ms or less on this device: "
            f"the fastest takes {frontier[0].picture_ms:.0f} ms"
        )
    return fits[-1]


def best_at_speedup(frontier: Sequence[Plan], speedup: float) -> Plan:
    """Returns the plan of least error whose loop is at least so many times faster.

    Raises:
        UsageError: None is fast enough; names the largest speed-up there is.
    """
    fits = [plan for plan in frontier if plan.speedup >= speedup]
    if not fits:
        raise UsageError(
            f"no plan is {speedup:g} times faster than every step full on this device: "
            f"the fastest is {frontier[0].speedup:.2f} times"
        )
    return fits[-1]
