"""Tries what the shallow graph makes of reused features, and fits what mends its own layers.

Both run the loop anew with the full graph at every step, and at each step k reuse the features
of the steps before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.correction import MomentAccumulator
from cq_edge.forecast import Forecast, Weights, expected_back
from cq_edge.model.trajectory import FullGraph, Loop, Prompt, Visit, mean_square

ShallowGraph = Callable[..., Tensor]
"""Of latents, timestep, context, feature and correction, as `split.ShallowUNet` is."""
Consumer = Callable[..., Tensor]
"""What the layers that consume a feature make of (latents, timestep, context…, feature)."""


@dataclass(frozen=True, slots=True, eq=False)
class Graphs:
    """A full graph and its shallow one."""

    full: FullGraph
    shallow: ShallowGraph


@dataclass(frozen=True, slots=True, eq=False)
class Consumers:
    """The layers that consume a cached feature: as they ship, and as they were in float.

    Both give (B, 2·C', h, w), as `ShallowUNet.consumed` does.
    """

    shipped: Consumer
    exact: Consumer


@dataclass(frozen=True, slots=True, eq=False)
class Corrections:
    """A gain and a bias per (anchor, gap) and channel, each (T, G+1, channels) float32.

    Column 0 is the identity; entries beyond the last step are NaN.
    """

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]

    def at(self, anchor: int, gap: int) -> tuple[Tensor, Tensor]:
        """Returns the gain and bias of a pair."""
        return torch.from_numpy(self.gain[anchor, gap]), torch.from_numpy(self.bias[anchor, gap])

    def identity(self) -> "Corrections":
        """Returns those of as many pairs and channels that change nothing."""
        return self.identity_where(np.ones(self.gain.shape[:2], bool))

    def kept(self, share: NDArray[np.float32]) -> "Corrections":
        """Returns the corrections with what they change times the (G+1,) share of their gap."""
        of_gap = share[:, None]
        return Corrections(1 + of_gap * (self.gain - 1), of_gap * self.bias)

    def identity_where(self, dropped: NDArray[np.bool_]) -> "Corrections":
        """Returns the corrections with those of some (anchor, gap) pairs changing nothing."""
        keep = ~dropped[:, :, None]
        return Corrections(
            np.where(keep, self.gain, np.float32(1)), np.where(keep, self.bias, np.float32(0))
        )


def fit_pairs(
    pairs: Sequence[Sequence[MomentAccumulator]], max_gap: int, channels: int
) -> Corrections:
    """Returns the corrections of what each pair's moments hold.

    Args:
        pairs: For each of T anchors the moments at the gaps from 1 on that there are.
        max_gap: G.
        channels: That each correction has.
    """
    gain, bias = np.full((2, len(pairs), max_gap + 1, channels), np.nan, np.float32)
    gain[:, 0], bias[:, 0] = 1, 0
    for anchor, row in enumerate(pairs):
        for gap, moments in enumerate(row, start=1):
            fitted = moments.fit()
            gain[anchor, gap], bias[anchor, gap] = fitted.gain, fitted.bias
    return Corrections(gain, bias)


def fit_quantisation(
    loop: Loop,
    consumers: Consumers,
    prompts: Sequence[Prompt],
    weights: Weights,
    cache: Corrections,
    on_step: Callable[[], object],
) -> Corrections:
    """Returns what maps the shipped layers' outputs on a feature, forecast and corrected, onto
    those that the float layers have on the step's own, by least squares, output channel by channel.

    Source: CacheQuant's second half, fitted after the first. We differ in applying its bias whole
    (its code drops (gain - 1) · bias) and in fitting the guided combination too.
    """
    total, columns = cache.gain.shape[:2]
    pairs = [
        [MomentAccumulator() for _ in range(min(columns - 1, total - 1 - i))] for i in range(total)
    ]
    channels = 0
    for number, visit, earlier in visits(loop, prompts, columns - 1, on_step):
        prompt = prompts[number]
        exact = _outputs(loop, consumers.exact, visit, prompt, visit.features)
        channels = exact[0].shape[1]
        for anchor, features in _forecasts(earlier, weights):
            gap = visit.step - anchor
            gain, bias = (x.reshape(1, -1, 1, 1) for x in cache.at(anchor, gap))
            reused = [gain * feature + bias for feature in features]
            found = _outputs(loop, consumers.shipped, visit, prompt, reused)
            pairs[anchor][gap - 1].add(_rows(found), _rows(exact))
    return fit_pairs(pairs, columns - 1, channels)


def reuse_squares(
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    truths: Mapping[tuple[int, int], Tensor],
    weights: Weights,
    choices: Sequence[tuple[Corrections, Corrections]],
    on_step: Callable[[], object],
) -> NDArray[np.float64]:
    """Returns (N, T, G+1) mean squared errors of the guided noise prediction of every step i + g
    with the features of step i, summed over the prompts; column 0 is of the full graph.

    Args:
        loop: Of the full graph.
        shallow: The shallow graph.
        prompts: The embeddings to run.
        truths: What the float graph predicts, guided, by number of the prompt and step.
        weights: How far features are forecast to go on.
        choices: N pairs of a cache correction and a quantisation correction to try.
        on_step: Called after each step of each prompt.
    """
    total, columns = choices[0][0].gain.shape[:2]
    squares = np.zeros((len(choices), total, columns))
    for number, visit, earlier in visits(loop, prompts, columns - 1, on_step):
        truth = truths[number, visit.step]
        squares[:, visit.step, 0] += mean_square(visit.noise_pred - truth)
        for index, halves in enumerate(choices):
            tried = reusing(loop, shallow, prompts[number], visit, earlier, weights, halves)
            for anchor, reused in tried:
                squares[index, anchor, visit.step - anchor] += mean_square(reused - truth)
    return squares


def reusing(
    loop: Loop,
    shallow: ShallowGraph,
    prompt: Prompt,
    visit: Visit,
    earlier: Sequence[Visit],
    weights: Weights,
    halves: tuple[Corrections, Corrections],
) -> Iterator[tuple[int, Tensor]]:
    """Yields each anchor, and the guided noise prediction of a step that reuses its features.

    Args:
        loop: Of the full graph.
        shallow: The shallow graph.
        prompt: What is run.
        visit: The step.
        earlier: Those before it, as `visits` yields them.
        weights: How far features are forecast to go on.
        halves: The cache correction and the quantisation correction.
    """
    for anchor, features in _forecasts(earlier, weights):
        correction = [x for half in halves for x in half.at(anchor, visit.step - anchor)]
        yield (
            anchor,
            loop.guided(
                [
                    shallow(visit.seen, visit.timestep, *context, feature, *correction)
                    for context, feature in zip(loop.branches(prompt), features, strict=True)
                ]
            ),
        )


def visits(
    loop: Loop, prompts: Sequence[Prompt], max_gap: int, on_step: Callable[[], object]
) -> Iterator[tuple[int, Visit, list[Visit]]]:
    """Yields the prompt's number, every step of its run, and the steps before that forecasts over
    gaps up to the largest are made from, the last first."""
    for number, prompt in enumerate(prompts):
        earlier: list[Visit] = []
        for visit in loop.run(number, prompt):
            yield number, visit, earlier
            earlier = [visit, *earlier][: 2 * max_gap + 1]
            on_step()


def _forecasts(earlier: Sequence[Visit], weights: Weights) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields each anchor, and what the branches' features are expected to be, from it and the step
    that is taken to have been full before it, at the step after these."""
    for gap, anchor in enumerate(earlier[: weights.shape[2] - 1], start=1):
        back = expected_back(anchor.step, gap)
        before = earlier[gap - 1 + back]
        pairs = zip(anchor.features, before.features, strict=True)
        lines = [Forecast(((anchor.step, new), (before.step, old))) for new, old in pairs]
        yield anchor.step, [line.at(anchor.step + gap, weights) for line in lines]


def _outputs(
    loop: Loop, consumer: Consumer, visit: Visit, prompt: Prompt, features: Sequence[Tensor]
) -> list[Tensor]:
    """Returns what the layers make of each branch's feature, and with guidance of both."""
    return loop.with_guided(
        [
            consumer(visit.seen, visit.timestep, *context, feature)
            for context, feature in zip(loop.branches(prompt), features, strict=True)
        ]
    )


def _rows(outputs: Sequence[Tensor]) -> NDArray[np.float32]:
    """Returns (N, channels): a row per pixel."""
    joined = torch.cat(list(outputs)).numpy()
    return np.moveaxis(joined, 1, -1).reshape(-1, joined.shape[1])
