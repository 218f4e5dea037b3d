import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from apps.engines import ENGINES
from apps.pictures import output_paths, write_png
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import CQEdgeError
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.planner import best_with_full_steps, best_within_ms, plan_frontier
from runtime.bundle import open_bundle
from runtime.denoise import Guidance, denoise
from runtime.generate import decode_latents, encode_prompt, initial_latents
from tests.tiny_bundle import SIDE, FakeEngine, reuse_table

Generate = Callable[..., tuple[int, str, str]]
STAR = "A red star, on blue!"


def last_json(out: str) -> dict:
    assert out.endswith("}\n")
    return json.loads(out.splitlines()[-1])


def error_of(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 1
    assert out == ""
    assert err.startswith("cq-edge: error: ")
    return err.removeprefix("cq-edge: error: ").removesuffix("\n")


def shares_by_mode(_table: object, _scheduler: object, schedule: CacheSchedule) -> NDArray[Any]:
    """Stands for `plan_shares`, which has next to none for a table without noise."""
    by_mode = [0.5 if mode.is_shallow else 0.125 for mode in schedule.modes]
    return np.array([0.0, *by_mode[1:]], np.float32)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.generate.plan_shares", shares_by_mode)


@pytest.mark.usefixtures("shares")
def test_a_prompt_becomes_the_picture_that_the_runtime_makes_of_it(
    home: Path, generate: Generate
) -> None:
    code, out, _ = generate(STAR, "--seed", "7")
    assert code == 0
    assert "a-red-star-on-blue.png  seed 7" in out
    bundle, engine = open_bundle(home / "bundle"), FakeEngine()
    prompt, _ = encode_prompt(engine, bundle.tokenizers(), STAR)
    negative, _ = encode_prompt(engine, bundle.tokenizers(), "")
    scheduler = make_noise_scheduler("ddim", 10, NoiseScheduleConfig())
    table = reuse_table()
    schedule = best_with_full_steps(table.reuse_errors(), 4)
    latents = initial_latents((4, SIDE, SIDE), 7, 1.0)
    given = Guidance(prompt, negative, 5.0)
    shares = shares_by_mode(table, scheduler, schedule)
    *_, last = denoise(engine, scheduler, schedule, latents, given, table, shares=shares)
    expected = decode_latents(engine, last.latents)
    assert np.array_equal(np.asarray(Image.open("a-red-star-on-blue.png")), expected)


def test_a_bundle_that_draws_what_it_is_told_wants_a_prompt(generate: Generate) -> None:
    code, out, err = generate("--seed", "3")
    assert (code, out) == (2, "")
    assert err == "cq-edge: error: PROMPT is missing: say what to draw\n"


def test_the_same_seed_gives_the_same_file_byte_for_byte(generate: Generate) -> None:
    for name in ("one.png", "two.png"):
        assert generate(STAR, "--seed", "3", "-o", name)[0] == 0
    assert generate(STAR, "--seed", "4", "-o", "three.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert Path("one.png").read_bytes() != Path("three.png").read_bytes()


def test_the_last_line_of_json_says_what_was_made(generate: Generate) -> None:
    code, out, _ = generate(STAR, "--json", "--seed", "9", "--scheduler", "pndm", "--plan", "full")
    result = last_json(out)
    assert code == 0
    assert list(result) == [
        "images",
        "seed",
        "plan",
        "unguided",
        "repeated",
        "steps",
        "denoise_ms",
        "total_ms",
        "peak_memory_mib",
    ]
    assert result["images"] == ["a-red-star-on-blue.png"]
    assert result["seed"] == 9
    assert result["plan"] == {"full": 11, "shallow": 0, "skip": 0}
    assert result["steps"] == 10
    assert 0 < result["denoise_ms"] < result["total_ms"]


def test_a_plan_is_said_with_what_is_special_about_its_steps(generate: Generate) -> None:
    plan = ("--plan", "FFSfsKFDQF", "--scheduler", "ddim")
    code, out, _ = generate(STAR, *plan)
    assert code == 0
    said = "plan: 7 full, 2 shallow, 1 skip, 2 of them unguided, 2 of them repeated (FFSfsKFDQF)"
    assert out.splitlines()[0] == said
    _, out, _ = generate(STAR, *plan, "--json", "-o", "again.png")
    result = last_json(out)
    assert (result["unguided"], result["repeated"]) == (2, 2)


def test_a_picture_says_how_it_was_made(generate: Generate) -> None:
    generate("a «star» 星", "--negative-prompt", "blur", "--seed", "5", "-o", "star.png")
    texts = Image.open("star.png").text
    plan = best_with_full_steps(reuse_table().reuse_errors(), 4).to_string()
    assert json.loads(texts["cq-edge"]) == {
        "prompt": "a «star» 星",
        "negative_prompt": "blur",
        "seed": 5,
        "steps": 10,
        "guidance_scale": 5.0,
        "noise_scheduler": "ddim",
        "plan": plan,
        "bundle": "tiny",
        "cq_edge_version": "0.1.0",
    }
    assert texts["parameters"] == (
        "a «star» 星\nNegative prompt: blur\nSteps: 10, Sampler: ddim, CFG scale: 5, Seed: 5, "
        f"Size: 32x32, Model: tiny, Plan: {plan}"
    )


def test_image_i_of_several_is_the_single_image_of_seed_plus_i(generate: Generate) -> None:
    result = last_json(generate(STAR, "--num-images", "3", "--seed", "4", "-o", "p", "--json")[1])
    assert result["images"] == [f"p/a-red-star-on-blue-{i}.png" for i in range(3)]
    generate(STAR, "--seed", "6", "-o", "six.png")
    assert Path("six.png").read_bytes() == Path("p/a-red-star-on-blue-2.png").read_bytes()


@pytest.mark.parametrize(
    ("plan", "modes"),
    [
        ("full", "FFFFFFFFFF"),
        ("uniform:3", "FSSFSSFSSF"),
        ("full-steps:5", best_with_full_steps(reuse_table().reuse_errors(), 5).to_string()),
        ("FSSSFKSFSS", "FSSSFKSFSS"),
        ("plan.json", "FFSFSFSFSF"),
    ],
)
def test_every_form_of_a_plan_is_run(generate: Generate, plan: str, modes: str) -> None:
    Path("plan.json").write_text('{"modes": "FFSFSFSFSF"}')
    code, out, _ = generate(STAR, "--plan", plan)
    assert code == 0
    assert f"({modes})" in out
    assert json.loads(Image.open("a-red-star-on-blue.png").text["cq-edge"])["plan"] == modes


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("fast", "--plan 'fast' is none of: full; uniform:N"),
        ("uniform:x", "--plan 'uniform:x' is none of: full; uniform:N"),
        ("nowhere.json", "--plan nowhere.json cannot be read as JSON: [Errno 2] No such file"),
        ("list.json", '--plan list.json must hold an object such as {"modes": "FSSFS"}'),
    ],
)
def test_a_plan_that_is_none_is_a_usage_error(
    generate: Generate, plan: str, complaint: str
) -> None:
    Path("list.json").write_text("[]")
    code, out, err = generate(STAR, "--plan", plan)
    assert (code, out) == (2, "")
    assert err.startswith(f"cq-edge: error: {complaint}")


def test_a_sampler_without_a_table_names_those_that_have_one(generate: Generate) -> None:
    assert error_of(generate(STAR, "--scheduler", "euler")) == (
        "bundle is not calibrated for euler at 10 steps: use ddim at 10 steps, or run every step "
        "full (--plan full)"
    )
    assert generate(STAR, "--scheduler", "euler", "--steps", "4", "--plan", "full")[0] == 0


def test_a_plan_of_skips_needs_no_table(generate: Generate) -> None:
    assert generate(STAR, "--scheduler", "euler", "--steps", "4", "--plan", "FKFK")[0] == 0


def test_a_guidance_scale_of_zero_is_zero_and_of_one_runs_the_network_once_a_step(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    monkeypatch.setitem(ENGINES, "xnnpack", lambda *_: engine)
    generate(STAR, "--guidance-scale", "0", "-o", "zero.png")
    assert json.loads(Image.open("zero.png").text["cq-edge"])["guidance_scale"] == 0
    engine.calls.clear()
    generate(STAR, "--guidance-scale", "1", "--plan", "full", "-o", "one.png")
    assert engine.calls == ["encode"] + ["denoise"] * 10 + ["decode"]
    assert "encode" not in engine.loaded


def test_a_cut_prompt_is_quoted_in_a_warning(generate: Generate) -> None:
    _, _, err = generate("star " * 76 + "Ring")
    warning = "cq-edge: warning: the prompt is longer than 77 tokens; this was cut: "
    assert f'{warning}"star Ring"\n' in err
    _, _, err = generate("ring " * 75, "--negative-prompt", "x" * 5000)
    assert 'warning: the negative prompt is longer than 77 tokens; this was cut: "xxx' in err
    assert '…" (' in err


def test_a_prompt_that_no_file_could_hold_still_becomes_a_picture(generate: Generate) -> None:
    for prompt, name in [
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("\udcff star\x07", "star"),
        ("a" * 10_000, "a" * 60),
        ("🔥", "picture"),
    ]:
        result = last_json(generate(prompt, "--json", "--force", "--plan", "full")[1])
        assert result["images"] == [f"{name}.png"]
        Image.open(result["images"][0]).load()


def test_an_output_that_exists_is_kept_unless_forced(generate: Generate) -> None:
    Path("star.png").write_bytes(b"precious")
    assert error_of(generate(STAR, "-o", "star.png")) == (
        "star.png exists already: give --force to replace it"
    )
    assert Path("star.png").read_bytes() == b"precious"
    assert generate(STAR, "-o", "star.png", "--force")[0] == 0
    assert Image.open("star.png").size == (32, 32)


def test_outputs_are_checked_before_anything_runs(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(*_: object) -> FakeEngine:
        raise AssertionError("the engine was made")

    monkeypatch.setitem(ENGINES, "xnnpack", no_engine)
    Path("file").write_text("")
    Path("folder.png").mkdir()
    Path("star-1.png").write_text("")
    assert error_of(generate(STAR, "-o", "file/star.png")) == (
        f"file/star.png cannot be written: {Path.cwd() / 'file'} is no folder"
    )
    assert error_of(generate(STAR, "--num-images", "2", "-o", "star.png")) == (
        "star-1.png exists already: give --force to replace it"
    )
    code, _, err = generate(STAR, "-o", "star.jpg")
    assert code == 2
    assert err == "cq-edge: error: star.jpg would not be a PNG: name it star.png\n"


def test_encoder_denoiser_and_decoder_are_never_loaded_together(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = set()

    class Watched(FakeEngine):
        def run(self, graph, inputs):
            outputs = super().run(graph, inputs)
            together.add(frozenset(self.loaded))
            return outputs

    monkeypatch.setitem(ENGINES, "xnnpack", Watched)
    code, out, _ = generate(STAR, "--num-images", "2", "--compare-full", "--json", "-o", "out/")
    assert code == 0
    assert together == {
        frozenset({"encode"}),
        frozenset({"denoise", "denoise_shallow"}),
        frozenset({"decode"}),
    }
    assert 10 < last_json(out)["peak_memory_mib"] < 10_000


def test_a_failing_loop_leaves_no_file(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeEngine):
        def _decode(self, latents):
            raise CQEdgeError(f"no picture of {latents.shape}")

    monkeypatch.setitem(ENGINES, "xnnpack", Broken)
    code, _, err = generate(STAR, "-o", "out/star.png")
    assert code == 1
    assert err.endswith("cq-edge: error: no picture of (1, 4, 4, 4)\n")
    assert [path.name for path in Path().iterdir()] == ["bundle"]


def test_an_interrupted_loop_leaves_only_whole_files(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(FakeEngine):
        def run(self, graph, inputs):
            if self.calls.count("decode") == 1 and len(self.calls) > 30:
                raise KeyboardInterrupt
            return super().run(graph, inputs)

    monkeypatch.setitem(ENGINES, "xnnpack", Interrupted)
    code, out, _ = generate(STAR, "--num-images", "2", "-o", "star.png")
    assert (code, out) == (130, "")
    assert sorted(path.name for path in Path().iterdir()) == ["bundle", "star-0.png"]
    Image.open("star-0.png").load()


def test_latents_that_are_no_numbers_become_no_picture(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FakeEngine):
        def _denoise(self, latents, timestep, embeddings):
            outputs = super()._denoise(latents, timestep, embeddings)
            return {**outputs, "noise_pred": latents * np.float32("nan")}

    monkeypatch.setitem(ENGINES, "xnnpack", Broken)
    code, _, err = generate(STAR)
    assert code == 1
    assert err.endswith(
        "cq-edge: error: seed 0: the loop's latents are not finite numbers: the guidance scale (5) "
        "is too large, or the bundle's graphs are broken\n"
    )


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: Image.Image, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    path = tmp_path / "star.png"
    with pytest.raises(CQEdgeError) as caught:
        write_png(np.zeros((2, 2, 3), np.uint8), path, "", {})
    assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("shares")
def test_compare_full_shows_both_times_and_both_pictures(generate: Generate) -> None:
    code, out, _ = generate(STAR, "--compare-full", "-o", "star.png", "--json")
    result = last_json(out)
    assert code == 0
    assert result["images"] == ["star.png"]
    compared = result["compare_full"]
    assert compared["images"] == ["star-beside-full.png"]
    assert compared["speedup"] == pytest.approx(
        compared["denoise_ms"] / result["denoise_ms"], rel=0.01
    )
    generate(STAR, "--plan", "full", "-o", "full.png")
    beside = np.asarray(Image.open("star-beside-full.png"))
    assert beside.shape == (32, 68, 3)
    assert np.array_equal(beside[:, :32], np.asarray(Image.open("star.png")))
    assert np.array_equal(beside[:, 36:], np.asarray(Image.open("full.png")))
    code, out, _ = generate(STAR, "--compare-full", "-o", "star.png", "--force")
    assert code == 0
    assert "times as long" in out
    assert out.endswith("side by side: star-beside-full.png\n")


def test_compare_full_guards_its_own_outputs_too(generate: Generate) -> None:
    Path("star-beside-full.png").write_bytes(b"precious")
    assert error_of(generate(STAR, "--compare-full", "-o", "star.png")) == (
        "star-beside-full.png exists already: give --force to replace it"
    )


def test_the_default_number_of_full_steps_follows_the_steps(home: Path, generate: Generate) -> None:
    reuse_table("ddim", 20).save(home / "reuse_ddim_20.npz")
    from dataclasses import replace

    from cq_edge.manifest import ReuseTableEntry, write_manifest
    from tests.tiny_bundle import manifest

    tables = (*manifest().reuse_tables, ReuseTableEntry("reuse_ddim_20.npz", "ddim", 20))
    (home / "reuse_ddim_20.npz").rename(home / "bundle" / "reuse_ddim_20.npz")
    (home / "bundle" / "manifest.json").unlink()
    write_manifest(home / "bundle", replace(manifest(), reuse_tables=tables))
    result = last_json(generate(STAR, "--steps", "20", "--json")[1])
    assert result["plan"] == {"full": 8, "shallow": 12, "skip": 0}


def test_the_number_of_threads_reaches_the_engine(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def engine(_: object, threads: int | None) -> FakeEngine:
        asked.append(threads)
        return FakeEngine()

    monkeypatch.setitem(ENGINES, "xnnpack", engine)
    generate(STAR, "--threads", "3")
    generate(STAR, "-o", "again.png")
    assert asked == [3, None]


def test_names_are_distinct_whatever_the_prompts() -> None:
    def names(output: str | None, *prompts: str) -> list[str]:
        return [str(path) for path in output_paths(output and Path(output), prompts)]

    assert names(None, "A star") == ["a-star.png"]
    assert names("x/y", "A star", "a ring") == ["x/y/a-star.png", "x/y/a-ring.png"]
    assert names("x.png", "A star", "a ring") == ["x-0.png", "x-1.png"]
    assert names(None, "a star!", "a star?", "a star 0") == [
        "a-star-1.png",
        "a-star-2.png",
        "a-star-0.png",
    ]


def test_a_budget_runs_the_best_plan_that_it_allows(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"encode": 20.0, "denoise": 4000.0, "denoise_shallow": 300.0, "decode": 50.0}
    profile = DeviceProfile("xnnpack", "", times)
    monkeypatch.setattr("apps.generate.measure_graphs", lambda *_, **__: profile)
    code, out, _ = generate(STAR, "--budget-ms", "27500", "--json")
    assert code == 0
    # loading takes some of it too
    frontier = plan_frontier([reuse_table()], profile, 2, NoiseScheduleConfig())
    allowed = [best_within_ms(frontier, ms).schedule.counts for ms in range(24000, 27501, 100)]
    assert last_json(out)["plan"] in allowed
    assert frontier[-1].picture_ms > 27500
    code, out, err = generate(STAR, "--budget-ms", "9000", "-o", "late.png")
    assert code == 2
    assert "--budget-ms is 9000, of which loading, measuring and planning took " in err
    assert "no plan takes " in err
    assert not Path("late.png").exists()


def test_a_budget_pays_for_planning_and_its_picture_is_that_of_its_plan(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"encode": 20.0, "denoise": 4000.0, "denoise_shallow": 300.0, "decode": 50.0}
    profile, clock_s = DeviceProfile("xnnpack", "", times), [0.0]

    def slow(*given: Any) -> NDArray[Any]:
        clock_s[0] += 3
        return shares_by_mode(*given)

    monkeypatch.setattr("apps.generate.measure_graphs", lambda *_, **__: profile)
    monkeypatch.setattr("apps.generate.perf_counter", lambda: clock_s[0])
    monkeypatch.setattr("apps.generate.plan_shares", slow)
    frontier = plan_frontier([reuse_table()], profile, 2, NoiseScheduleConfig())
    for budget_ms, spent_s in ((27500, 6), (1e9, 3)):  # the first plan may be the one that runs
        clock_s[0] = 0.0
        assert generate(STAR, "--budget-ms", str(budget_ms), "-o", "budget.png", "--force")[0] == 0
        assert clock_s[0] == spent_s
        modes = json.loads(Image.open("budget.png").text["cq-edge"])["plan"]
        best = best_within_ms(frontier, budget_ms - 6000)
        assert modes == best.schedule.to_string()
        assert generate(STAR, "--plan", modes, "-o", "plan.png", "--force")[0] == 0
        assert Path("plan.png").read_bytes() == Path("budget.png").read_bytes()


def test_a_budget_and_a_plan_exclude_each_other(generate: Generate) -> None:
    code, _, err = generate(STAR, "--budget-ms", "900", "--plan", "full")
    assert code == 2
    assert "not allowed with argument" in err
