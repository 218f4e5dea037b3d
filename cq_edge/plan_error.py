"""What given plans err by: their noise walked through the loop, their errors of reuse added up.

The dynamic program needs errors that depend on no more of the steps before than a few counts. The
noise of a given plan needs no such thing: how far it goes depends on which later steps answer to
it. So the noise of every step's layers is followed through the plan's own loop, with a denoiser of
Gaussian data that answers to noise in the latents as far as the graphs of that step do: a full step
wholly, a shallow one by what it computes, a forecast not at all. What a step takes from others
brings their noise with it, and so does the share of a computed step that is forecast. What such
shares err by reuse adds up by power.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.forecast import Weights
from cq_edge.influence import SMALL, noise_response
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.quantisation_noise import ALIKE, FADING, MOVED, one_branch
from cq_edge.reuse_table import ReuseTable

_SHALLOW_ANSWER = 0.23
"""Of a full step's answer to noise in the latents, what the layers of a shallow step give."""
_SHALLOW_NOISE = 0.66
"""Of a full step's noise, as a power, what the layers of a shallow step add."""
_AS_NOISE, _AS_NOISE_UNGUIDED = 0.52, 1.16
"""Of the power of what reuse alone errs by in a guided and an unguided step, what goes on as noise
does. All four fitted, with what steady noise is worth (`plan_trial`), to plans of the demo
model."""
LAST = 24
"""Steps whose noise is followed, the last: they mend what earlier ones leave, but for what is still
reused in them."""
_KINDS = 5

Noise = NDArray[np.float64]
"""(P, S) of P plans: by how much each of S independent sources moves a value; (P, 1) of zeros
where none has yet."""


def plan_errors(
    table: ReuseTable, noise_scheduler: NoiseScheduler, schedules: Sequence[CacheSchedule]
) -> NDArray[np.float64]:
    """Returns (P,) the mean squared error of the final latents to expect of each schedule.

    Args:
        table: Says what quantisation and reuse err by.
        noise_scheduler: That of the table.
        schedules: P of the table's T steps.

    Raises:
        ScheduleError: A schedule has another length or a step that was not measured, or the noise
            scheduler is not that of the table.
    """
    errors = table.reuse_errors()
    reuse = np.array([errors.parts(schedule).reuse for schedule in schedules])
    shares = [*map(table.shares_in, schedules)]
    forecast = [
        np.square(share * forecast_errors(table, schedule)).sum()
        for schedule, share in zip(schedules, shares, strict=True)
    ]
    noise = noise_powers(table, noise_scheduler, schedules, shares)
    noise += table.base_error + reuse + np.array(forecast)
    return noise


def forecast_errors(table: ReuseTable, schedule: CacheSchedule) -> NDArray[np.float64]:
    """Returns (T,) how far the final latents move by what the forecast of each step errs by where
    the step before was computed, by reuse alone: what a skipped step errs by, and what the step
    before did of its own, by what it did not compute; 0 where no forecast was measured.

    Args:
        table: Says what reuse errs by.
        schedule: Of its T steps.
    """
    found = np.zeros(len(schedule))
    if table.skip.shape[1] == 1:
        return found
    found[1:] = np.sqrt(table.skip[:-1, 1])
    guided = 0
    for step, anchor in enumerate(schedule.anchors[:-1]):
        mode = schedule.modes[step]
        if mode.is_shallow:
            found[step + 1] += np.sqrt(table.shallow[anchor, step - anchor])
        if mode.is_unguided:
            found[step + 1] += np.sqrt(table.unguided[guided, step - guided])
        elif mode is not Mode.SKIP:
            guided = step
    return found * table.reuse_influence


def noise_powers(
    table: ReuseTable,
    noise_scheduler: NoiseScheduler,
    schedules: Sequence[CacheSchedule],
    shares: Sequence[NDArray[np.floating]] | NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Returns (P,) the part of `plan_errors` that noise makes, scaled so that with every step full
    and wholly computed it is what the table's noise influence makes of it.

    Args:
        table: Says what quantisation and reuse err by.
        noise_scheduler: That of the table.
        schedules: P of the table's T steps.
        shares: (P, T) of forecasts in steps that run a graph; the table's, if there are none.

    Raises:
        ScheduleError: The noise scheduler is not that of the table.
    """
    table.require_for(noise_scheduler)
    every = CacheSchedule.all_full(len(table.timesteps))
    taken = map(table.shares_in, schedules) if shares is None else shares
    none_and_taken = np.array([np.zeros(len(every)), *taken])
    powers = _Walk(table, noise_scheduler, [every, *schedules], none_and_taken).powers()
    scale = table.reuse_errors().parts(every).noise / powers[0] if powers[0] else 1.0
    scaled: NDArray[np.float64] = powers[1:] * scale
    return scaled


class _Line:
    """`Forecast` of many plans at once, each with steps of its own."""

    def __init__(self, nothing: Noise) -> None:
        self.last = self._before = np.full(len(nothing), -1)
        self._value = self._earlier = nothing
        self._in_part = np.zeros(len(nothing), bool)

    def at(self, step: int, weights: Weights) -> Noise:
        """Returns what to expect at a step."""
        back, gap = self.last - self._before, step - self.last
        reaches = (self._before >= 0) & (back < weights.shape[1]) & (gap < weights.shape[2])
        entry = tuple(np.where(reaches, (self.last, back, gap), 0))
        share = np.where(reaches, weights[entry], 0.0)[:, None]
        forecast: Noise = self._value + share * (self._value - self._earlier)
        return forecast

    def after(
        self,
        step: int,
        value: Noise,
        where: NDArray[np.bool_],
        in_part: NDArray[np.bool_] | bool = False,
    ) -> None:
        """Takes a step's value into the plans that computed it, of some in part."""
        kept = where & ~self._in_part
        self._before = np.where(kept, self.last, self._before)
        self.last = np.where(where, step, self.last)
        self._earlier = np.where(kept[:, None], self._value, self._earlier)
        self._value = np.where(where[:, None], value, self._value)
        self._in_part = np.where(where, in_part, self._in_part)


class _Walk:
    """The noise of some plans, followed through the loop.

    Its sources are, of each of the last steps, what quantisation adds in the deep and in the
    shallow layers of both branches, and what reuse adds.
    """

    def __init__(
        self,
        table: ReuseTable,
        noise_scheduler: NoiseScheduler,
        schedules: Sequence[CacheSchedule],
        shares: NDArray[np.floating],
    ) -> None:
        """Takes (P, T) `shares` of forecasts beside the table and the schedules."""
        self._table, self._noise_scheduler = table, noise_scheduler
        self._full = _where(schedules, lambda mode: mode.is_full)
        self._shallow = _where(schedules, lambda mode: mode.is_shallow)
        self._skip = _where(schedules, lambda mode: mode is Mode.SKIP)
        self._unguided = _where(schedules, lambda mode: mode.is_unguided)
        self._runs = np.array([[mode.runs for mode in schedule.modes] for schedule in schedules])
        self._forecast_share = np.where(self._skip, 1.0, shares)
        self._total = len(table.timesteps)
        self._followed = min(LAST, self._total)
        self._nothing = np.zeros((len(schedules), 1))  # of any number of sources
        lines = (_Line(self._nothing) for _ in range(4))
        self._prompt, self._negative, self._difference, self._predictions = lines

    def powers(self) -> NDArray[np.float64]:
        """Returns (P,) the mean square of the noise in the final latents."""
        latents, history = self._nothing, ()
        for step in range(self._total):
            prediction = self._nothing
            if self._place(step) < 0:
                self._computed(step, *4 * [self._nothing])
            else:
                prediction = self._predicted(step, latents)
            latents, history = self._noise_scheduler.advance(latents, prediction, step, history)
        kinds = latents.reshape(len(latents), _KINDS, -1) / SMALL
        steps = np.arange(kinds.shape[2])
        alike = ALIKE * FADING ** np.abs(np.subtract.outer(steps, steps))
        quantised, reused = kinds[:, :-1], kinds[:, -1]
        powers: NDArray[np.float64] = np.einsum("pki,ij,pkj->p", quantised, alike, quantised)
        unlike = (1 - ALIKE) / self._runs[:, -self._followed :]
        powers += np.einsum("pki,pi->p", np.square(quantised), unlike)
        powers += np.square(reused).sum(axis=1)
        return powers

    def _predicted(self, step: int, latents: Noise) -> Noise:
        """Returns the noise in the guided noise prediction of a step."""
        table, scale = self._table, self._table.guidance_scale
        full, unguided = self._full[:, step], self._unguided[:, step]
        seen = self._noise_scheduler.model_input(latents, step)
        answer = seen * noise_response(self._noise_scheduler, step)
        deep, near = self._sources(step)
        deeper = (1 - _SHALLOW_ANSWER) * answer
        prompt_feature = self._prompt.at(step, table.feature_weight)
        prompt_feature = np.where(full[:, None], deeper + deep[0], prompt_feature)
        both = full & ~unguided
        negative_feature = self._negative.at(step, table.feature_weight)
        negative_feature = np.where(both[:, None], deeper + deep[1], negative_feature)
        prompt = prompt_feature + _SHALLOW_ANSWER * answer + near[0]
        negative = negative_feature + _SHALLOW_ANSWER * answer + near[1]
        forecast = self._difference.at(step, table.unguided_weight)
        difference = np.where(unguided[:, None], forecast, prompt - negative)
        forecast = self._predictions.at(step, table.skip_weight)
        share = self._forecast_share[:, step, None]
        computed = prompt + (scale - 1) * difference
        prediction: Noise = computed + share * (forecast - computed) + self._reused(step)
        self._computed(step, prompt_feature, negative_feature, difference, prediction)
        return prediction

    def _computed(
        self, step: int, prompt: Noise, negative: Noise, difference: Noise, prediction: Noise
    ) -> None:
        """Takes the noise in both features, in what the prompts differ by and in the prediction."""
        full, skip, unguided = (x[:, step] for x in (self._full, self._skip, self._unguided))
        self._prompt.after(step, prompt, full)
        self._negative.after(step, negative, full & ~unguided)
        self._difference.after(step, difference, ~skip & ~unguided, ~full)
        self._predictions.after(step, prediction, ~skip, ~full)

    def _sources(self, step: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns (2, S) each: what the deep and the shallow layers add, of both branches."""
        place = self._place(step)
        sources = np.zeros((2, 2, _KINDS, self._followed))
        branch = self._table.own[step] * one_branch(self._table.guidance_scale)
        for part, share in enumerate((1 - _SHALLOW_NOISE, _SHALLOW_NOISE)):
            for number in range(2):
                moved = SMALL * np.sqrt(share * branch)
                sources[part, number, 2 * part + number, place] = moved
        deep, near = sources.reshape(2, 2, -1)
        return deep, near

    def _reused(self, step: int) -> Noise:
        """Returns what reuse, and moving latents, add to the prediction of a step, of its own."""
        place = self._place(step)
        power = np.where(self._runs[:, step] > 1, MOVED, 0.0)
        table = self._table
        for errors, part, line, share in (
            (table.shallow, self._shallow, self._prompt, _AS_NOISE),
            (table.skip, self._forecast_share, self._predictions, _AS_NOISE),
            (table.unguided, self._unguided, self._difference, _AS_NOISE_UNGUIDED),
        ):
            gap = np.minimum(step - line.last, errors.shape[1] - 1)
            of_step = share * np.square(part[:, step], dtype=float)
            power += np.where(of_step > 0, of_step * errors[line.last, gap], 0.0)
        reused = np.zeros((len(power), _KINDS, self._followed))
        reused[:, -1, place] = SMALL * np.sqrt(power)
        return reused.reshape(len(power), -1)

    def _place(self, step: int) -> int:
        """Returns which of the steps that are followed it is; below 0 before them."""
        return step - (self._total - self._followed)


def _where(schedules: Sequence[CacheSchedule], test: Callable[[Mode], bool]) -> NDArray[np.bool_]:
    """Returns (P, T) of which steps a test of their mode is true."""
    return np.array([[test(mode) for mode in schedule.modes] for schedule in schedules])
