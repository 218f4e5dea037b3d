"""How far another noise scheduler, or another number of steps, leads from the bundle's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cq_edge.model.trajectory import Loop, Prompt, mean_square


@torch.no_grad()
def final_latents(
    loop: Loop, prompts: Sequence[Prompt], on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, ...]:
    """Returns what each prompt's run ends in, (1, 4, h, w) each, every step full.

    Args:
        loop: With a float denoiser: quantisation would add its own noise to both of two runs.
        prompts: One or more.
        on_step: Called after every step that is run, for progress bars.
    """
    finals = []
    for number, prompt in enumerate(prompts):
        for visit in loop.run(number, prompt):
            latents = visit.after
            on_step()
        finals.append(latents)
    return tuple(finals)


def base_error(finals: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """Returns the mean squared difference of the final latents of the same prompts."""
    pairs = list(zip(finals, own, strict=True))
    return sum(mean_square(theirs - ours) for theirs, ours in pairs) / len(pairs)
