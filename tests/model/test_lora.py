import pytest
import torch
from safetensors.torch import save_file

from cq_edge.errors import ModelError
from cq_edge.model.load import load_pipeline
from cq_edge.model.lora import Lora
from tests.tiny_pipeline import save_tiny_pipeline

_UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_TEXT = "encoder.layers.0.self_attn.out_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("lora") / "tiny")


def _layer(pipeline, seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    weight = pipeline.unet.get_submodule(_UNET).weight
    down = 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
    return down, 0.1 * torch.randn(weight.shape[0], rank, generator=generator)


def _weight(pipeline, name=_UNET, part="unet"):
    return getattr(pipeline, part).get_submodule(name).weight


def test_loras_are_added_with_their_weights_one_after_the_other(folder, tmp_path):
    plain = load_pipeline(folder)
    delta = torch.zeros_like(_weight(plain))
    loras = []
    for seed, factor in ((1, 0.5), (2, -2.0)):
        down, up = _layer(plain, seed)
        path = tmp_path / f"{seed}.safetensors"
        save_file({f"unet.{_UNET}.lora_A.weight": down, f"unet.{_UNET}.lora_B.weight": up}, path)
        delta += factor * up @ down
        loras.append(Lora(path, factor))
    fused = load_pipeline(folder, loras=loras)
    torch.testing.assert_close(_weight(fused), _weight(plain) + delta)
    # nothing of peft is left: what is exported are plain layers, by the same names
    assert fused.unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert {type(m) for m in fused.unet.modules()} == {type(m) for m in plain.unet.modules()}
    with torch.no_grad():
        delta_elsewhere = _weight(fused, _UNET.replace("to_q", "to_k"))
    assert torch.equal(delta_elsewhere, _weight(plain, _UNET.replace("to_q", "to_k")))


def test_loras_of_kohyas_scripts_are_scaled_by_their_alpha(folder, tmp_path):
    plain = load_pipeline(folder)
    down, up = _layer(plain)
    text_down, text_up = 0.1 * torch.randn(2, 32), 0.1 * torch.randn(32, 2)
    unet = f"lora_unet_{_UNET.replace('.', '_')}"
    text = f"lora_te_text_model_{_TEXT.replace('.', '_')}"
    weights = {}
    for name, first, second in ((unet, down, up), (text, text_down, text_up)):
        weights |= {
            f"{name}.lora_down.weight": first,
            f"{name}.lora_up.weight": second,
            f"{name}.alpha": torch.tensor(1.0),  # of rank 2: half
        }
    save_file(weights, tmp_path / "kohya.safetensors")
    fused = load_pipeline(folder, loras=[Lora(tmp_path / "kohya.safetensors")])
    torch.testing.assert_close(_weight(fused), _weight(plain) + 0.5 * up @ down)
    torch.testing.assert_close(
        _weight(fused, _TEXT, "text_encoder"),
        _weight(plain, _TEXT, "text_encoder") + 0.5 * text_up @ text_down,
    )


def _refusal(folder, path, weights):
    save_file(weights, path)
    with pytest.raises(ModelError) as caught:
        load_pipeline(folder, loras=[Lora(path)])
    return str(caught.value)


def test_a_lora_of_another_model_is_refused(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    down, up = _layer(load_pipeline(folder))
    misnamed = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    assert _refusal(
        folder,
        path,
        {
            f"{misnamed}.lora_A.weight": down,
            f"{misnamed}.lora_B.weight": up,
            f"unet.{_UNET}.lora_A.weight": down.clone(),
            f"unet.{_UNET}.lora_B.weight": up.clone(),
        },
    ) == (
        f"{path} does not fit this model: 1 of its 2 layers are none of the model's; a LoRA fits "
        "the kind of model that it was trained on"
    )


def test_a_lora_that_matches_no_layer_is_refused(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    down, up = _layer(load_pipeline(folder))
    message = _refusal(
        folder, path, {"unet.nowhere.lora_A.weight": down, "unet.nowhere.lora_B.weight": up}
    )
    assert message.startswith(f"{path} does not fit this model: ")


def test_a_lora_of_other_shapes_is_refused(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    down, up = _layer(load_pipeline(folder))
    message = _refusal(
        folder,
        path,
        {f"unet.{_UNET}.lora_A.weight": down[:, :3].clone(), f"unet.{_UNET}.lora_B.weight": up},
    )
    assert message.startswith(f"{path} does not fit this model: size mismatch for ")
    assert "\n" not in message


def test_a_lora_with_a_hole_in_it_is_refused(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    down, up = _layer(load_pipeline(folder))
    down[0, 0] = torch.nan
    assert (
        _refusal(
            folder,
            path,
            {f"unet.{_UNET}.lora_A.weight": down, f"unet.{_UNET}.lora_B.weight": up},
        )
        == f"{path} is damaged: its unet.{_UNET}.lora_A.weight is not finite"
    )


def test_what_is_no_lora_is_refused(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    assert _refusal(folder, path, {"lora_unet_x.hada_w1_a": torch.zeros(1)}) == (
        f"{path} holds no LoRA weights (its first are lora_unet_x.hada_w1_a): kinds such as LoKr "
        "and LoHa cannot be added"
    )
    with pytest.raises(ModelError, match="is no file: give LoRA weights as one"):
        load_pipeline(folder, loras=[Lora(tmp_path / "nowhere.safetensors")])
    with pytest.raises(ModelError, match="is a pickle file"):
        load_pipeline(folder, loras=[Lora(tmp_path / "x.bin")])
