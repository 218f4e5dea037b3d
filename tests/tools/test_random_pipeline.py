import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.published_models import parameters
from tools.architectures import ARCHITECTURES, tiny
from tools.random_pipeline import main, write_pipeline


def _unet_weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_diffusers_draws_a_finite_picture_with_each_kind_of_pipeline(name, tmp_path):
    write_pipeline(tiny(ARCHITECTURES[name]), tmp_path)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        "a red star", num_inference_steps=2, height=128, width=128, output_type="pt"
    )

    assert pictures.images.shape == (1, 3, 128, 128)
    assert pictures.images.isfinite().all()


def test_the_same_seed_gives_the_same_float16_weights_and_another_seed_others(tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_pipeline(tiny(ARCHITECTURES["sd15"]), folder, seed=seed)
        found.append(_unet_weights(folder))
        assert {tensor.dtype for tensor in found[-1].values()} == {torch.float16}

    first, same, other = ([*weights.values()] for weights in found)
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))


def test_the_unets_have_the_published_number_of_parameters():
    millions = {name: round(parameters(name) / 1e6, 1) for name in ARCHITECTURES}

    assert millions == {"sd15": 859.5, "sd21": 865.9, "sdxl": 2567.5}


def test_the_command_replaces_a_pipeline_only_with_force(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sd15"
    command = ["random_pipeline", "sd15", str(folder), "--tiny"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    assert (
        json.loads((folder / "model_index.json").read_text())["unet"][1] == "UNet2DConditionModel"
    )

    with pytest.raises(SystemExit):
        main()
    assert "exists already: give --force to replace it" in capsys.readouterr().err

    monkeypatch.setattr("sys.argv", [*command, "--force", "--dtype", "float32"])
    assert main() == 0
    assert {tensor.dtype for tensor in _unet_weights(folder).values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["sd15"]
