import re
from dataclasses import replace

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import BundleError, CalibrationError, OutputExistsError, UsageError
from cq_edge.quantisation_noise import averaged_noise
from cq_edge.reuse_table import ReuseTable

T, G, C = 5, 2, 3


def table():
    rng = np.random.default_rng(0)
    noise_pred, feature_l1 = rng.random((2, T, G + 1))
    gain = rng.random((T, G + 1, C)).astype(np.float32)
    bias = rng.random((T, G + 1, C)).astype(np.float32)
    output_gain, output_bias = rng.random((2, T, G + 1, 2 * C)).astype(np.float32)
    feature_l1[:, 0] = 0
    for anchor in range(T):
        for gap in range(G + 1):
            if anchor + gap >= T:
                noise_pred[anchor, gap] = feature_l1[anchor, gap] = np.nan
                for correction in (gain, bias, output_gain, output_bias):
                    correction[anchor, gap] = np.nan
    timesteps = np.linspace(900, 1, T, dtype=np.float32)
    alone = noise_pred * (np.arange(G + 1) > 0)
    skip, unguided = 2 * alone[:, :2], 3 * alone
    weights = [rng.uniform(0, 1, (T, n + 1, n)).astype(np.float32) for n in (G + 1, 2, G + 1)]
    share = np.linspace(0, 0.5, T * (G + 1), dtype=np.float32).reshape(T, G + 1)
    errors = (noise_pred, feature_l1, 0.7 * alone, skip, unguided, *weights, share)
    influences = np.linspace(-1, 2, T), np.linspace(1, 2, T)
    corrections = (gain, bias, output_gain, output_bias)
    return ReuseTable("pndm", 4, 7.5, 0.25, timesteps, *influences, *errors, *corrections)


def changed(name, index, value):
    array = getattr(table(), name).copy()
    array[index] = value
    return {name: array}


def test_a_table_survives_its_file_bit_for_bit(tmp_path):
    original = table()
    original.save(tmp_path / "reuse.npz")
    loaded = ReuseTable.load(tmp_path / "reuse.npz")
    for name in ("noise_scheduler", "steps", "guidance_scale", "base_error"):
        assert getattr(loaded, name) == getattr(original, name)
        assert type(getattr(loaded, name)) is type(getattr(original, name))
    for name in (
        "timesteps",
        "noise_influence",
        "reuse_influence",
        "noise_pred",
        "feature_l1",
        "shallow",
        "skip",
        "unguided",
        "feature_weight",
        "skip_weight",
        "unguided_weight",
        "forecast_share",
        "gain",
        "bias",
        "output_gain",
        "output_bias",
    ):
        found, expected = getattr(loaded, name), getattr(original, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_equal_tables_make_equal_files(tmp_path):
    table().save(tmp_path / "a.npz")
    table().save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_file_has_the_name_that_was_asked_for(tmp_path):
    table().save(tmp_path / "reuse.table")
    assert ReuseTable.load(tmp_path / "reuse.table").max_gap == G


def test_correction_is_the_entry_of_anchor_and_gap():
    found = table().correction(1, 3)
    np.testing.assert_array_equal(found.cache.gain, table().gain[1, 2])
    np.testing.assert_array_equal(found.cache.bias, table().bias[1, 2])
    np.testing.assert_array_equal(found.quantisation.gain, table().output_gain[1, 2])
    np.testing.assert_array_equal(found.quantisation.bias, table().output_bias[1, 2])


def test_errors_are_those_of_the_objective_asked_for():
    given = table()
    found = given.errors()
    for anchor in range(T):
        for gap in range(min(G, T - 1 - anchor) + 1):
            step = anchor + gap
            moved = np.sqrt(given.shallow[anchor, gap]) * given.reuse_influence[step]
            assert found[anchor, gap] == pytest.approx(moved)
    assert (found[:, 0] == 0).all()
    np.testing.assert_array_equal(table().errors("feature_l1"), table().feature_l1)
    message = "objective is 'l2': choose noise_pred or feature_l1"
    with pytest.raises(UsageError, match=f"^{message}$"):
        table().errors("l2")


def test_every_step_full_errs_by_its_noise_alone():
    given, every = table(), CacheSchedule.all_full(T)
    moved = np.sqrt(given.noise_pred[:, 0]) * given.noise_influence
    noise = moved @ moved + 2 * 0.26 * 0.73 * (moved[1:] @ moved[:-1])
    assert given.reuse_errors().parts(every) == (0, pytest.approx(noise))
    assert given.reuse_errors("feature_l1").total(every) == 0


def test_a_steps_own_correction_is_the_identity():
    found = table().correction(4, 4)
    for half, channels in ((found.cache, C), (found.quantisation, 2 * C)):
        np.testing.assert_array_equal(half.gain, np.ones(channels))
        np.testing.assert_array_equal(half.bias, np.zeros(channels))


@pytest.mark.parametrize(("anchor", "step"), [(0, 3), (3, 5), (-1, 0), (2, 1)])
def test_refuses_a_correction_that_was_not_measured(anchor, step):
    message = (
        f"no correction was measured for step {step} with anchor {anchor}: the table has steps "
        "0 to 4 with gaps 0 to 2"
    )
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        table().correction(anchor, step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("noise_pred", (1, 2), np.nan),
            "the reuse error (noise_pred) of step 3 with anchor 1 (gap 2) is unusable: it must be "
            "a number of 0 or more",
        ),
        (
            changed("feature_l1", (2, 1), -1),
            "the reuse error (feature_l1) of step 3 with anchor 2 (gap 1) is unusable: it must be "
            "a number of 0 or more",
        ),
        (
            changed("feature_l1", (3, 0), 1),
            "the reuse error (feature_l1) of step 3 with anchor 3 (gap 0) is unusable: a step's "
            "own must be 0",
        ),
        (
            changed("gain", (0, 2, 1), np.inf),
            "the gain of step 2 with anchor 0 (gap 2) is unusable: every channel must be finite",
        ),
        (
            changed("bias", (3, 1, 0), np.nan),
            "the bias of step 4 with anchor 3 (gap 1) is unusable: every channel must be finite",
        ),
        (
            changed("timesteps", 2, np.nan),
            "a timestep of the reuse table is not a number",
        ),
        (
            {"bias": np.ones((T, G + 1, C + 1), np.float32)},
            "timesteps (5,), noise_influence (5,), reuse_influence (5,), noise_pred (5, 3), "
            "feature_l1 (5, 3), forecast_share (5, 3), shallow (5, 3), skip (5, 2), "
            "unguided (5, 3), "
            "feature_weight (5, 4, 3), skip_weight (5, 3, 2), unguided_weight (5, 4, 3), "
            "gain (5, 3, 3), bias (5, 3, 4), "
            "output_gain (5, 3, 6), output_bias (5, 3, 6) of a reuse table do not belong "
            "together: they must be (T,) three times, (T, G+1) four times, (T, R+1), (T, U+1), "
            "(T, G+2, G+1), (T, R+2, R+1), (T, U+2, U+1), (T, G+1, C) twice, and "
            "(T, G+1, 2C') twice",
        ),
        (
            changed("skip_weight", (1, 1, 1), np.inf),
            "skip_weight of a reuse table must hold numbers alone",
        ),
        (
            changed("forecast_share", (2, 1), 1.5),
            "forecast_share of a reuse table must lie in 0 to 1",
        ),
        (
            changed("forecast_share", (2, 1), np.nan),
            "forecast_share of a reuse table must lie in 0 to 1",
        ),
        (
            changed("skip", (1, 1), -1.0),
            "the reuse error (skip) of step 2 with anchor 1 (gap 1) is unusable: it must be a "
            "number of 0 or more",
        ),
        (
            {"noise_pred": np.zeros((T, G + 1), np.float32)},
            "noise_pred of a reuse table is float32 of shape (5, 3): it must be float64 with 2 "
            "dimensions, none empty",
        ),
        (
            changed("reuse_influence", 3, -1.0),
            "reuse_influence of step 3 in the reuse table is unusable: it must be a number, of "
            "reuse_influence 0 or more",
        ),
        (
            {"base_error": -0.5},
            "base_error of a reuse table is -0.5: it must be 0 or more",
        ),
        ({"steps": 0}, "steps of a reuse table is 0: it must be 1 or more"),
        ({"noise_scheduler": ""}, "noise_scheduler of a reuse table is empty: name it"),
        (
            {"guidance_scale": float("nan")},
            "guidance_scale of a reuse table is nan: it must be a number",
        ),
    ],
)
def test_says_which_entry_is_wrong(change, message):
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        replace(table(), **change)


def test_saving_overwrites_nothing(tmp_path):
    path = tmp_path / "reuse.npz"
    path.write_bytes(b"mine")
    message = f"{path} exists: delete it, or write elsewhere"
    with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
        table().save(path)
    assert path.read_bytes() == b"mine"


def saved(path, **change):
    table().save(path)
    with np.load(path) as archive:
        content = {**archive, **change}
    path.unlink()
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


def test_a_missing_file_is_missing(tmp_path):
    path = tmp_path / "reuse.npz"
    message = f"{path} is missing: copy or build the bundle again"
    with pytest.raises(BundleError, match=f"^{re.escape(message)}$"):
        ReuseTable.load(path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense", b"\x93NUMPY"])
def test_a_file_of_something_else_is_no_reuse_table(tmp_path, content):
    path = tmp_path / "reuse.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"^{re.escape(str(path))} is not a reuse table: "):
        ReuseTable.load(path)


def test_a_damaged_file_is_no_reuse_table_wherever_the_damage_is(tmp_path):
    path = tmp_path / "reuse.npz"
    table().save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position])
        with pytest.raises(BundleError):
            ReuseTable.load(path)
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            ReuseTable.load(path)  # a flipped bit that nothing reads, e.g. a time stamp
        except BundleError:
            continue


def test_a_bare_array_is_no_reuse_table(tmp_path):
    path = tmp_path / "reuse.npz"
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    message = f"{path} is not a reuse table: it holds one bare array"
    with pytest.raises(BundleError, match=f"^{re.escape(message)}$"):
        ReuseTable.load(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"gain": None}, "it lacks gain"),
        ({"extra": np.zeros(1)}, "it has the unknown key extra"),
        ({"steps": np.zeros(2)}, "steps is not a single int"),
        ({"noise_scheduler": np.array(3)}, "noise_scheduler is not a single str"),
        (
            {"feature_l1": np.full((T, G + 1), np.nan)},
            "the reuse error (feature_l1) of step 0 with anchor 0 (gap 0) is unusable: it must be "
            "a number of 0 or more",
        ),
    ],
)
def test_an_archive_of_other_content_is_no_reuse_table(tmp_path, change, fault):
    path = tmp_path / "reuse.npz"
    saved(path, **change)
    message = f"{path} is not a reuse table: {fault}"
    with pytest.raises(BundleError, match=f"^{re.escape(message)}$"):
        ReuseTable.load(path)


class Detonator:
    def __reduce__(self):
        return (pytest.fail, ("pickle was run",))


def test_pickle_is_never_run(tmp_path):
    path = tmp_path / "reuse.npz"
    saved(path, noise_scheduler=np.array([Detonator()], dtype=object))
    with pytest.raises(BundleError, match="is not a reuse table: Object arrays cannot be loaded"):
        ReuseTable.load(path)


def test_full_steps_after_a_computed_one_have_a_share_of_forecasts_as_measured():
    share = table().forecast_share
    found = table().shares_in(CacheSchedule.from_string("FFSFK"))
    np.testing.assert_array_equal(found, [0, share[0, 0], 0, share[1, 1], 0])
    found = table().shares_in(CacheSchedule.from_string("FKFfs"))
    np.testing.assert_array_equal(found, [0, 0, 0, share[2, 0], 0])
    found = table().shares_in(CacheSchedule.from_string("FFfsF"))
    np.testing.assert_array_equal(found, [0, share[0, 0], share[1, 0], 0, share[2, 1]])
    beyond = table().shares_in(CacheSchedule.from_string("FSSSF"))
    np.testing.assert_array_equal(beyond, 0)


@pytest.mark.parametrize(("cache", "quantisation"), [(True, True), (True, False), (False, True)])
def test_a_half_of_the_corrections_can_be_left_out(cache, quantisation):
    bare = table().without_corrections(cache=cache, quantisation=quantisation)
    for gain, bias, is_out in (
        ("gain", "bias", cache),
        ("output_gain", "output_bias", quantisation),
    ):
        for name, neutral in ((gain, 1), (bias, 0)):
            expected = np.full(1, neutral) if is_out else getattr(table(), name)
            found = getattr(bare, name)
            np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))
    assert (bare.feature_weight == 0).all() == cache
    assert (bare.forecast_share == 0).all() == quantisation
    for name in ("noise_pred", "skip_weight", "unguided_weight"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(table(), name))


def test_a_share_of_reuse_counts_as_noise_more_without_the_negative_prompt_and_at_the_last_step():
    across, whole = table().reuse_errors().across, table().noise_influence ** 2
    for mode in Mode:
        shares = across[mode] * table().reuse_influence ** 2 / np.where(whole, whole, 1)
        np.testing.assert_allclose(shares[:-1], 1 if mode.is_unguided else 0.3)
        assert shares[-1] == pytest.approx(4)
    assert table().reuse_errors("feature_l1").across == {}


def test_plans_are_searched_with_noise_that_goes_on_and_with_noise_that_is_averaged_away():
    given = table()
    goes_on, averaged = given.errors_to_search()
    for name in ("shallow", "skip", "unguided", "across", "noise"):
        first, second = getattr(goes_on, name), getattr(averaged, name)
        np.testing.assert_equal(first, getattr(given.reuse_errors().once(), name))
        if name != "noise":
            np.testing.assert_equal(second, first)
    share = given.forecast_share[:, 0]
    noise = averaged_noise(given.own, given.noise_influence, share)
    np.testing.assert_equal(averaged.noise, noise)
    (papers,) = given.errors_to_search("feature_l1")
    np.testing.assert_array_equal(papers.shallow, given.feature_l1)


def test_only_our_objective_knows_what_forecasts_cost():
    ours, papers = table().reuse_errors(), table().reuse_errors("feature_l1")
    for name in ("shallow", "skip", "unguided"):
        for anchor, gap in ((0, 1), (2, 1)):
            alone = getattr(table(), name)[anchor, gap]
            moved = np.sqrt(alone) * table().reuse_influence[anchor + gap]
            assert getattr(ours, name)[anchor, gap] == pytest.approx(moved)
    assert (ours.unguided[:, 0] == 0).all()
    assert set(ours.noise) == set(Mode)
    assert not papers.noise
    assert ours.unguided.shape == table().unguided.shape
    np.testing.assert_array_equal(papers.shallow, table().feature_l1)
    assert papers.skip.shape == papers.unguided.shape == (T, 1)
