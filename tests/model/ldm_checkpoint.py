"""A pipeline's weights under the names of the original Stable Diffusion code, to be read back."""

import re

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def ldm_weights(pipeline) -> dict[str, Tensor]:
    """Returns the checkpoint of a pipeline of Stable Diffusion 1.x, 2.x (its text encoder's
    activation is gelu) or SDXL."""
    weights = {f"model.diffusion_model.{k}": v for k, v in unet_weights(pipeline.unet).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in vae_weights(pipeline.vae).items()}
    text = pipeline.text_encoder
    if hasattr(pipeline, "text_encoder_2"):
        second = pipeline.text_encoder_2
        weights |= _clip(text, "conditioner.embedders.0.transformer.text_model.")
        weights |= _open_clip(second.text_model, "conditioner.embedders.1.model.")
        projection = second.text_projection.weight.T
        weights["conditioner.embedders.1.model.text_projection"] = projection
    elif text.config.hidden_act == "gelu":
        weights |= _open_clip(text, "cond_stage_model.model.")
    else:
        weights |= _clip(text, "cond_stage_model.transformer.text_model.")
    return {key: weight.detach().contiguous() for key, weight in weights.items()}


def unet_weights(unet) -> dict[str, Tensor]:
    places = dict(_TOP)
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for j, place in enumerate(("middle_block.0", "middle_block.2")):
        places[f"mid_block.resnets.{j}"] = place
    places["mid_block.attentions.0"] = "middle_block.1"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers is not None:
            after = 2 if hasattr(block, "attentions") else 1
            places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{after}"
    return {_renamed(key, places): weight for key, weight in unet.state_dict().items()}


def _renamed(key: str, places: dict[str, str]) -> str:
    for place in sorted(places, key=len, reverse=True):
        if key.startswith(f"{place}."):
            rest = key[len(place) + 1 :]
            if ".resnets." in key:
                layer, _, kind = rest.rpartition(".")
                rest = f"{_RESNET[layer]}.{kind}"
            return f"{places[place]}.{rest}"
    raise KeyError(key)


def vae_weights(vae) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for key, weight in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name
        )
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0",
            lambda m: f"up.{last - int(m[1])}.upsample",
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            for theirs, ours in (("group_norm", "norm"), ("to_out.0", "proj_out")):
                name = name.replace(theirs, ours)
            name = re.sub(r"to_([qkv])", r"\1", name)
            if weight.dim() == 2:
                weight = weight[:, :, None, None]
        found[name] = weight
    return found


def _text_weights(text) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): w for key, w in text.state_dict().items()}


def _clip(text, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": weight for key, weight in _text_weights(text).items()}


def _open_clip(text, prefix: str) -> dict[str, Tensor]:
    weights = _text_weights(text)
    found = {}
    for key, weight in weights.items():
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", key):
            three = [weights[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            key, weight = f"{match[1]}attn.in_proj_{match[2]}", torch.cat(three)
        elif re.search(r"self_attn\.[kv]_proj", key):
            continue
        for theirs, ours in _OPEN_CLIP.items():
            key = key.replace(theirs, ours)
        found[f"{prefix}{key}"] = weight
    return found
