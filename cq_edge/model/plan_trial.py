"""What a table's errors are worth in the final latents: every step full, and one plan tried.

What the influence of single steps leaves out is how much of many small errors the denoiser mends.
So one plan that reuses much is run, and the influence scaled to what comes of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.model.reuse_trial import ShallowGraph
from cq_edge.model.trajectory import FullGraph, Loop, Prompt, mean_square
from cq_edge.reuse_table import ReuseTable

_SEGMENTS = 6  # of the plan that is tried: it must err well above what quantisation does
_LEAST_SHARE, _MOST_SHARE = 1e-3, 1.0


@torch.no_grad()
def final_latents(
    loop: Loop, prompts: Sequence[Prompt], on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, ...]:
    """Returns what each prompt's run ends in, (1, 4, h, w) each, every step full.

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


def mean_distance(finals: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Returns the mean squared difference of the final latents of the same prompts."""
    pairs = list(zip(finals, others, strict=True))
    return sum(mean_square(a - b) for a, b in pairs) / len(pairs)


def scaled_to_trial(
    table: ReuseTable,
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    full_finals: Sequence[Tensor],
    exact_finals: Sequence[Tensor],
    on_step: Callable[[], object] = lambda: None,
) -> ReuseTable:
    """Returns a table whose prediction for a uniform plan is right.

    Args:
        table: Of the loop's noise scheduler; its influence is scaled.
        loop: Of the full graph that ships.
        shallow: Its shallow graph.
        prompts: One or more.
        full_finals: The final latents of the loop, every step full.
        exact_finals: Those of the float denoiser.
        on_step: Called after every step that is run, for progress bars.
    """
    step_count = len(table.timesteps)
    interval = min(table.max_gap + 1, max(2, step_count // _SEGMENTS))
    schedule = CacheSchedule.uniform(step_count, interval)
    predicted = table.final_error(table.reuse_errors().total(schedule)) - table.base_error
    reusing = _Reusing(loop.full, shallow, table, schedule, len(loop.branches(prompts[0])))
    finals = final_latents(replace(loop, full=reusing), prompts, on_step)
    found = mean_distance(finals, exact_finals) - mean_distance(full_finals, exact_finals)
    if predicted <= 0:
        return table
    share = float(np.clip(found / predicted, _LEAST_SHARE, _MOST_SHARE))
    return replace(table, influence=table.influence * share)


@dataclass(slots=True)
class _Reusing:
    """Stands for the full graph in a loop, and runs the shallow one where a schedule says so."""

    full: FullGraph
    shallow: ShallowGraph
    table: ReuseTable
    schedule: CacheSchedule
    branches: int
    _calls: int = 0
    _features: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, latents: Tensor, timestep: Tensor, embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        visit, branch = divmod(self._calls, self.branches)
        step, self._calls = visit % len(self.schedule), self._calls + 1
        if self.schedule.modes[step].is_full:
            noise_pred, self._features[branch] = self.full(latents, timestep, embeddings)
        else:
            correction = self.table.correction(self.schedule.anchors[step], step)
            given = map(torch.from_numpy, correction.inputs().values())
            feature = self._features[branch]
            noise_pred = self.shallow(latents, timestep, embeddings, feature, *given)
        return noise_pred, self._features[branch]
