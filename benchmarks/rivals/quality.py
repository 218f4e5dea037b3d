"""How close a contender's latents and pictures are to the reference's, and to their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rivals.task import FloatArray
from cq_edge.metrics import mean_interval, psnr_db, sqnr_db
from cq_edge.model.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over the pictures.

    Attributes:
        latents_db: Of the last latents against the reference's, SQNR.
        psnr_db: Of the pictures against the reference's; None where loops were cut short.
        clip: CLIP score; None likewise.
        clip_delta: Of it over the reference's, with its 95 % interval; likewise.
    """

    latents_db: float
    psnr_db: float | None = None
    clip: float | None = None
    clip_delta: tuple[float, float, float] | None = None


class Decoder:
    """A pipeline's own VAE in float32.

    Args:
        folder: Of the VAE, in diffusers layout.
    """

    def __init__(self, folder: Path) -> None:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(
            str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        self._vae = vae.eval()

    @torch.no_grad()
    def pictures(self, latents: Sequence[FloatArray]) -> NDArray[np.uint8]:
        """Returns (N, H, W, 3) pictures of N latents (1, 4, h, w)."""
        config, pictures = self._vae.config, []
        for array in latents:
            given = torch.from_numpy(array) / config.scaling_factor + (config.shift_factor or 0.0)
            image = (self._vae.decode(given).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
            pictures.append((image * 255).round().to(torch.uint8).numpy())
        return np.stack(pictures)


def compare(
    reference: Sequence[FloatArray],
    latents: Sequence[FloatArray],
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None,
    captions: Sequence[str],
    scorer: Scorer | None,
) -> Quality:
    """Returns how close N latents are to the reference's.

    Args:
        reference: The reference's.
        latents: The contender's.
        pictures: Of the reference and of the contender; None where loops were cut short.
        captions: Of the pictures.
        scorer: Judges pictures; None: nobody does.
    """
    highest = 200.0  # equal latents have no finite SQNR
    pairs = zip(reference, latents, strict=True)
    latents_db = float(np.mean([min(sqnr_db(a, b), highest) for a, b in pairs]))
    if pictures is None:
        return Quality(latents_db)
    # an equal picture counts as one level off in a single value
    most = 10 * np.log10(255.0**2 * pictures[0][0].size)
    psnr = float(np.mean([min(psnr_db(a, b), most) for a, b in zip(*pictures, strict=True)]))
    if scorer is None:
        return Quality(latents_db, psnr)
    expected, scores = (scorer.clip_scores(side, captions) for side in pictures)
    low, high = mean_interval(scores - expected)
    delta = (float((scores - expected).mean()), low, high)
    return Quality(latents_db, psnr, float(scores.mean()), delta)
