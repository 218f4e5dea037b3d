import math

import numpy as np
import pytest
import torch

from cq_edge.correction import fit_correction
from cq_edge.errors import CalibrationError
from cq_edge.forecast import Forecast, expected_back
from cq_edge.influence import noise_influence, reuse_influence
from cq_edge.model.capture import MAX_SKIP, MAX_UNGUIDED, RUNS, capture, steady_share
from cq_edge.model.plan_trial import final_latents
from cq_edge.model.reuse_trial import Consumers, Graphs
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

_SHAPE = (4, 4, 4)
_STEPS = 6


class _Recorder:
    """A denoiser whose feature is a channel-wise function of what it sees; the features of its
    first run are kept, in order."""

    def __init__(self, branches: int, prompts: int) -> None:
        self.features: list[np.ndarray] = []
        self.calls = branches * prompts * _STEPS

    def __call__(self, latents, timestep, embeddings):
        scale = 1 + timestep.view(1, 1, 1, 1) / 1000
        feature = torch.cat([latents * scale, latents**2], dim=1)[:, :6]
        if len(self.features) < self.calls:
            self.features.append(feature.numpy())
        one, zero = torch.ones(6), torch.zeros(6)
        none = (one, zero, torch.ones(4), torch.zeros(4))
        return _shallow(latents, timestep, embeddings, feature, *none), feature


_FLOAT = _Recorder(0, 0)


def _consumed(latents, timestep, embeddings, feature):
    """Consuming layers that are exact: nothing is left to mend once a feature is right."""
    del latents, timestep, embeddings
    return feature[:, :4]


_EXACT = Consumers(_consumed, _consumed)


def _rounded(*inputs):
    """Consuming layers that went wrong, channel by channel."""
    return _consumed(*inputs) * _WRONG_GAIN + _WRONG_BIAS


_ROUNDED = Consumers(_rounded, _consumed)
_WRONG_GAIN = torch.tensor([0.8, 1.1, 0.9, 1.3]).view(1, 4, 1, 1)
_WRONG_BIAS = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)


def _shallow(latents, timestep, embeddings, feature, gain, bias, output_gain, output_bias):
    del timestep, output_gain, output_bias
    corrected = gain.view(1, -1, 1, 1) * feature + bias.view(1, -1, 1, 1)
    return 0.1 * latents + corrected[:, :4] + embeddings.mean((1, 2)).view(-1, 1, 1, 1)


def _rounding(latents, timestep, embeddings, feature, gain, bias, output_gain, output_bias):
    """A shallow graph whose consuming layers went wrong, and take their correction."""
    plain = _shallow(latents, timestep, embeddings, feature, gain, bias, None, None)
    corrected = gain.view(1, -1, 1, 1) * feature + bias.view(1, -1, 1, 1)
    wrong = corrected[:, :4] * _WRONG_GAIN + _WRONG_BIAS
    mended = output_gain.view(1, -1, 1, 1) * wrong + output_bias.view(1, -1, 1, 1)
    return plain - corrected[:, :4] + mended


_FLOAT_GRAPHS = Graphs(_FLOAT, _shallow)


def _by_step(recorder, prompt):
    """The features of a prompt's steps, (2, 6, h, w) each: both branches."""
    start = prompt * 2 * _STEPS
    kept = recorder.features[start : start + 2 * _STEPS]
    return [np.concatenate(kept[i : i + 2]) for i in range(0, len(kept), 2)]


def _forecast(table, features, anchor, gap):
    """What a step's branches' features are taken to be, of what calibration saw before."""
    back = expected_back(anchor, gap)
    weight = table.feature_weight[anchor, back, gap]
    return features[anchor] + weight * (features[anchor] - features[anchor - back])


def _with_guided(branches, scale):
    """Both branches' features and the guided one, (3, 6, h, w)."""
    return np.concatenate([branches, branches[:1] + scale * (branches[1:] - branches[:1])])


def _prompts(count):
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(1, 77, 8, generator=generator)  # noqa: E731
    return [((make(),), (make(),)) for _ in range(count)]


def _scheduler():
    return make_noise_scheduler("ddim", _STEPS, NoiseScheduleConfig())


def _captured(shipped, exact=_FLOAT_GRAPHS, consumers=_EXACT, prompts=1, **options):
    """What calibration measures of graphs on so many prompts."""
    given = (shipped, exact, consumers, _prompts(prompts), _scheduler(), _SHAPE)
    return capture(*given, **options)


def test_errors_and_corrections_are_those_of_the_features_seen(monkeypatch):
    monkeypatch.setattr("cq_edge.forecast._STEADY", 2.2 / _STEPS)
    recorder = _Recorder(2, 3)
    table = _captured(
        Graphs(recorder, _shallow),
        prompts=3,
        max_gap=3,
    ).table
    assert table.feature_l1.shape == (_STEPS, 4)
    by_prompt = [_by_step(recorder, n) for n in range(3)]
    kept = 0
    for anchor in range(_STEPS):
        for gap in range(1, min(3, _STEPS - 1 - anchor) + 1):
            pairs = [(f[anchor], f[anchor + gap]) for f in by_prompt]
            expected = np.mean([np.abs(y - x).mean() for x, y in pairs])
            assert table.feature_l1[anchor, gap] == pytest.approx(expected, rel=1e-6)
            forecast = [(_forecast(table, f, anchor, gap), f[anchor + gap]) for f in by_prompt]
            x, y = (np.concatenate([_with_guided(p[i], 7.5) for p in forecast]) for i in (0, 1))
            x, y = (np.moveaxis(a, 1, -1).reshape(-1, 6) for a in (x, y))
            fitted = fit_correction(x, y)
            measured = table.correction(anchor, anchor + gap).cache
            if (measured.gain == 1).all():
                continue  # dropped, which the next test is about
            kept += 1
            share = min(1, 2 - gap / 2.2)  # over many steps less
            gain, bias = 1 + share * (fitted.gain - 1), share * fitted.bias
            np.testing.assert_allclose(measured.gain, gain, rtol=1e-4)
            np.testing.assert_allclose(measured.bias, bias, rtol=1e-4, atol=1e-5)
    assert kept > 5


def test_noise_prediction_errors_are_what_the_corrected_features_leave():
    recorder, scale = _Recorder(2, 3), 3.0
    calibration = _captured(
        Graphs(recorder, _shallow),
        prompts=3,
        max_gap=3,
        guidance_scale=scale,
    )
    table = calibration.table
    np.testing.assert_array_equal(table.noise_influence, noise_influence(_scheduler()))
    np.testing.assert_array_equal(table.reuse_influence, reuse_influence(_scheduler()))
    for anchor in range(_STEPS):
        for gap in range(1, min(3, _STEPS - 1 - anchor) + 1):
            correction = table.correction(anchor, anchor + gap).cache
            squares = []
            for n in range(3):
                features = _by_step(recorder, n)
                # the shallow graph adds the feature: its error is the feature's, guided
                reused = _forecast(table, features, anchor, gap)
                left = correction.apply(reused) - features[anchor + gap]
                guided = (left[0] + scale * (left[1] - left[0]))[:4]
                squares.append(np.square(guided).mean())
            assert table.noise_pred[anchor, gap] == pytest.approx(np.mean(squares), rel=1e-3)


def test_errors_are_measured_against_the_float_denoiser_and_so_is_a_full_steps_own():
    def exact(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        return noise_pred + 0.25 * torch.sign(latents), feature

    def measured(against):
        shipped, floats = (Graphs(full, _shallow) for full in (_Recorder(0, 0), against))
        return _captured(shipped, floats, prompts=2, guidance_scale=3.0, max_gap=2).table

    table, same = measured(exact), measured(_FLOAT)
    # both branches are off by the same, which guidance leaves as it is
    np.testing.assert_allclose(table.own, 0.25**2, rtol=1e-5)
    np.testing.assert_array_equal(same.own, 0)
    assert not np.array_equal(table.noise_pred[:-2, 1], same.noise_pred[:-2, 1])


def test_a_correction_that_makes_predictions_worse_is_dropped():
    def picky(*inputs):
        return _shallow(*inputs) + 5 * (inputs[4] != 1).any()

    recorder = _Recorder(2, 1)
    table = _captured(
        Graphs(recorder, picky),
        max_gap=2,
        guidance_scale=2,
    ).table
    features = _by_step(recorder, 0)
    for anchor, gap in ((0, 1), (1, 2), (4, 1)):
        correction = table.correction(anchor, anchor + gap).cache
        assert (correction.gain == 1).all()
        assert (correction.bias == 0).all()
        left = (_forecast(table, features, anchor, gap) - features[anchor + gap])[:, :4]
        expected = np.square(2 * left[1] - left[0]).mean()
        assert table.noise_pred[anchor, gap] == pytest.approx(expected, rel=1e-3)


def test_layers_that_went_wrong_are_mended_after_the_feature_is():
    recorder, scale = _Recorder(2, 2), 2.0
    table = _captured(
        Graphs(recorder, _rounding),
        prompts=2,
        consumers=_ROUNDED,
        max_gap=2,
        guidance_scale=scale,
    ).table
    by_prompt = [_by_step(recorder, n) for n in range(2)]
    wrong_gain, wrong_bias = (x.numpy().reshape(4) for x in (_WRONG_GAIN, _WRONG_BIAS))
    for anchor, gap in ((0, 1), (1, 2), (4, 1)):
        found = table.correction(anchor, anchor + gap)
        rows = []
        for features in by_prompt:
            reused = _forecast(table, features, anchor, gap)
            mended = [found.cache.apply(branch[None])[0] for branch in reused]
            outputs = [
                x[:4] * wrong_gain[:, None, None] + wrong_bias[:, None, None] for x in mended
            ]
            exact = [x[:4] for x in features[anchor + gap]]
            x, y = ([*z, z[0] + scale * (z[1] - z[0])] for z in (outputs, exact))
            rows += [(a.reshape(4, -1).T, b.reshape(4, -1).T) for a, b in zip(x, y, strict=True)]
        x, y = (np.concatenate(part) for part in zip(*rows, strict=True))
        for channel in range(4):
            design = np.stack([x[:, channel], np.ones(len(x))], axis=1).astype(np.float64)
            gain, bias = np.linalg.lstsq(design, y[:, channel].astype(np.float64))[0]
            assert found.quantisation.gain[channel] == pytest.approx(gain, rel=1e-3, abs=1e-4)
            assert found.quantisation.bias[channel] == pytest.approx(bias, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("tenth", "whole"), [(0.1, 1), (0.34, 2.04)])
def test_changes_of_features_over_many_steps_go_on_less_than_fits_best(monkeypatch, tenth, whole):
    def weights(steady):
        monkeypatch.setattr("cq_edge.forecast._STEADY", steady)
        return _captured(Graphs(_Recorder(2, 2), _shallow), prompts=2).table.feature_weight

    best, kept = weights(1.0), weights(tenth)
    for back in range(best.shape[1]):
        share = min(1, max(0, 2 - back / whole))
        np.testing.assert_allclose(kept[:, back], share * best[:, back], rtol=1e-6)
    assert (np.abs(best[:, 3:]) > 1e-3).any()
    assert not kept[:, math.ceil(2 * whole) :].any()


def test_features_that_change_ever_faster_go_on_no_further_than_a_line(monkeypatch):
    monkeypatch.setattr("cq_edge.forecast._STEADY", 1.0)

    def faster(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        return noise_pred, torch.exp(-timestep / 100) * torch.ones_like(feature)

    def slower(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        return noise_pred, torch.exp(timestep / 1000) * torch.ones_like(feature)

    for full, in_line in ((faster, True), (slower, False)):
        weights = _captured(Graphs(full, _shallow), Graphs(full, _shallow)).table.feature_weight
        for step, back, gap in ((2, 1, 1), (2, 2, 3), (3, 2, 1)):
            line = gap / back
            assert 0 < weights[step, back, gap] <= np.float32(line)
            assert (weights[step, back, gap] == np.float32(line)) == in_line


def test_forecasts_do_not_answer_to_noise_of_the_graphs_that_ship():
    def noisy(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        noise = torch.sin(1e4 * latents)
        return noise_pred + 0.3 * noise, feature + 0.3 * noise[:, [0, 1, 2, 3, 0, 1]]

    shipped, exact = (_captured(Graphs(full, _shallow)).table for full in (noisy, _FLOAT))
    assert not np.array_equal(shipped.gain, exact.gain, equal_nan=True)
    for name in ("feature_weight", "skip_weight", "unguided_weight", "skip", "unguided"):
        np.testing.assert_array_equal(getattr(shipped, name), getattr(exact, name))


def test_forecasts_go_on_as_far_as_leaves_the_least_error():
    recorder, scale = _Recorder(2, 2), 3.0
    predictions = []

    def full(latents, timestep, embeddings):
        noise_pred, feature = recorder(latents, timestep, embeddings)
        predictions.append(noise_pred.numpy())
        return noise_pred, feature

    table = _captured(Graphs(full, _shallow), prompts=2, guidance_scale=scale).table
    assert table.skip.shape == (_STEPS, MAX_SKIP + 1)
    assert table.unguided.shape == (_STEPS, MAX_UNGUIDED + 1)
    for step in range(1, _STEPS):
        for gap in range(1, min(MAX_UNGUIDED, step) + 1):
            lines = {"skip": [], "unguided": []}
            for n in range(2):
                seen = predictions[n * 2 * _STEPS : (n + 1) * 2 * _STEPS]
                pairs = list(zip(seen[::2], seen[1::2], strict=True))
                values = {
                    "skip": [u + scale * (c - u) for u, c in pairs],
                    "unguided": [(scale - 1) * (c - u) for u, c in pairs],
                }
                for name, value in values.items():
                    line, last = Forecast(), step - gap
                    for i in sorted({last - expected_back(last, gap), last}):
                        line = line.after(i, value[i])
                    lines[name].append((line, value[step]))
            for name, kept in lines.items():
                weights = getattr(table, f"{name}_weight")
                right, more, less = (
                    np.mean([np.square(x.at(step, weights + added) - y).mean() for x, y in kept])
                    for added in (0, 0.02, -0.02)
                )
                found = getattr(table, name)[step - gap, gap]
                assert found == pytest.approx(right, rel=1e-3)
                assert found <= min(more, less) * (1 + 1e-3)


def test_what_reuse_alone_errs_by_is_that_of_the_float_graphs_in_their_own_loop():
    def noisy(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        return noise_pred + 0.3 * torch.sin(1e4 * latents), feature.round(decimals=1)

    def only_without_output_correction(*inputs):
        return _shallow(*inputs) + 5 * (inputs[6] != 1).any()

    scale, given = 3.0, (Graphs(_FLOAT, only_without_output_correction), _ROUNDED, 2)
    table = _captured(Graphs(noisy, _rounding), *given, guidance_scale=scale, max_gap=3).table
    assert not (table.output_gain[:-3, 1:] == 1).all()
    recorder = _Recorder(2, 2)
    loop, prompts = Loop(recorder, _scheduler(), _SHAPE, scale), _prompts(2)
    visits = [list(loop.run(number, prompt)) for number, prompt in enumerate(prompts)]
    values = {
        "skip": [[v.noise_pred.numpy() for v in run] for run in visits],
        "unguided": [[(scale - 1) * v.difference.numpy() for v in run] for run in visits],
    }
    runs = [_by_step(recorder, n) for n in range(2)]
    for anchor in range(_STEPS):
        assert table.shallow[anchor, 0] == table.skip[anchor, 0] == table.unguided[anchor, 0] == 0
        for gap in range(1, min(3, _STEPS - 1 - anchor) + 1):
            step, back = anchor + gap, expected_back(anchor, gap)
            correction = table.correction(anchor, step).cache
            left = [correction.apply(_forecast(table, f, anchor, gap)) - f[step] for f in runs]
            guided = [np.square((x[0] + scale * (x[1] - x[0]))[:4]).mean() for x in left]
            assert table.shallow[anchor, gap] == pytest.approx(np.mean(guided), rel=1e-3)
            for name, of_runs in values.items():
                squares = []
                for value in of_runs:
                    line = Forecast()
                    for computed in sorted({anchor - back, anchor}):
                        line = line.after(computed, value[computed])
                    expected = line.at(step, getattr(table, f"{name}_weight"))
                    squares.append(np.square(expected - value[step]).mean())
                found = getattr(table, name)[anchor, gap]
                assert found == pytest.approx(np.mean(squares), rel=1e-3, abs=1e-9)


def test_final_latents_are_those_of_both_full_graphs():
    def full(latents, timestep, embeddings):
        noise_pred, feature = _FLOAT(latents, timestep, embeddings)
        return noise_pred + 0.25, feature

    found = _captured(Graphs(full, _shallow), prompts=2)
    for graph, finals in ((full, found.final_latents), (_FLOAT, found.exact_latents)):
        loop = Loop(graph, _scheduler(), _SHAPE, 7.5)
        expected = final_latents(loop, _prompts(2))
        assert len(finals) == 2
        for one, other in zip(finals, expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-6)


def test_noise_that_stays_is_told_from_noise_that_is_new():
    pattern = torch.randn(1, *_SHAPE, generator=torch.Generator().manual_seed(1))

    def shares(stays, new):
        def full(latents, timestep, embeddings):
            truth, feature = _FLOAT(latents, timestep, embeddings)
            return truth + stays * pattern + new * 2**0.5 * torch.sin(1e4 * latents), feature

        return _captured(Graphs(full, _shallow), prompts=8, guidance_scale=1.0).steady_noise

    assert shares(0.25, 0.0) == pytest.approx(1, abs=1e-3)
    assert shares(0.0, 0.25) < 0.1
    power = float(pattern.square().mean())
    assert shares(0.25, 0.25) == pytest.approx(power / (1 + power), abs=0.1)
    assert _captured(_FLOAT_GRAPHS).steady_noise == 0


def test_what_stays_is_the_correlation_of_steps_a_quarter_of_the_loop_apart():
    correlation = 0.8 ** np.abs(np.subtract.outer(range(12), range(12)))
    scale = np.linspace(1, 2, 12)
    assert steady_share(correlation * np.outer(scale, scale)) == pytest.approx(0.8**3)
    assert steady_share(-correlation) == steady_share(np.zeros((12, 12))) == 0
    assert steady_share(np.ones((1, 1))) == 0


def test_without_guidance_there_is_no_negative_prompt_to_leave_out():
    table = _captured(
        Graphs(_Recorder(0, 0), _shallow),
        guidance_scale=1.0,
    ).table
    assert table.unguided.shape == (_STEPS, 1)


def test_both_branches_run_where_there_is_guidance_and_one_where_there_is_none():
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return _Recorder(0, 0)(*inputs)

    _captured(
        Graphs(counted, _shallow),
        guidance_scale=2.0,
    )
    assert len(calls) == (RUNS - 2) * 2 * _STEPS  # two are the float denoiser's
    calls.clear()
    _captured(
        Graphs(counted, _shallow),
        guidance_scale=1.0,
    )
    assert len(calls) == (RUNS - 2) * _STEPS


def test_progress_is_told_of_every_step_of_every_run():
    told = []
    _captured(Graphs(_Recorder(0, 0), _shallow), prompts=2, on_step=lambda: told.append(None),
    )  # fmt: skip
    assert len(told) == RUNS * 2 * _STEPS


def test_the_largest_gap_is_cut_to_what_the_steps_allow():
    table = _captured(
        Graphs(_Recorder(0, 0), _shallow),
        max_gap=99,
    ).table
    assert table.max_gap == _STEPS - 1


def test_samples_carry_the_anchor_feature_of_the_guided_branch():
    recorder = _Recorder(2, 1)
    samples = _captured(
        Graphs(recorder, _shallow),
        max_gap=3,
    ).samples
    assert [s.step for s in samples] == [0, 2, 3, 5]
    for sample in samples:
        expected = _by_step(recorder, 0)[sample.step - sample.gap][-1:]
        np.testing.assert_array_equal(sample.anchor_feature, expected)


def test_a_non_finite_prediction_stops_with_the_prompt_and_step_named():
    def broken(latents, timestep, _):
        worth = float("nan") if timestep.item() < 300 else 1.0
        return worth * latents, latents

    with pytest.raises(CalibrationError) as caught:
        _captured(Graphs(broken, _shallow))
    assert str(caught.value) == "prompt 0, step 4: the denoiser gave a non-finite prediction"


def test_a_non_finite_feature_stops_with_its_channel_named():
    def broken(latents, timestep, _):
        feature = latents.clone()
        feature[:, 2, 1] = float("inf") if timestep.item() < 300 else 0.0
        return latents, feature

    with pytest.raises(CalibrationError) as caught:
        _captured(Graphs(broken, _shallow))
    assert str(caught.value) == ("prompt 0, step 4: channel 2 of the cached feature is not finite")


def test_no_prompt_is_refused():
    with pytest.raises(CalibrationError) as caught:
        capture(Graphs(_Recorder(0, 0), _shallow), _FLOAT_GRAPHS, _EXACT, [], _scheduler(), _SHAPE)
    assert str(caught.value) == "calibration needs at least one prompt"
