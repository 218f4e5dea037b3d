"""ReuseTable: the error and the correction of every (anchor, step), as calibration measured them.

It is decisions' raw material: any cache schedule up to `max_gap` can be planned and run from it.
"""

import math
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.correction import ChannelCorrection, ShallowCorrection
from cq_edge.errors import (
    BundleError,
    CalibrationError,
    OutputExistsError,
    ScheduleError,
    UsageError,
)
from cq_edge.forecast import Weights
from cq_edge.frontier import ReuseErrors
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.quantisation_noise import averaged_noise, noise_by_mode

OBJECTIVES = ("noise_pred", "feature_l1")
"""The errors that a plan may minimise; the first is the default."""

_ALONE = ("shallow", "skip", "unguided")
_ERRORS = (*OBJECTIVES, *_ALONE)
_INFLUENCES = ("noise_influence", "reuse_influence")
_CORRECTIONS = ("gain", "bias", "output_gain", "output_bias")
_WEIGHTS = ("feature_weight", "skip_weight", "unguided_weight")
RUN_COLUMNS = (*_CORRECTIONS, *_WEIGHTS, "forecast_share")
"""What changes the pictures of a given plan; the others only choose plans."""
_ACROSS, _ACROSS_UNGUIDED, _ACROSS_LAST = 0.3, 1.0, 4.0
"""How much of what reuse alone errs by counts as noise in the sum: of a guided step, of an unguided
one, and of the last, whose errors no later step mends. Fitted to plans of the demo model."""
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True, slots=True, eq=False)
class ReuseTable:
    """What reusing a cached feature costs, and what repairs most of it.

    Row i is the anchor step, column g the gap: entry [i, g] is about step i + g, which reuses
    anchor i. Entries of steps beyond T-1 exist but mean nothing (NaN is usual); column 0 is a
    step that computes all itself.

    Attributes:
        noise_scheduler: Name of the noise scheduler that it was measured with.
        steps: Sampler steps asked for (PNDM evaluates the denoiser once more).
        guidance_scale: Of the run that was measured.
        base_error: What no plan changes: the mean squared error of the final latents, every step
            full, of the float denoiser against that with the bundle's own noise scheduler and
            steps, and the part of quantisation's that all steps share.
        timesteps: (T,) float32, the noise scheduler's.
        noise_influence: (T,) float64: how far the final latents move with a step's guided noise
            prediction where that has noise of its own; of either sign.
        reuse_influence: (T,) float64, 0 or more: likewise where it errs as its neighbours do.
        noise_pred: (T, G+1) float64, 0 or more; G is the largest gap. The mean squared error of
            the guided noise prediction with the corrected feature, against the float denoiser's;
            column 0 is of a full step, which quantisation makes wrong.
        feature_l1: (T, G+1) float64, 0 in column 0: the mean absolute difference of the cached
            features, which is the paper's objective.
        shallow: (T, G+1) float64, 0 or more, 0 in column 0: what reuse alone errs by, without
            quantisation: as `noise_pred`, of the float graphs in their own loop.
        skip: (T, R+1) float64: likewise of step i + g forecast from step i, the last that was
            computed.
        unguided: (T, U+1) float64: and where what the negative prompt changes is forecast from
            step i, the last that computed it.
        feature_weight: (T, G+2, G+1) float32: how far the cached feature is taken to go on as it
            last changed, `cq_edge.forecast.Weights`; 0 takes the anchor's as it is.
        skip_weight: (T, R+2, R+1) float32: likewise the noise prediction of skip steps.
        unguided_weight: (T, U+2, U+1) float32: and what the negative prompt changes.
        forecast_share: (T, G+1) float32, 0 to 1: of the noise prediction of a full step i + g + 1,
            how much is the forecast's rather than the graph's, where step i + g was computed; 0
            where there is no such step.
        gain: (T, G+1, C) float32 over the C channels of the cached feature.
        bias: (T, G+1, C) float32.
        output_gain: (T, G+1, 2·C') float32 over the channels of the layers that consume it.
        output_bias: (T, G+1, 2·C') float32.
    """

    noise_scheduler: str
    steps: int
    guidance_scale: float
    base_error: float
    timesteps: NDArray[np.float32]
    noise_influence: NDArray[np.float64]
    reuse_influence: NDArray[np.float64]
    noise_pred: NDArray[np.float64]
    feature_l1: NDArray[np.float64]
    shallow: NDArray[np.float64]
    skip: NDArray[np.float64]
    unguided: NDArray[np.float64]
    feature_weight: Weights
    skip_weight: Weights
    unguided_weight: Weights
    forecast_share: NDArray[np.float32]
    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    output_gain: NDArray[np.float32]
    output_bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses arrays that do not belong together and entries that nothing can use."""
        if not self.noise_scheduler:
            raise CalibrationError("noise_scheduler of a reuse table is empty: name it")
        if self.steps < 1:
            raise CalibrationError(f"steps of a reuse table is {self.steps}: it must be 1 or more")
        if not math.isfinite(self.guidance_scale):
            raise CalibrationError(
                f"guidance_scale of a reuse table is {self.guidance_scale}: it must be a number"
            )
        if not (math.isfinite(self.base_error) and self.base_error >= 0):
            raise CalibrationError(
                f"base_error of a reuse table is {self.base_error}: it must be 0 or more"
            )
        self._check_shapes()
        self._check_entries()

    @property
    def max_gap(self) -> int:
        """The largest gap that was measured."""
        return int(self.noise_pred.shape[1]) - 1

    @property
    def channels(self) -> int:
        """Channels of the cached feature."""
        return int(self.gain.shape[2])

    @property
    def consumed_channels(self) -> int:
        """Channels of the layers that consume the cached feature."""
        return int(self.output_gain.shape[2])

    @property
    def own(self) -> NDArray[np.float64]:
        """(T,): mean squared errors of full steps."""
        return self.noise_pred[:, 0]

    def errors(self, objective: str = OBJECTIVES[0]) -> NDArray[np.float64]:
        """Returns the (T, G+1) errors of shallow steps by an objective, 0 in column 0: of ours
        amplitudes in the final latents, of the paper's `feature_l1`.

        Raises:
            UsageError: There is no such objective.
        """
        if objective not in OBJECTIVES:
            raise UsageError(f"objective is {objective!r}: choose {' or '.join(OBJECTIVES)}")
        if objective == OBJECTIVES[0]:
            return self._moved("shallow")
        return self.feature_l1

    def reuse_errors(self, objective: str = OBJECTIVES[0]) -> ReuseErrors:
        """Returns what a plan of all modes is to minimise.

        The paper's objective knows neither noise, nor skip and unguided steps, which it rules out.

        Raises:
            UsageError: There is no such objective.
        """
        shallow = self.errors(objective)
        if objective == OBJECTIVES[0]:
            skip, unguided = self._moved("skip"), self._moved("unguided")
            noise = noise_by_mode(self.own, self.noise_influence, self.guidance_scale)
            return ReuseErrors(shallow, skip, unguided, noise, self._across)
        never = np.zeros((len(shallow), 1))
        return ReuseErrors(shallow, never, never, squared=False)

    def errors_to_search(self, objective: str = OBJECTIVES[0]) -> tuple[ReuseErrors, ...]:
        """Returns what plans worth a closer look minimise one of: noise may cancel as it goes on,
        or be averaged away where steps in a row are full, or full several times, which no sum tells
        apart.

        Raises:
            UsageError: There is no such objective.
        """
        errors = self.reuse_errors(objective)
        if not errors.noise:
            return (errors,)
        noise = averaged_noise(self.own, self.noise_influence, self.forecast_share[:, 0])
        return errors.once(), replace(errors, noise=noise)

    def require_for(self, noise_scheduler: NoiseScheduler) -> None:
        """Refuses a noise scheduler of other timesteps.

        Raises:
            ScheduleError: They are not the table's.
        """
        if not np.array_equal(self.timesteps, noise_scheduler.timesteps):
            raise ScheduleError(
                f"the reuse table was measured on {self.noise_scheduler} at {self.steps} steps: "
                f"its corrections do not fit {noise_scheduler.name} at {noise_scheduler.steps} "
                "steps"
            )

    def correction(self, anchor: int, step: int) -> ShallowCorrection:
        """Returns the correction of a step that reuses an anchor; the identity for its own.

        Raises:
            CalibrationError: That pair was not measured.
        """
        gap, step_count = step - anchor, len(self.timesteps)
        if not (0 <= anchor <= step < step_count and gap <= self.max_gap):
            raise CalibrationError(
                f"no correction was measured for step {step} with anchor {anchor}: the table has "
                f"steps 0 to {step_count - 1} with gaps 0 to {self.max_gap}"
            )
        if gap == 0:
            return ShallowCorrection(
                ChannelCorrection.identity(self.channels),
                ChannelCorrection.identity(self.consumed_channels),
            )
        return ShallowCorrection(
            ChannelCorrection(self.gain[anchor, gap], self.bias[anchor, gap]),
            ChannelCorrection(self.output_gain[anchor, gap], self.output_bias[anchor, gap]),
        )

    def shares_in(self, schedule: CacheSchedule) -> NDArray[np.float32]:
        """Returns (T,), 0 to 1, how much of each full step's noise prediction is the forecast's
        where the step before was computed, guided or not (chosen for both guided); 0 of other
        steps, and beyond the largest gap.

        Args:
            schedule: Of the table's T steps.
        """
        shares, anchors = np.zeros(len(schedule), np.float32), schedule.anchors
        for last, (before, mode) in enumerate(pairwise(schedule.modes)):
            gap = last - anchors[last]
            if mode.is_full and before is not Mode.SKIP and gap <= self.max_gap:
                shares[last + 1] = self.forecast_share[anchors[last], gap]
        return shares

    def without_corrections(self, *, cache: bool = True, quantisation: bool = True) -> Self:
        """Returns the table with corrections that change nothing: gain 1, bias 0.

        Args:
            cache: Whether it loses the cache corrections, and takes features as they were.
            quantisation: Whether it loses the quantisation corrections, of channels and of steps.
        """
        table = self
        if cache:
            table = replace(
                table,
                gain=np.ones_like(self.gain),
                bias=np.zeros_like(self.bias),
                feature_weight=np.zeros_like(self.feature_weight),
            )
        if quantisation:
            gain, bias = np.ones_like(self.output_gain), np.zeros_like(self.output_bias)
            share = np.zeros_like(self.forecast_share)
            table = replace(table, output_gain=gain, output_bias=bias, forecast_share=share)
        return table

    def save(self, path: Path) -> None:
        """Writes the table as a NumPy archive (.npz) without pickle; equal tables, equal bytes.

        Raises:
            OutputExistsError: The path is taken.
        """
        content: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        try:
            with path.open("xb") as stream:
                np.savez_compressed(stream, **content)
        except FileExistsError:
            raise OutputExistsError(f"{path} exists: delete it, or write elsewhere") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the table in a file that `save` wrote.

        Raises:
            BundleError: The file is missing, no such archive, or holds no valid table.
        """
        try:
            content = _read_archive(path)
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: copy or build the bundle again") from None
        except _UNREADABLE as error:
            raise BundleError(f"{path} is not a reuse table: {error}") from None
        expected = {field.name for field in fields(cls)}
        if odd := sorted(content.keys() ^ expected):
            state = "lacks" if odd[0] in expected else "has the unknown key"
            raise BundleError(f"{path} is not a reuse table: it {state} {odd[0]}")
        try:
            return cls(
                noise_scheduler=_scalar(content, "noise_scheduler", str),
                steps=_scalar(content, "steps", int),
                guidance_scale=_scalar(content, "guidance_scale", float),
                base_error=_scalar(content, "base_error", float),
                timesteps=content["timesteps"],
                noise_influence=content["noise_influence"],
                reuse_influence=content["reuse_influence"],
                noise_pred=content["noise_pred"],
                feature_l1=content["feature_l1"],
                shallow=content["shallow"],
                skip=content["skip"],
                unguided=content["unguided"],
                feature_weight=content["feature_weight"],
                skip_weight=content["skip_weight"],
                unguided_weight=content["unguided_weight"],
                forecast_share=content["forecast_share"],
                gain=content["gain"],
                bias=content["bias"],
                output_gain=content["output_gain"],
                output_bias=content["output_bias"],
            )
        except CalibrationError as error:
            raise BundleError(f"{path} is not a reuse table: {error}") from None

    def _moved(self, name: str) -> NDArray[np.float64]:
        """Returns what reuse alone errs by, as an amplitude in the final latents."""
        errors = getattr(self, name)
        step = np.minimum(np.add.outer(*map(np.arange, errors.shape)), len(errors) - 1)
        moved: NDArray[np.float64] = np.sqrt(errors) * self.reuse_influence[step]
        return moved

    @property
    def _across(self) -> dict[Mode, NDArray[np.float64]]:
        """Of each mode (T,): what the square of such a movement adds to the noise."""
        noise, reuse = self.noise_influence**2, self.reuse_influence**2
        whole = np.divide(noise, reuse, out=np.zeros_like(noise), where=reuse > 0)
        earlier = np.arange(len(whole)) < len(whole) - 1
        shares = {mode: _ACROSS_UNGUIDED if mode.is_unguided else _ACROSS for mode in Mode}
        return {mode: whole * np.where(earlier, s, _ACROSS_LAST) for mode, s in shares.items()}

    def _check_shapes(self) -> None:
        one = ("timesteps", *_INFLUENCES)
        two = (*OBJECTIVES, "forecast_share", *_ALONE)
        three = (*_WEIGHTS, *_CORRECTIONS)
        dims = {name: n for n, names in enumerate((one, two, three), start=1) for name in names}
        for name, ndim in dims.items():
            array = getattr(self, name)
            dtype = "float64" if name in (*_INFLUENCES, *_ERRORS) else "float32"
            if array.ndim != ndim or array.dtype != dtype or 0 in array.shape:
                raise CalibrationError(
                    f"{name} of a reuse table is {array.dtype} of shape {array.shape}: "
                    f"it must be {dtype} with {ndim} dimensions, none empty"
                )
        shapes = {name: getattr(self, name).shape for name in dims}
        step_count, columns = self.noise_pred.shape
        pairs = (step_count, columns)
        whole = 2 * [(*pairs, self.channels)] + 2 * [(*pairs, self.consumed_channels)]
        forecasts = [(step_count, shapes[name][1]) for name in ("skip", "unguided")]
        reach = [(step_count, gaps + 1, gaps) for gaps in (columns, *(c for _, c in forecasts))]
        expected = 3 * [(step_count,)] + 4 * [pairs] + forecasts + reach + whole
        if list(shapes.values()) != expected:
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise CalibrationError(
                f"{found} of a reuse table do not belong together: they must be (T,) "
                "three times, (T, G+1) four times, (T, R+1), (T, U+1), (T, G+2, G+1), "
                "(T, R+2, R+1), (T, U+2, U+1), (T, G+1, C) twice, and (T, G+1, 2C') twice"
            )

    def _check_entries(self) -> None:
        if not np.isfinite(self.timesteps).all():
            raise CalibrationError("a timestep of the reuse table is not a number")
        for name in _INFLUENCES:
            influence = getattr(self, name)
            usable = np.isfinite(influence) & ((influence >= 0) | (name == "noise_influence"))
            if not usable.all():
                raise CalibrationError(
                    f"{name} of step {int(usable.argmin())} in the reuse table is unusable: it "
                    "must be a number, of reuse_influence 0 or more"
                )
        for name in _ERRORS:
            errors = getattr(self, name)
            anchor, gap = np.indices(errors.shape)
            used = anchor + gap < len(self.timesteps)
            with np.errstate(invalid="ignore"):
                usable = np.isfinite(errors) & (errors >= 0)
            _require(
                usable | ~used, f"the reuse error ({name})", "it must be a number of 0 or more"
            )
            if name != "noise_pred":
                fine = (errors == 0) | (gap > 0)
                _require(fine, f"the reuse error ({name})", "a step's own must be 0")
        share = self.forecast_share
        if not ((share >= 0) & (share <= 1)).all():
            raise CalibrationError("forecast_share of a reuse table must lie in 0 to 1")
        for name in _WEIGHTS:
            if not np.isfinite(getattr(self, name)).all():
                raise CalibrationError(f"{name} of a reuse table must hold numbers alone")
        anchor, gap = np.indices(self.noise_pred.shape)
        used = anchor + gap < len(self.timesteps)
        for name in _CORRECTIONS:
            finite = np.isfinite(getattr(self, name)).all(axis=2)
            _require(finite | ~used, f"the {name}", "every channel must be finite")


def _require(fine: NDArray[np.bool_], what: str, rule: str) -> None:
    """Refuses a table with an entry [anchor, gap] that is not fine; names the first."""
    if not fine.all():
        anchor, gap = (int(index) for index in np.argwhere(~fine)[0])
        raise CalibrationError(
            f"{what} of step {anchor + gap} with anchor {anchor} (gap {gap}) is unusable: {rule}"
        )


def _read_archive(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array")
        return dict(archive.items())


def _scalar(content: dict[str, NDArray[Any]], name: str, kind: type) -> Any:
    value = content[name].tolist()
    if type(value) is not kind:
        raise CalibrationError(f"{name} is not a single {kind.__name__}")
    return value
