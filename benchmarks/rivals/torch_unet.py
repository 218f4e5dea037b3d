"""The UNet as other toolchains convert it, and inputs of its loop to calibrate activations by."""

from typing import Any

import numpy as np
import torch

from benchmarks.rivals.task import FloatArray, Task, guided_loop

INPUTS = ("latents", "timestep", "embeddings")
_MOST_SAMPLES = 300  # what nncf looks at if nothing else is said


class GuidedUNet(torch.nn.Module):
    """Both branches as one batch: (2, 4, h, w), (1,), (2, 77, D) to (2, 4, h, w), float32."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        folder = str(task.pipeline / "unet")
        unet: Any = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
        self.unet = unet.eval().requires_grad_(requires_grad=False)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Returns the noise prediction."""
        found: torch.Tensor = self.unet(latents, timestep, embeddings, return_dict=False)[0]
        return found


def example_inputs(task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the inputs of the first picture's first step."""
    latents = np.concatenate([task.latents(0)] * 2)
    timestep = np.array(task.timesteps[:1], np.float32)
    return (
        torch.from_numpy(latents),
        torch.from_numpy(timestep),
        torch.from_numpy(np.concatenate(task.branches(0))),
    )


def calibration_inputs(task: Task) -> list[dict[str, FloatArray]]:
    """Returns inputs from all over the loops of the calibration prompts, 300 at the most."""
    unet, samples = GuidedUNet(task), list[dict[str, FloatArray]]()

    def denoiser(*inputs: FloatArray) -> FloatArray:
        samples.append(dict(zip(INPUTS, (a.copy() for a in inputs), strict=True)))
        with torch.no_grad():
            noise: FloatArray = unet(*(torch.from_numpy(a) for a in inputs)).numpy()
        return noise

    for picture in task.calibration_pictures:
        guided_loop(task, picture, task.calibration_steps, denoiser)
    kept = np.linspace(0, len(samples) - 1, min(_MOST_SAMPLES, len(samples))).round().astype(int)
    return [samples[i] for i in kept]
