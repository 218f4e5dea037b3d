import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.frontier import ReuseErrors
from cq_edge.quantisation_noise import averaged_noise, noise_by_mode

OWN = np.array([1.0, 2.0, 0.5, 3.0])
INFLUENCE = np.array([0.5, -0.4, 0.3, -0.2])


def added(modes, guidance_scale=1.0):
    never = np.zeros((4, 4))
    errors = ReuseErrors(never, never, never, noise_by_mode(OWN, INFLUENCE, guidance_scale))
    return errors.parts(CacheSchedule.from_string(modes)).noise


def test_noise_of_full_steps_adds_up_by_power_but_for_what_neighbours_have_in_common():
    anew = np.sqrt(OWN) * INFLUENCE
    expected = anew @ anew + 2 * 0.26 * 0.73 * (anew[1:] @ anew[:-1])
    assert added("FFFF") == pytest.approx(expected)


def test_noise_that_goes_on_adds_up_by_amplitude_with_its_signs():
    """As drawing it many times shows: one value of noise for all that goes on with it, and the
    next full step with something in common with it."""
    alike = 0.26 * 0.73**3
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal([0, 0], [[1, alike], [alike, 1]], 200_000)
    final = drawn @ (np.sqrt(OWN[[0, 3]]) * [INFLUENCE[:3].sum(), INFLUENCE[3]])
    assert added("FKSF") == pytest.approx(np.square(final).mean(), rel=0.02)
    assert added("FKFF") < added("FFFF")


def test_shallow_steps_add_nothing_anew():
    assert added("FFSF") == added("FFKF")


def test_without_the_negative_prompt_noise_is_new_in_one_branch_of_two():
    """Guided noise is s·a - (s - 1)·b of two branches' noise."""
    anew, scale = (OWN * INFLUENCE**2)[2], 3.0
    share = 1 / (scale**2 + (scale - 1) ** 2)
    assert added("FFfF", scale) == pytest.approx(added("FFKF", scale) + share * anew)
    assert added("FFsF", scale) == added("FFKF", scale)


def test_every_mode_has_what_it_adds():
    assert set(noise_by_mode(OWN, INFLUENCE, 7.5)) == set(Mode)


@pytest.mark.parametrize(("letter", "runs"), [("D", 2), ("Q", 4)])
def test_the_mean_of_several_runs_has_less_noise_of_its_own_and_as_much_in_common(letter, runs):
    """As drawing it many times shows: runs of a step are as alike as steps at no distance."""
    alike = np.full((runs + 1, runs + 1), 0.26) + 0.74 * np.eye(runs + 1)
    alike[0, 1:] = alike[1:, 0] = 0.26 * 0.73  # the first is of the step before
    drawn = np.random.default_rng(0).multivariate_normal(np.zeros(runs + 1), alike, 400_000)
    means = [drawn[:, 1], drawn[:, 1:].mean(axis=1)]
    moved = (np.sqrt(OWN) * INFLUENCE)[2:]
    one, several = (np.square(moved[0] * drawn[:, 0] + moved[1] * mean).mean() for mean in means)
    found = added(f"FFF{letter}") - added("FFFF")
    assert found == pytest.approx(several - one, rel=0.02)


def test_averaged_noise_is_new_but_for_what_full_steps_in_a_row_forecast():
    share = np.array([0.5, 0.25, 1.0, 0.75])
    anew = OWN * INFLUENCE**2
    never = np.zeros((4, 4))
    errors = ReuseErrors(never, never, never, averaged_noise(OWN, INFLUENCE, share))
    for modes, left in (
        ("FFFF", (1, 0.25, 0.5625, 0)),
        ("FSFK", (1,) * 4),
        ("FFfF", (1, 0.25, 1, 1)),
        ("FDQS", (1, 0.25 * 0.63, 0.5625 * 0.445, 1)),
    ):
        found = errors.parts(CacheSchedule.from_string(modes)).noise
        moved = [1e-5 * (letter in "DQ") for letter in modes] @ INFLUENCE**2
        assert found == pytest.approx(anew @ left + moved, rel=1e-9)


def test_where_nothing_is_rounded_running_again_only_moves_what_a_step_gives():
    never, nothing = np.zeros((4, 4)), np.zeros(4)
    for noise in (
        noise_by_mode(nothing, INFLUENCE, 2.0), averaged_noise(nothing, INFLUENCE, nothing)
    ):  # fmt: skip
        errors = ReuseErrors(never, never, never, noise)
        assert errors.parts(CacheSchedule.from_string("FFFF")).noise == 0
        found = errors.parts(CacheSchedule.from_string("FFDQ")).noise
        assert found == pytest.approx(1e-5 * (0.3**2 + 0.2**2))


def test_averaged_noise_of_a_single_step_is_its_own():
    found = averaged_noise(OWN[:1], INFLUENCE[:1], np.zeros(1))
    assert {float(added[0, 0]) for mode, added in found.items() if mode.runs == 1} == {
        OWN[0] * INFLUENCE[0] ** 2
    }
