"""What reuse alone errs by, without quantisation: the float graphs, in their own loop.

What the graphs that ship err by where they reuse is mostly noise at late steps: of the layers at
the steps that a forecast is made from, and of latents that noise has moved, which a forecast does
not answer to. `plan_error` follows that noise through a plan's own steps: it must not count twice.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cq_edge.forecast import Weights
from cq_edge.model.reuse_trial import Corrections, ShallowGraph, reusing, visits
from cq_edge.model.trajectory import Loop, Prompt, mean_square


def reuse_alone(
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    weights: Weights,
    halves: tuple[Corrections, Corrections],
    on_step: Callable[[], object],
) -> NDArray[np.float64]:
    """Returns (T, G+1) the mean squared errors of shallow steps' guided noise predictions, with
    features as they are forecast and corrected; 0 in column 0 and beyond the last step.

    Args:
        loop: Of the float full graph.
        shallow: The float shallow graph.
        prompts: One or more.
        weights: How far features are forecast to go on.
        halves: The cache correction that ships, and of the other half, which float layers do not
            need, the identity.
        on_step: Called after every step that is run, for progress bars.
    """
    total, columns = halves[0].gain.shape[:2]
    squares = np.zeros((total, columns))
    for number, visit, earlier in visits(loop, prompts, columns - 1, on_step):
        tried = reusing(loop, shallow, prompts[number], visit, earlier, weights, halves)
        for anchor, reused in tried:
            squares[anchor, visit.step - anchor] += mean_square(reused - visit.noise_pred)
    return squares / len(prompts)
