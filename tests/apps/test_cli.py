import json
import subprocess
import sys
from pathlib import Path

import pytest

from apps import generate
from apps.cli import main
from cq_edge.errors import BundleError, UsageError
from runtime.bundle import Bundle


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert 'cq-edge generate demo "a large red star' in out
    assert "build" in out
    assert err == ""
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--negative-prompt", "--steps", "--guidance-scale", "--seed", "--num-images"):
        assert option in out
    for option in ("--scheduler", "--plan", "--output", "--force", "--threads", "--compare-full"):
        assert option in out
    assert "examples:" in out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "cq-edge: error: the following arguments are required: COMMAND"),
        (["paint"], "cq-edge: error: argument COMMAND: invalid choice: 'paint'"),
        (["generate"], "error: the following arguments are required: BUNDLE"),
        (["generate", "b", "p", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["generate", "b", "p", "--seed", "-1"], "argument --seed: -1 is below 0"),
        (["generate", "b", "p", "--seed", "x"], "--seed: invalid whole number value: 'x'"),
        (["generate", "b", "p", "--num-images", "0"], "argument --num-images: 0 is below 1"),
        (["evaluate", "b", "--processes", "0"], "argument --processes: 0 is below 1"),
        (["generate", "b", "p", "--scheduler", "heun"], "--scheduler: invalid choice: 'heun'"),
    ],
)
def test_wrong_usage_exits_with_2(
    capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (BundleError("x is no bundle"), 1, "cq-edge: error: x is no bundle\n"),
        (UsageError("y is wrong"), 2, "cq-edge: error: y is wrong\n"),
        (KeyboardInterrupt(), 130, "\ncq-edge: interrupted\n"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(generate, "run", fail)
    assert main(["generate", "bundle", "prompt"]) == code
    assert capsys.readouterr() == ("", sentence)


def test_a_folder_that_is_no_bundle_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["generate", str(tmp_path), "a star"]) == 1
    assert capsys.readouterr().err == (
        f"cq-edge: error: {tmp_path} is not a bundle: it has no manifest.json; `cq-edge build` "
        "makes bundles\n"
    )


def test_a_real_program_makes_the_same_file_in_every_process(
    real_bundle: Bundle, tmp_path: Path
) -> None:
    for name in ("one.png", "two.png"):
        command = [sys.executable, "-m", "apps.cli", "generate", str(real_bundle.folder), "a star"]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / name), "--json"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.stdout.count("\n") == 1
        result = json.loads(done.stdout)
        assert result["images"] == [str(tmp_path / name)]
        assert result["plan"] == {"full": 4, "shallow": 6, "skip": 0}
        assert "10/10" in done.stderr
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def modules_after(code: str) -> set[str]:
    """Returns the names of the modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    found = modules_after("from apps.cli import main; main(['--help'])")
    assert not found & {"numpy", "torch", "apps.build", "apps.generate", "runtime", "exporters"}


def test_generate_imports_neither_torch_nor_what_makes_bundles() -> None:
    found = modules_after("from apps.cli import main; main(['generate', '--help'])")
    assert "apps.generate" in found
    unwanted = {"torch", "diffusers", "transformers", "executorch", "exporters", "cq_edge.model"}
    assert not found & (unwanted | {"tokenizers", "PIL", "apps.build"})
