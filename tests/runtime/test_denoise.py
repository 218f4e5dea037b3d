from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import scheduling_lcm
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.forecast import Forecast
from cq_edge.noise_scheduler import (
    NAMES,
    NoiseScheduleConfig,
    NoiseScheduler,
    make_noise_scheduler,
)
from runtime.denoise import Guidance, StepRecord, denoise, moved_apart
from runtime.generate import initial_latents, noises
from tests.tiny_bundle import MAX_GAP, SIDE, STEPS, WIDTH, FakeEngine, reuse_table

DIFFUSERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SHAPE = (4, SIDE, SIDE)


def embeddings(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, 77, WIDTH), np.float32)


def guidance(scale: float = 5.0) -> Guidance:
    return Guidance({"embeddings": embeddings(1)}, {"embeddings": embeddings(2)}, scale)


def records(
    modes: str, scale: float = 5.0, name: str = "ddim", *, engine: FakeEngine | None = None
) -> list[StepRecord]:
    scheduler = make_noise_scheduler(name, STEPS, NoiseScheduleConfig())
    latents = initial_latents(SHAPE, 3, scheduler.init_noise_sigma)
    schedule = CacheSchedule.from_string(modes)
    engine = engine or FakeEngine()
    return list(denoise(engine, scheduler, schedule, latents, guidance(scale), reuse_table()))


@pytest.mark.parametrize("scale", [1.0, 5.0, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_an_all_full_plan_equals_an_uncached_loop_of_diffusers(
    name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, given = FakeEngine(), guidance(scale)
    fresh, told = noises(SHAPE, 4), noises(SHAPE, 4)
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda *_, **__: torch.from_numpy(next(told))
    )

    def network(latents: NDArray[Any], timestep: float, which: NDArray[Any]) -> NDArray[Any]:
        t = np.array([timestep], np.float32)
        inputs = {"latents": latents, "timestep": t, "embeddings": which}
        return engine.run("denoise", inputs)["noise_pred"]

    kind, options = DIFFUSERS[name]
    theirs = kind(**SCHEDULE, **options)
    theirs.set_timesteps(STEPS)
    ours = make_noise_scheduler(name, STEPS, NoiseScheduleConfig())
    start = initial_latents(SHAPE, 3, ours.init_noise_sigma)
    latents = torch.from_numpy(start)
    expected = []
    for timestep in theirs.timesteps:
        seen = theirs.scale_model_input(latents, timestep).numpy().astype(np.float32)
        negative = network(seen, float(timestep), embeddings(2))
        prompt = network(seen, float(timestep), embeddings(1))
        guided = negative + scale * (prompt - negative)
        latents = theirs.step(torch.from_numpy(guided), timestep, latents).prev_sample
        expected.append(latents.numpy())

    schedule = CacheSchedule.all_full(len(ours.timesteps))
    found = [r.latents for r in denoise(FakeEngine(), ours, schedule, start, given, noise=fresh)]
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * max(1, np.abs(other).max()))


def test_a_noise_scheduler_that_adds_noise_is_to_be_given_some() -> None:
    scheduler = make_noise_scheduler("lcm", 4, NoiseScheduleConfig())
    schedule = CacheSchedule.all_full(4)
    with pytest.raises(ScheduleError) as caught:
        denoise(FakeEngine(), scheduler, schedule, initial_latents(SHAPE, 3, 1.0), guidance())
    assert str(caught.value) == "lcm adds noise after its steps: give it some"


def test_an_all_full_plan_without_a_table_equals_the_uncached_loop_bit_for_bit() -> None:
    scheduler = make_noise_scheduler("pndm", STEPS, NoiseScheduleConfig())
    latents = start = initial_latents(SHAPE, 3, scheduler.init_noise_sigma)
    engine, history = FakeEngine(), ()
    for step in range(len(scheduler.timesteps)):
        seen = {
            "latents": scheduler.model_input(latents, step),
            "timestep": scheduler.timesteps[step : step + 1],
        }
        negative = engine.run("denoise", {**seen, "embeddings": embeddings(2)})["noise_pred"]
        prompt = engine.run("denoise", {**seen, "embeddings": embeddings(1)})["noise_pred"]
        guided = negative + np.float32(5.0) * (prompt - negative)
        latents, history = scheduler.advance(latents, guided, step, history)
    schedule = CacheSchedule.all_full(len(scheduler.timesteps))
    *_, last = denoise(FakeEngine(), scheduler, schedule, start, guidance())
    assert np.array_equal(last.latents, latents)
    assert last.latents.dtype == np.float32


def test_each_branch_forecasts_its_own_feature_and_both_share_the_correction() -> None:
    table = reuse_table()
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    latents = initial_latents(SHAPE, 3, 1.0)
    engine, history = FakeEngine(), ()
    features, line = {1: Forecast(), 2: Forecast()}, Forecast()
    modes, anchor = "FSSFSFFSSS", 0
    for step, mode in enumerate(modes):
        predictions = []
        for which in (2, 1):
            inputs = {
                "latents": latents,
                "timestep": scheduler.timesteps[step : step + 1],
                "embeddings": embeddings(which),
            }
            if mode == "F":
                outputs = engine.run("denoise", inputs)
                anchor = step
                features[which] = features[which].after(step, outputs["cached_feature"])
            else:
                gap = step - anchor
                inputs["cached_feature"] = features[which].at(step, table.feature_weight)
                inputs |= table.correction(anchor, anchor + gap).inputs()
                outputs = engine.run("denoise_shallow", inputs)
            predictions.append(outputs["noise_pred"])
        guided = predictions[0] + np.float32(5.0) * (predictions[1] - predictions[0])
        if mode == "F" and step:
            guided += SHARE * (line.at(step, table.skip_weight) - guided)
        line = line.after(step, guided, in_part=mode == "S")
        latents, history = scheduler.advance(latents, guided, step, history)
    found = records(modes)
    assert np.array_equal(found[-1].latents, latents)
    assert [r.step for r in found] == list(range(10))
    assert [r.mode for r in found] == list(CacheSchedule.from_string(modes).modes)
    assert [r.timestep for r in found] == scheduler.timesteps.tolist()
    assert all(r.elapsed_ms >= 0 for r in found)


def test_a_full_step_calls_the_network_twice_and_scale_1_only_once() -> None:
    guided, unguided = FakeEngine(), FakeEngine()
    records("FSKFFFFFFF", engine=guided)
    records("FSKFFFFFFF", scale=1.0, engine=unguided)
    assert guided.calls[:6] == ["denoise"] * 2 + ["denoise_shallow"] * 2 + ["denoise"] * 2
    assert unguided.calls[:3] == ["denoise", "denoise_shallow", "denoise"]
    assert len(unguided.calls) == 9


def full_by_hand(
    scheduler: NoiseScheduler, latents: NDArray[Any], step: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The negative's and the prompt's predictions of the full graph."""
    seen = {"latents": latents, "timestep": scheduler.timesteps[step : step + 1]}
    negative, prompt = (
        FakeEngine().run("denoise", {**seen, "embeddings": embeddings(s)})["noise_pred"]
        for s in (2, 1)
    )
    return negative, prompt


@pytest.mark.parametrize(("letter", "runs"), [("D", 2), ("Q", 4)])
def test_a_step_that_is_full_several_times_takes_the_mean_of_latents_moved_apart(
    letter: str, runs: int
) -> None:
    class Listening(FakeEngine):
        given: list[dict[str, Any]]

        def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            self.given.append(dict(inputs))
            return super().run(graph, inputs)

    engine, table = Listening(), reuse_table()
    engine.given = []
    found = records(f"F{letter}S" + "F" * 7, engine=engine)
    assert engine.calls[2:] == ["denoise"] * 2 * runs + ["denoise_shallow"] * 2 + ["denoise"] * 14
    np.testing.assert_array_equal(*(
        [inputs["latents"] for inputs in engine.given[first : first + runs]]
        for first in (2, 2 + runs)
    ))  # fmt: skip
    seen, moved = found[0].latents, {}
    for which, first in ((2, 2), (1, 2 + runs)):
        given = engine.given[first : first + runs]
        for inputs in given:
            np.testing.assert_array_equal(inputs["embeddings"], embeddings(which))
        apart = np.array([inputs["latents"] - seen for inputs in given])
        np.testing.assert_allclose(np.abs(apart), 0.02, rtol=1e-3)
        np.testing.assert_allclose(apart[::2] + apart[1::2], 0, atol=1e-6)
        assert np.unique(np.sign(apart), axis=0).shape[0] == runs
        moved[which] = [FakeEngine().run("denoise", inputs) for inputs in given]
    means = {
        name: [np.mean([outputs[name] for outputs in moved[which]], axis=0) for which in (2, 1)]
        for name in ("noise_pred", "cached_feature")
    }
    negative, prompt = full_by_hand(make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig()),
                                    initial_latents(SHAPE, 3, 1.0), 0)  # fmt: skip
    guided, (low, high) = negative + 5 * (prompt - negative), means["noise_pred"]
    expected = 0.75 * (low + 5 * (high - low)) + 0.25 * guided
    np.testing.assert_allclose(predictions(found)[1], expected, rtol=1e-3, atol=1e-4)
    line = Forecast().after(0, FakeEngine().run("denoise", engine.given[0])["cached_feature"])
    line = line.after(1, means["cached_feature"][0])
    reused = engine.given[2 + 2 * runs]["cached_feature"]
    np.testing.assert_allclose(reused, line.at(2, table.feature_weight), rtol=1e-4, atol=1e-5)


def test_how_latents_are_moved_depends_on_the_step_and_more_runs_begin_with_those_of_fewer() -> (
    None
):
    latents = initial_latents(SHAPE, 3, 1.0)
    two, other, four = (
        np.array([*moved_apart(latents, *given)]) for given in ((3, 2), (4, 2), (3, 4))
    )
    np.testing.assert_array_equal(four[:2], two)
    assert not np.array_equal(other, two)
    (alone,) = moved_apart(latents, 3, 1)
    np.testing.assert_array_equal(alone, latents)


WEIGHTS = np.full((STEPS, 3, 4), 0.75, np.float32)
SHARE = np.float32(0.25)


def test_a_skip_step_runs_nothing_and_goes_on_as_far_as_the_table_says() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    engine = FakeEngine()
    found = records("FFKK" + "F" * 6, engine=engine)
    assert len(engine.calls) == 2 * 8
    latents, line, history = initial_latents(SHAPE, 3, 1.0), Forecast(), ()
    for step in range(4):
        if step < 2:
            negative, prompt = full_by_hand(scheduler, latents, step)
            guided = negative + np.float32(5.0) * (prompt - negative)
            guided += SHARE * (line.at(step) - guided) if step else 0
            line = line.after(step, guided)
        else:
            guided = line.at(step, WEIGHTS).astype(np.float32)
        latents, history = scheduler.advance(latents, guided, step, history)
        np.testing.assert_allclose(found[step].latents, latents, rtol=1e-5, atol=1e-6)
    assert [found[2].mode, found[3].mode] == [Mode.SKIP] * 2
    assert found[3].latents.dtype == np.float32


def predictions(found: list[StepRecord]) -> list[NDArray[Any]]:
    """The guided prediction of every step, told by where DDIM's update, which is linear, led."""
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    latents, predicted = initial_latents(SHAPE, 3, 1.0), []
    for record in found:
        zero, one = (
            scheduler.advance(latents, np.full_like(latents, value), record.step, ())[0]
            for value in (0, 1)
        )
        predicted.append((record.latents - zero) / (one - zero))
        latents = record.latents
    return predicted


@pytest.mark.parametrize(
    ("modes", "points"), [("FFSK", (1, 2)), ("FSFK", (0, 2)), ("FSsFK", (0, 3))]
)
def test_what_a_shallow_step_computed_is_not_gone_on_from(
    modes: str, points: tuple[int, ...]
) -> None:
    predicted = predictions(records(modes + "F" * (STEPS - len(modes))))
    line, skipped = Forecast(), len(modes) - 1
    for step in points:
        line = line.after(step, predicted[step])
    expected = line.at(skipped, reuse_table().skip_weight)
    np.testing.assert_allclose(predicted[skipped], expected, rtol=1e-3, atol=1e-4)


def test_nor_is_what_the_negative_prompt_changed_in_one() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    found = records("FSFf" + "F" * 6)
    seen = [initial_latents(SHAPE, 3, 1.0), *(record.latents for record in found)]
    line, guesses, predicted = Forecast(), Forecast(), predictions(found)
    for step in (0, 2):
        negative, prompt = full_by_hand(scheduler, seen[step], step)
        line = line.after(step, prompt - negative)
        guesses = guesses.after(step, predicted[step])
    _, prompt = full_by_hand(scheduler, seen[3], 3)
    guided = prompt + 4 * line.at(3, reuse_table().unguided_weight)
    guided += SHARE * (guesses.at(3, reuse_table().skip_weight) - guided)
    np.testing.assert_allclose(predicted[3], guided, rtol=1e-3, atol=1e-4)


def test_after_a_step_that_was_not_computed_a_full_one_takes_nothing_from_forecasts() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    found = records("FFKF" + "F" * 6)
    negative, prompt = full_by_hand(scheduler, found[2].latents, 3)
    guided = negative + np.float32(5.0) * (prompt - negative)
    latents, _ = scheduler.advance(found[2].latents, guided, 3, ())
    np.testing.assert_allclose(found[3].latents, latents, rtol=1e-5, atol=1e-6)


def test_an_unguided_step_runs_for_the_prompt_alone_and_forecasts_the_difference() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    engine = FakeEngine()
    found = records("FFfs" + "F" * 6, engine=engine)
    assert engine.calls[4:6] == ["denoise", "denoise_shallow"]
    latents, line, history = initial_latents(SHAPE, 3, 1.0), Forecast(), ()
    guesses = Forecast()
    for step in range(3):
        negative, prompt = full_by_hand(scheduler, latents, step)
        difference = prompt - negative
        if step < 2:
            line = line.after(step, difference)
        else:
            difference = line.at(step, WEIGHTS / 1.5)
        guided = (prompt + 4 * difference).astype(np.float32)
        guided += SHARE * (guesses.at(step, WEIGHTS) - guided) if step else 0
        guesses = guesses.after(step, guided)
        latents, history = scheduler.advance(latents, guided, step, history)
        np.testing.assert_allclose(found[step].latents, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measured", [False, True])
def test_a_skip_step_beyond_what_was_measured_takes_the_last_prediction(measured: bool) -> None:
    nothing = np.zeros((STEPS, 1))
    weight = np.zeros((STEPS, 2, 1), np.float32)
    table = replace(reuse_table(), skip=nothing, skip_weight=weight)
    table = replace(table, forecast_share=np.zeros_like(table.forecast_share))
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    start = initial_latents(SHAPE, 3, 1.0)
    schedule = CacheSchedule.from_string("FFK" + "F" * 7)
    given = (start, guidance(), table if measured else None)
    found = list(denoise(FakeEngine(), scheduler, schedule, *given))
    negative, prompt = full_by_hand(scheduler, found[0].latents, 1)
    guided = negative + np.float32(5.0) * (prompt - negative)
    latents, _ = scheduler.advance(found[1].latents, guided, 2, ())
    np.testing.assert_allclose(found[2].latents, latents, rtol=1e-5, atol=1e-6)


def test_without_guidance_an_unguided_step_is_like_any_other() -> None:
    guided, unguided = records("FSFSFSFSFS", scale=1.0), records("FsfsfsFsfs", scale=1.0)
    assert np.array_equal(guided[-1].latents, unguided[-1].latents)


def test_the_loop_runs_only_as_far_as_it_is_asked() -> None:
    engine = FakeEngine()
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    latents = initial_latents(SHAPE, 3, 1.0)
    loop: Iterator[StepRecord] = denoise(
        engine, scheduler, CacheSchedule.all_full(STEPS), latents, guidance()
    )
    assert engine.calls == []
    next(loop)
    assert engine.calls == ["denoise"] * 2


def test_a_schedule_of_another_length_is_refused_before_anything_runs() -> None:
    scheduler = make_noise_scheduler("pndm", STEPS, NoiseScheduleConfig())
    latents = initial_latents(SHAPE, 3, 1.0)
    with pytest.raises(ScheduleError) as caught:
        denoise(FakeEngine(), scheduler, CacheSchedule.all_full(10), latents, guidance())
    assert str(caught.value) == (
        "the cache schedule has 10 steps, but pndm at 10 steps evaluates the denoiser 11 times: "
        "give 11 modes"
    )


def test_shallow_steps_without_a_table_are_refused() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    latents = initial_latents(SHAPE, 3, 1.0)
    schedule = CacheSchedule.from_string("FFSFFFFFFF")
    with pytest.raises(ScheduleError) as caught:
        denoise(FakeEngine(), scheduler, schedule, latents, guidance())
    assert str(caught.value) == (
        "step 2 is shallow and needs a correction, but no reuse table was given: give the "
        "bundle's, or a schedule without shallow steps"
    )


def test_shares_that_are_given_are_those_of_every_step_that_runs_a_graph() -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    start, schedule = initial_latents(SHAPE, 3, 1.0), CacheSchedule.from_string("FSFf" + "F" * 6)
    given = (scheduler, schedule, start, guidance(), reuse_table())
    shares = np.zeros(STEPS, np.float32)
    none = list(denoise(FakeEngine(), *given, shares=shares))
    for step in (1, 2, 3):
        shares = np.zeros(STEPS, np.float32)
        shares[step] = 0.5
        found = predictions(list(denoise(FakeEngine(), *given, shares=shares)))
        alone, line = predictions(none), Forecast()
        for before in range(step):
            assert np.array_equal(found[before], alone[before])
            line = line.after(before, alone[before], in_part=before == 1)
        expected = 0.5 * alone[step] + 0.5 * line.at(step, reuse_table().skip_weight)
        np.testing.assert_allclose(found[step], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "shares", [np.zeros(STEPS - 1), np.zeros(0), np.full(STEPS, 0.5), 1.5 * np.arange(STEPS)]
)
def test_shares_of_other_steps_or_of_the_first_or_above_1_are_refused(shares: NDArray[Any]) -> None:
    scheduler = make_noise_scheduler("ddim", STEPS, NoiseScheduleConfig())
    schedule, latents = CacheSchedule.all_full(STEPS), initial_latents(SHAPE, 3, 1.0)
    with pytest.raises(ScheduleError) as caught:
        denoise(FakeEngine(), scheduler, schedule, latents, guidance(), shares=shares)
    assert str(caught.value) == (
        f"the shares of forecasts, of shape {shares.shape}, must be (10,), 0 to 1, the first 0"
    )


def test_a_gap_beyond_the_table_is_refused() -> None:
    assert MAX_GAP == 3
    with pytest.raises(ScheduleError) as caught:
        records("FSSSSFFFFF")
    assert str(caught.value) == (
        "step 4 reuses step 0, a gap of 4, but the reuse table goes up to 3: make a step between "
        "them full, or calibrate with a larger max_gap"
    )


def test_a_table_of_other_timesteps_is_refused() -> None:
    with pytest.raises(ScheduleError) as caught:
        records("F" * 11, name="pndm")
    assert str(caught.value) == (
        "the reuse table was measured on ddim at 10 steps: its corrections do not fit pndm at 10 "
        "steps"
    )


def test_guidance_needs_a_negative_prompt_unless_its_scale_is_1() -> None:
    told = {"embeddings": embeddings(1)}
    assert Guidance(told, None, 1.0).branches == (told,)
    with pytest.raises(ScheduleError) as caught:
        Guidance(told, None, 7.5)
    assert str(caught.value) == (
        "guidance scale 7.5 needs the embeddings of a negative prompt (of the empty one, if "
        "there is none); only scale 1 goes without"
    )
    with pytest.raises(ScheduleError) as caught:
        Guidance(told, told, float("nan"))
    assert str(caught.value) == "guidance scale is nan: it must be a finite number"
