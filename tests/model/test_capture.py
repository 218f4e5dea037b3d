import numpy as np
import pytest
import torch

from cq_edge.correction import fit_correction
from cq_edge.errors import CalibrationError
from cq_edge.model.capture import capture
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

_SHAPE = (4, 4, 4)
_STEPS = 6


class _Recorder:
    """A denoiser whose feature is a channel-wise function of what it sees, all calls kept."""

    def __init__(self) -> None:
        self.features: list[np.ndarray] = []

    def __call__(self, latents, timestep, embeddings):
        scale = 1 + timestep.view(1, 1, 1, 1) / 1000
        feature = torch.cat([latents * scale, latents**2], dim=1)[:, :6]
        self.features.append(feature.numpy())
        return 0.1 * latents + embeddings.mean((1, 2)).view(-1, 1, 1, 1), feature


def _prompts(count):
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(1, 77, 8, generator=generator)  # noqa: E731
    return [(make(), make()) for _ in range(count)]


def _scheduler():
    return make_noise_scheduler("ddim", _STEPS, NoiseScheduleConfig())


def test_errors_and_corrections_are_those_of_the_features_seen():
    recorder = _Recorder()
    table = capture(recorder, _prompts(3), _scheduler(), _SHAPE, max_gap=3).table
    assert table.errors.shape == (_STEPS, 4)
    by_prompt = [recorder.features[n * _STEPS : (n + 1) * _STEPS] for n in range(3)]
    for anchor in range(_STEPS):
        for gap in range(1, min(3, _STEPS - 1 - anchor) + 1):
            pairs = [(f[anchor], f[anchor + gap]) for f in by_prompt]
            expected = np.mean([np.abs(y - x).mean() for x, y in pairs])
            assert table.errors[anchor, gap] == pytest.approx(expected, rel=1e-6)
            x, y = (np.concatenate([p[i] for p in pairs]) for i in (0, 1))
            x, y = (np.moveaxis(a, 1, -1).reshape(-1, 6) for a in (x, y))
            fitted = fit_correction(x, y)
            measured = table.correction(anchor, anchor + gap)
            np.testing.assert_allclose(measured.gain, fitted.gain, rtol=1e-4)
            np.testing.assert_allclose(measured.bias, fitted.bias, rtol=1e-4, atol=1e-5)


def test_both_branches_run_where_there_is_guidance_and_one_where_there_is_none():
    guided, unguided = _Recorder(), _Recorder()
    capture(guided, _prompts(1), _scheduler(), _SHAPE)
    capture(unguided, _prompts(1), _scheduler(), _SHAPE, guidance_scale=1.0)
    assert {len(f) for f in guided.features} == {2}
    assert {len(f) for f in unguided.features} == {1}


def test_the_largest_gap_is_cut_to_what_the_steps_allow():
    table = capture(_Recorder(), _prompts(1), _scheduler(), _SHAPE, max_gap=99).table
    assert table.max_gap == _STEPS - 1


def test_samples_carry_the_anchor_feature_of_the_guided_branch():
    recorder = _Recorder()
    samples = capture(recorder, _prompts(1), _scheduler(), _SHAPE, max_gap=3).samples
    assert [s.step for s in samples] == [0, 2, 3, 5]
    for sample in samples:
        expected = recorder.features[sample.step - sample.gap][-1:]
        np.testing.assert_array_equal(sample.anchor_feature, expected)


def test_a_non_finite_prediction_stops_with_the_prompt_and_step_named():
    def broken(latents, timestep, _):
        if timestep.item() < 300:
            latents = latents * float("nan")
        return latents, latents

    with pytest.raises(CalibrationError) as caught:
        capture(broken, _prompts(1), _scheduler(), _SHAPE)
    assert str(caught.value) == "prompt 0, step 4: the denoiser gave a non-finite prediction"


def test_no_prompt_is_refused():
    with pytest.raises(CalibrationError) as caught:
        capture(_Recorder(), [], _scheduler(), _SHAPE)
    assert str(caught.value) == "calibration needs at least one prompt"
