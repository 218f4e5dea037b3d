"""The best plan for what a device can give: the frontier of error against time, and picks of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import UsageError
from cq_edge.frontier import ReuseErrors, search_frontier
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_end import better_end
from cq_edge.plan_error import plan_errors
from cq_edge.reuse_table import OBJECTIVES, ReuseTable

FEWEST_TO_REUSE = 5
"""Steps of a loop in which reusing features is worth while: between the steps of a shorter one
they change too much, and there is little to save."""


_ROUNDING = 1e-9
"""Sums of the same times in another order are as long as each other within this share."""


def too_few_to_reuse(total_steps: int) -> str | None:
    """Returns why a loop of so many steps should run them all full, None if it should not."""
    if total_steps >= FEWEST_TO_REUSE:
        return None
    steps = "a single step has" if total_steps == 1 else f"{total_steps} steps have"
    return (
        f"{steps} next to nothing to reuse: features change too much between so few, so every step "
        "of the default plan is full, and what is gained here is the smaller, faster graph"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A cache schedule with what it is predicted to cost.

    `table` was measured on the noise scheduler and the steps that it is for, `error` is the
    predicted mean squared error of the final latents (of the paper's objective its sum),
    `picture_ms` the time of a picture (prompts, loop, decoding), `speedup` how many times faster
    its loop is than the bundle's own steps all full.
    """

    schedule: CacheSchedule
    table: ReuseTable
    error: float
    picture_ms: float
    speedup: float


def plan_frontier(
    tables: Sequence[ReuseTable],
    profile: DeviceProfile,
    branches: int,
    noise_schedule: NoiseScheduleConfig,
    objective: str = OBJECTIVES[0],
) -> tuple[Plan, ...]:
    """Returns the plans that no other beats in both error and time, the fastest first, of those
    that the dynamic program finds and that take no longer than the bundle's own steps all full.

    Compares across noise schedulers and steps: fewer steps count with their base error.

    Args:
        tables: Of what to choose from, the bundle's own noise scheduler and steps first; the
            paper's objective says nothing of the others, which it leaves out.
        profile: Of the device.
        branches: Runs of a graph per guided step: 2 with guidance, 1 without.
        noise_schedule: Of the model.
        objective: The error to minimise.
    """
    mode_ms = {mode: profile.mode_ms(mode, branches) for mode in Mode}
    full_ms = profile.loop_ms(CacheSchedule.all_full(len(tables[0].timesteps)), branches)
    plans = []
    for table in tables if objective == OBJECTIVES[0] else tables[:1]:
        searched = table.errors_to_search(objective)
        found = [plan for sums in searched for plan, _ in search_frontier(sums, mode_ms)]
        errors = predicted_errors(table, noise_schedule, found, objective)
        for schedule, error in zip(found, errors, strict=True):
            plans.append(_priced(schedule, table, error, full_ms, profile, branches))
    frontier: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.picture_ms, plan.error)):
        if plan.speedup > 1 - _ROUNDING and (not frontier or plan.error < frontier[-1].error):
            frontier.append(plan)
    return tuple(frontier)


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


def best_within_loop_ms(
    frontier: Sequence[Plan],
    loop_ms: float,
    profile: DeviceProfile,
    branches: int,
    noise_schedule: NoiseScheduleConfig,
) -> Plan:
    """Returns the plan of least error whose loop takes no longer, or the fastest; of our objective,
    with a better end.

    Args:
        frontier: As `plan_frontier` gives it.
        loop_ms: Of the denoising loop.
        profile: Of the device.
        branches: Runs of a graph per guided step.
        noise_schedule: Of the model.
    """
    fits = [plan for plan in frontier if profile.loop_ms(plan.schedule, branches) <= loop_ms]
    plan = fits[-1] if fits else frontier[0]
    return with_better_end(plan, loop_ms, profile, branches, noise_schedule)


def with_better_end(
    plan: Plan,
    loop_ms: float,
    profile: DeviceProfile,
    branches: int,
    noise_schedule: NoiseScheduleConfig,
) -> Plan:
    """Returns a plan of our objective, its last steps exchanged as long as that makes it err less:
    a tenth of a second or two for 51 steps, too long for every plan of a frontier.

    Args:
        plan: Of a frontier.
        loop_ms: What its loop may take; never less than it takes already, nor more than with
            every step full.
        profile: Of the device.
        branches: Runs of a graph per guided step.
        noise_schedule: Of the model.
    """
    table, own_ms = plan.table, profile.loop_ms(plan.schedule, branches)
    full_ms = plan.speedup * own_ms
    longest_ms = max(min(loop_ms, full_ms), own_ms) * (1 + _ROUNDING)
    noise_scheduler = make_noise_scheduler(table.noise_scheduler, table.steps, noise_schedule)

    def fits(schedule: CacheSchedule) -> bool:
        return profile.loop_ms(schedule, branches) <= longest_ms

    schedule = better_end(table, noise_scheduler, plan.schedule, fits)
    if schedule == plan.schedule:
        return plan
    (error,) = predicted_errors(table, noise_schedule, [schedule], OBJECTIVES[0])
    return _priced(schedule, table, error, full_ms, profile, branches)


def plan_with_full_steps(
    table: ReuseTable,
    full_steps: int,
    profile: DeviceProfile,
    branches: int,
    noise_schedule: NoiseScheduleConfig,
    objective: str = OBJECTIVES[0],
) -> Plan:
    """Returns what `best_with_full_steps` does, with what it costs on a device."""
    errors = table.reuse_errors(objective)
    schedule = best_with_full_steps(errors, full_steps)
    full_ms = profile.loop_ms(CacheSchedule.all_full(len(schedule)), branches)
    (error,) = predicted_errors(table, noise_schedule, [schedule], objective)
    return _priced(schedule, table, error, full_ms, profile, branches)


def best_with_full_steps(errors: ReuseErrors, full_steps: int) -> CacheSchedule:
    """Returns the schedule of the least sum of errors with so many full steps or fewer, none
    unguided or run more than once.

    Raises:
        UsageError: What was measured does not reach that far; names the least number that does.
    """
    step_count = len(errors.shallow)
    if not 1 <= full_steps <= step_count:
        raise UsageError(f"{full_steps} full steps of {step_count}: ask for 1 to {step_count}")
    guided = replace(errors.once(), unguided=np.zeros((step_count, 1)))
    cost = {mode: float(mode.is_full) for mode in Mode}
    found = [schedule for schedule, _ in search_frontier(guided, cost)]
    fits = [schedule for schedule in found if schedule.counts["full"] <= full_steps]
    if not fits:
        fewest = found[0].counts["full"]
        raise UsageError(
            f"{full_steps} full steps of {step_count} are too few for what was calibrated: ask for "
            f"{fewest} or more, or calibrate with a larger max_gap"
        )
    return fits[-1]


def predicted_errors(
    table: ReuseTable,
    noise_schedule: NoiseScheduleConfig,
    schedules: Sequence[CacheSchedule],
    objective: str,
) -> list[float]:
    """Returns what schedules are predicted to err by: by our objective the mean squared error of
    the final latents, by the paper's its sum.

    Args:
        table: What steps err by.
        noise_schedule: Of the model.
        schedules: Of the table's T steps.
        objective: One of `OBJECTIVES`.

    Raises:
        ScheduleError: A schedule has another length or a step that was not measured.
        UsageError: There is no such objective.
    """
    if objective != OBJECTIVES[0]:
        errors = table.reuse_errors(objective)
        return [errors.total(schedule) for schedule in schedules]
    noise_scheduler = make_noise_scheduler(table.noise_scheduler, table.steps, noise_schedule)
    predicted: list[float] = plan_errors(table, noise_scheduler, schedules).tolist()
    return predicted


def _priced(
    schedule: CacheSchedule,
    table: ReuseTable,
    error: float,
    full_ms: float,
    profile: DeviceProfile,
    branches: int,
) -> Plan:
    """Returns a schedule with what it costs."""
    speedup = full_ms / profile.loop_ms(schedule, branches)
    return Plan(schedule, table, error, profile.picture_ms(schedule, branches), speedup)
