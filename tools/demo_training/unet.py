"""The demo model's denoiser: Stable Diffusion's anatomy at a thousandth of the work."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo_training.loop import TrainConfig, train
from tools.demo_training.precision import PlainAttention, autocast, keep_group_norms_float32
from tools.demo_training.text import token_ids

_CAPTION_DROPOUT = 0.1
_LARGEST_WEIGHT = 8.0


def new_unet() -> UNet2DConditionModel:
    """Returns the untrained denoiser: three resolutions, attention at the outermost too."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=[2, 4, 5],  # diffusers' name for the number of heads
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def noise_schedule() -> DDPMScheduler:
    """Returns Stable Diffusion's forward process."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def train_unet(
    config: TrainConfig,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    latents: Tensor,
    captions: list[str],
    folder: Path,
    batch_size: int,
    device: str,
    *,
    bf16: bool,
) -> UNet2DConditionModel:
    """Trains `unet` on encoded scenes and returns it with averaged weights.

    Source: the noise-prediction loss of Ho et al. 2020 with the weights of Yu et al. 2023
    ("Debias the Training of Diffusion Models"), 1 / sqrt(SNR): what a caption decides, it
    decides at high noise.
    """
    unet = unet.to(device)
    unet.set_attn_processor(PlainAttention())
    keep_group_norms_float32(unet)
    text = text.to(device).eval()
    ids = torch.cat([token_ids(tokenizer, captions[i : i + 512]) for i in _starts(captions)])
    empty = token_ids(tokenizer, [""])[0]
    alphas = noise_schedule().alphas_cumprod
    weights = torch.sqrt((1 - alphas) / alphas).clamp(max=_LARGEST_WEIGHT)
    weights /= weights.mean()

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        timesteps = _stratified_timesteps(batch_size, generator)
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(device)
        tokens = ids[rows].clone()
        tokens[torch.rand(batch_size, generator=generator) < _CAPTION_DROPOUT] = empty
        with torch.no_grad():
            embeddings = text(tokens.to(device)).last_hidden_state
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast(device, bf16=bf16):
            predicted = unet(noisy, timesteps.to(device), embeddings).sample.float()
        error = (predicted - noise.to(device)).square().mean((1, 2, 3))
        loss: Tensor = (weights[timesteps].to(device) * error).mean()
        return loss

    unet.load_state_dict(train(config, unet, loss_of_step, folder))
    return unet.eval()


def _stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Returns (count,) int64 timesteps, one from each of `count` equal parts of 0…999."""
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (spread * 1000).long().clamp(max=999)


def _starts(captions: list[str]) -> range:
    return range(0, len(captions), 512)
