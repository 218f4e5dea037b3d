"""The demo model's autoencoder: 128×128 pictures to 16×16 latents of four channels."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from cq_edge.scenes import Scene
from tools.demo_training.data import pictures, training_scenes
from tools.demo_training.loop import TrainConfig, train

_CROP_PX = 64
_KL_WEIGHT = 5e-7


def new_vae() -> AutoencoderKL:
    """Returns the untrained autoencoder; without attention, so that crops train it."""
    return AutoencoderKL(
        sample_size=128,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def train_vae(config: TrainConfig, folder: Path, batch_size: int, device: str) -> AutoencoderKL:
    """Trains on random crops and returns the averaged autoencoder, its latents scaled to unit
    variance by `scaling_factor`."""
    torch.manual_seed(config.seed)
    vae = new_vae().to(device)

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        batch = _crops(
            training_scenes(1_000_000 + 10_000 * config.seed + step, batch_size // 2), generator
        )
        batch = batch.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - batch
        divergence = _KL_WEIGHT * posterior.kl().mean()
        loss: Tensor = error.abs().mean() + error.square().mean() + divergence
        return loss

    vae.load_state_dict(train(config, vae, loss_of_step, folder))
    normalise_latents(vae.eval())
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> None:
    """Gives every latent channel mean 0 and variance 1 without changing what is decoded.

    The statistics are folded into the 1×1 convolutions on both sides of the latents, so that
    the denoiser meets four channels of equal weight; `scaling_factor` is 1.
    """
    sample = pictures(training_scenes(1, 256)).to(vae.device)
    latents = torch.cat([vae.encode(p).latent_dist.mean for p in torch.split(sample, 16)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    after, before = vae.post_quant_conv, vae.quant_conv
    after.bias += (after.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    after.weight *= std[None, :, None, None]
    before.weight[:4] /= std[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) / std
    before.bias[4:] -= 2 * std.log()  # the posterior's log-variance
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, seed: int, count: int) -> tuple[Tensor, list[str]]:
    """Returns scaled latents (count, 4, 16, 16) float16 and the captions they belong to."""
    device = next(vae.parameters()).device
    batch = training_scenes(seed, count)
    parts = []
    for start in tqdm(range(0, count, 32), desc="latents"):
        pixels = pictures(batch[start : start + 32])
        pixels = pixels.to(device, memory_format=torch.channels_last)
        parts.append(vae.encode(pixels).latent_dist.mean.half().cpu())
    latents = torch.cat(parts) * vae.config.scaling_factor
    return latents, [scene.caption() for scene in batch]


def _crops(batch: list[Scene], generator: torch.Generator) -> Tensor:
    """Returns two crops of each scene, corners on the latents' 8-pixel grid: the first around
    one of its shapes, where the detail is, the second anywhere."""
    last = (128 - _CROP_PX) // 8
    anywhere = torch.randint(0, last + 1, (len(batch), 2), generator=generator).tolist()
    rows = []
    for picture, scene, corner in zip(pictures(batch), batch, anywhere, strict=True):
        shape = scene.shapes[corner[0] % len(scene.shapes)]
        centred = [round((at * 128 - _CROP_PX / 2) / 8) for at in (shape.y, shape.x)]
        for top, left in (centred, corner):
            top, left = (8 * min(max(c, 0), last) for c in (top, left))
            rows.append(picture[:, top : top + _CROP_PX, left : left + _CROP_PX])
    return torch.stack(rows)


def psnr_of(vae: AutoencoderKL, batch: Tensor) -> float:
    """Returns the reconstruction's PSNR in dB over (B, 3, 128, 128) pictures in [-1, 1]."""
    with torch.no_grad():
        decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(decoded, batch) / 4))
