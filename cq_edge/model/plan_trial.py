"""What a table's errors are worth in the final latents, from two plans that are tried.

The influence of single steps supposes Gaussian data. So the noise of every step full and wholly
computed is scaled to what that run ends in, less the part of it that is the same in all steps and
so in all plans, and then the errors of reuse half way to what a plan that computes little ends in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.forecast import Forecast
from cq_edge.frontier import search_frontier
from cq_edge.model.reuse_trial import ShallowGraph
from cq_edge.model.trajectory import Loop, Prompt, mean_square
from cq_edge.plan_error import noise_powers
from cq_edge.reuse_table import ReuseTable

_MODE_COSTS = {Mode.FULL: 1.0, Mode.SHALLOW: 0.1, Mode.SKIP: 0.0}
"""What a step of each mode takes in the search for the plan that is tried, of a full step."""
_FULL_SHARE, _FULL_STEPS = 0.25, 8
"""The larger is what is full: few enough for reuse to err more than quantisation does, and enough
for a picture."""
_STEADY_WORTH = 2.5
"""By how much more noise that stays counts in the final latents than noise that is new at every
step, as a power. What stays is in all plans alike; fitted to plans of the demo model at 8 bits,
with which it is an eighth of quantisation's error there."""
_TRUST = 0.5
"""How far errors of reuse are scaled to those of the trial, by their logarithms: a few prompts
tell them no better than the influence of steps alone does."""
_LEAST_REUSE = 0.1
"""The least share of a trial's error that counts as reuse's, where noise alone seems to be more."""


@torch.no_grad()
def final_latents(
    loop: Loop, prompts: Sequence[Prompt], on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, ...]:
    """Returns what each prompt's run of a loop ends in, (1, 4, h, w) each.

    Args:
        loop: What to run.
        prompts: One or more.
        on_step: Called after every step that is run, for progress bars.
    """
    finals = []
    for number, prompt in enumerate(prompts):
        for visit in loop.run(number, prompt):
            latents = visit.after
            on_step()
        finals.append(latents)
    return tuple(finals)


def typical_distance(finals: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Returns the geometric mean, over the prompts, of the mean squared differences of the final
    latents: the mean of their decibels, which one prompt that tips over does not decide."""
    pairs = zip(finals, others, strict=True)
    distances = np.array([mean_square(a - b) for a, b in pairs])
    return float(np.exp(np.log(distances).mean())) if distances.all() else 0.0


def scaled_to_trial(
    table: ReuseTable,
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    full_finals: Sequence[Tensor],
    exact_finals: Sequence[Tensor],
    steady_noise: float,
    on_step: Callable[[], object] = lambda: None,
) -> ReuseTable:
    """Returns a table whose predictions are right for every step full and wholly computed, and
    nearer to right for a plan that computes little; its base error has grown by what quantisation
    does to all plans.

    Args:
        table: Of the loop's noise scheduler, with no shares of forecasts yet; its influences are
            scaled.
        loop: Of the full graph that ships.
        shallow: Its shallow graph.
        prompts: One or more.
        full_finals: The final latents of the loop, every step full.
        exact_finals: Those of the float denoiser.
        steady_noise: The share of the noise of full steps that stays, 0 to 1.
        on_step: Called after every step that is run, for progress bars.
    """
    all_full = CacheSchedule.all_full(len(table.timesteps))
    quantised = typical_distance(full_finals, exact_finals)
    fresh = 1 - steady_noise
    fresh /= fresh + _STEADY_WORTH * steady_noise
    scale = fresh * _ratio(quantised, table.reuse_errors().total(all_full))
    shared = (1 - fresh) * quantised
    table = replace(
        table,
        base_error=table.base_error + shared,
        noise_influence=table.noise_influence * np.sqrt(scale),
    )
    # a step without the negative prompt cannot be run branch by branch
    errors = replace(table.reuse_errors().once(), unguided=np.zeros((len(table.timesteps), 1)))
    plans = search_frontier(errors, _MODE_COSTS)
    most = max(_FULL_STEPS, int(_FULL_SHARE * len(table.timesteps)))
    thrifty = [s for s, _ in plans if s.counts["full"] <= most]
    schedule = thrifty[-1] if thrifty else plans[0][0]
    planned = _Planned(loop, shallow, table, schedule, len(loop.branches(prompts[0])))
    finals = final_latents(replace(loop, full=planned), prompts, on_step)
    found = typical_distance(finals, exact_finals)
    (noise,) = noise_powers(table, loop.noise_scheduler, [schedule])
    left = max(found - shared - noise, _LEAST_REUSE * found)
    reuse = _ratio(left, errors.parts(schedule).reuse) ** _TRUST
    return replace(table, reuse_influence=table.reuse_influence * np.sqrt(reuse))


def _ratio(found: float, predicted: float) -> float:
    """Returns how many times larger what was found is; 1 where nothing is to be scaled."""
    return found / predicted if predicted > 0 and found > 0 else 1.0


@dataclass(slots=True)
class _Planned:
    """Stands for the full graph in a loop, and does what a schedule says instead."""

    loop: Loop
    shallow: ShallowGraph
    table: ReuseTable
    schedule: CacheSchedule
    branches: int
    _calls: int = 0
    _features: dict[int, Forecast] = field(default_factory=dict)
    _predictions: dict[int, Forecast] = field(default_factory=dict)

    def __call__(
        self, latents: Tensor, timestep: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor]:
        visit, branch = divmod(self._calls, self.branches)
        step, self._calls = visit % len(self.schedule), self._calls + 1
        if step == 0:
            self._features[branch] = self._predictions[branch] = Forecast()
        mode, features = self.schedule.modes[step], self._features[branch]
        if mode is Mode.FULL:
            noise_pred, feature = self.loop.full(latents, timestep, *context)
            self._features[branch] = features.after(step, feature)
        else:
            feature = features.at(step, self.table.feature_weight)
            if mode is Mode.SKIP:
                return self._predictions[branch].at(step, self.table.skip_weight), feature
            correction = self.table.correction(self.schedule.anchors[step], step)
            given = map(torch.from_numpy, correction.inputs().values())
            noise_pred = self.shallow(latents, timestep, *context, feature, *given)
        line = self._predictions[branch]
        self._predictions[branch] = line.after(step, noise_pred, in_part=mode.is_shallow)
        return noise_pred, feature
