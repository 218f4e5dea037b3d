"""DDIM, PNDM, Euler, DPM-Solver++ 2M, LCM: timesteps, and a step that is one line of arithmetic.

Coefficients are float64 Python numbers worked out once; a step multiplies and adds arrays, so it
runs on NumPy and on torch and keeps the arrays' dtype. All are deterministic (eta 0) but LCM,
which wants fresh noise after each step; the loop adds it, so that a step is arithmetic there too.

Source: diffusers' DDIMScheduler (arXiv 2010.02502), PNDMScheduler with skip_prk_steps
(arXiv 2202.09778), EulerDiscreteScheduler (arXiv 2206.00364), DPMSolverMultistepScheduler
(arXiv 2211.01095) and LCMScheduler (arXiv 2310.04378), each equal over whole trajectories. We
differ in that step counts whose timesteps repeat or leave the trained range are refused, where
diffusers clamps, divides by zero or raises IndexError, and in that coefficients are float64.

Notation: alpha_bar is the papers' cumulative product ᾱ, sigma is sqrt((1 - ᾱ) / ᾱ).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import ScheduleError

Array: TypeAlias = Any
"""NumPy array or torch tensor of floats, any shape."""

NAMES = ("ddim", "pndm", "euler", "dpmsolver++", "lcm")
_LCM_STEPS = 50  # that latent consistency models are distilled on; theirs are some of them
_LCM_DATA_SIGMA, _LCM_TIMESTEP_SCALING = 0.5, 10.0

_BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
_SPACINGS = ("leading", "linspace", "trailing")
_ONLY_VALUE = {  # of diffusers' keys that change the arithmetic, the one value we implement
    "clip_sample_range": 1.0,
    "thresholding": False,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "original_inference_steps": _LCM_STEPS,
    "timestep_scaling": _LCM_TIMESTEP_SCALING,
}


@dataclass(frozen=True, slots=True)
class NoiseScheduleConfig:
    """The noise schedule that a model was trained with; names and meanings are diffusers'.

    Attributes:
        num_train_timesteps: Timesteps run from 0 to this minus 1.
        beta_start: Variance added at timestep 0, in (0, 1).
        beta_end: Variance added at the last timestep, in (0, 1).
        beta_schedule: "scaled_linear" (linear in the square root), "linear", or
            "squaredcos_cap_v2" (which has no use for beta_start and beta_end).
        prediction_type: What the network gives: "epsilon" or "v_prediction".
        steps_offset: Added to every timestep of "leading" spacing.
        timestep_spacing: "leading", "linspace" or "trailing".
        set_alpha_to_one: Whether DDIM and PNDM end at ᾱ = 1 or at timestep 0's ᾱ.
        clip_sample: Whether DDIM clips the clean picture that it predicts to -1…1, as models of
            pixels want; the others do not, in diffusers neither.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    timestep_spacing: str = "leading"
    set_alpha_to_one: bool = False
    clip_sample: bool = False

    def __post_init__(self) -> None:
        """Refuses what no noise scheduler here can follow."""
        if self.num_train_timesteps < 1:
            raise ScheduleError(
                f"num_train_timesteps is {self.num_train_timesteps}: it must be 1 or more"
            )
        for key in ("beta_start", "beta_end"):
            if not 0 < getattr(self, key) < 1:
                raise ScheduleError(f"{key} is {getattr(self, key)}: it must lie between 0 and 1")
        if self.steps_offset < 0:
            raise ScheduleError(f"steps_offset is {self.steps_offset}: it must be 0 or more")
        _require_one_of("beta_schedule", self.beta_schedule, _BETA_SCHEDULES)
        _require_one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require_one_of("timestep_spacing", self.timestep_spacing, _SPACINGS)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Returns the noise schedule of a diffusers scheduler's config.

        Args:
            config: `scheduler.config`, or the content of `scheduler_config.json`. Keys that
                choose a sampler are passed over: ours is chosen by name.

        Raises:
            ScheduleError: A key is missing or asks for arithmetic that is not implemented.
        """
        for key, only in _ONLY_VALUE.items():
            found = config.get(key, only)
            if found is not None and found != only:
                raise ScheduleError(
                    f"the pipeline's scheduler has {key} = {found!r}, which is not implemented: "
                    f"only {only!r} is"
                )
        for key in ("beta_start", "beta_end", "beta_schedule"):
            if key not in config:
                raise ScheduleError(
                    f"the pipeline's scheduler config has no {key}: use one saved by diffusers"
                )
        known = {field.name for field in fields(cls)}
        found = {key: value for key, value in config.items() if key in known}
        if config.get("_class_name") == "DDPMScheduler":
            found["set_alpha_to_one"] = True  # it says nothing of it, and ends there
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns what `to_dict` described.

        Raises:
            ScheduleError: A key is unknown or missing, or a value is not allowed.
        """
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                raise ScheduleError(
                    f"a noise schedule has no key {key}: its keys are {', '.join(known)}"
                )
        for key in known:
            if key not in content:
                raise ScheduleError(f"the noise schedule lacks key {key}")
        return cls(**content)

    def alphas_bar(self) -> NDArray[np.float64]:
        """Returns ᾱ at every training timestep: (num_train_timesteps,), falling, in (0, 1)."""
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, count)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        else:
            edges = np.arange(count + 1) / count
            cosine = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
        return np.cumprod(1 - betas, dtype=np.float64)


class NoiseScheduler(Protocol):
    """The update rule of a denoising loop of T steps."""

    @property
    def name(self) -> str:
        """One of `NAMES`."""

    @property
    def steps(self) -> int:
        """Sampler steps asked for; PNDM evaluates the denoiser once more than that."""

    @property
    def timesteps(self) -> NDArray[np.float32]:
        """(T,): what the denoiser is told at each step, noisiest first."""

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Sigma at each of the T timesteps."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon or v_prediction."""

    @property
    def init_noise_sigma(self) -> float:
        """What to multiply standard normal noise by to get the first latents."""

    @property
    def fresh_noise(self) -> tuple[float, ...]:
        """By how much standard normal noise is to be added to the latents after each of the T
        steps; 0 but for LCM."""

    def model_input(self, latents: Array, step: int) -> Array:
        """Returns the latents scaled as the denoiser expects them at a step."""

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the next step's latents, without fresh noise, and the history to hand to the
        next step.

        Args:
            latents: What `model_input` was given.
            noise_pred: The denoiser's guided output for it (epsilon or v, as the config says).
            step: 0-based; steps run in order.
            history: Empty at step 0, then what the last call returned.
        """


def make_noise_scheduler(name: str, steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    """Returns a noise scheduler, its coefficients worked out.

    Args:
        name: One of `NAMES`; dpmsolver++ is the second-order multistep one (2M).
        steps: Sampler steps, 1 to `config.num_train_timesteps`.
        config: The noise schedule that the model was trained with.

    Raises:
        ScheduleError: The name is unknown, or these steps do not fit the noise schedule.
    """
    if name not in _MAKERS:
        raise ScheduleError(f'noise scheduler "{name}" is unknown: use {", ".join(NAMES)}')
    most = config.num_train_timesteps if name != "lcm" else _LCM_STEPS
    if not 1 <= steps <= most:
        raise ScheduleError(f"{name} cannot run {steps} steps: ask for 1 to {most}")
    if not _fits(name, steps, config):
        highest = next((n for n in range(steps, 0, -1) if _fits(name, n, config)), None)
        cure = f"ask for at most {highest}" if highest else "lower steps_offset"
        raise ScheduleError(
            f"{name} cannot run {steps} steps with {config.timestep_spacing} spacing and "
            f"steps_offset {config.steps_offset}: timesteps repeat or leave 0 to "
            f"{config.num_train_timesteps - 1}; {cure}"
        )
    return _MAKERS[name](steps, config)


@dataclass(frozen=True, slots=True, eq=False)
class _UnscaledInput:
    """What the samplers that work on unscaled latents share."""

    name: str
    steps: int
    timesteps: NDArray[np.float32]
    sigmas: tuple[float, ...]
    prediction_type: str

    @property
    def init_noise_sigma(self) -> float:
        return 1.0

    @property
    def fresh_noise(self) -> tuple[float, ...]:
        return (0.0,) * len(self.timesteps)

    def model_input(self, latents: Array, step: int) -> Array:  # noqa: ARG002 - the protocol's
        return latents


@dataclass(frozen=True, slots=True, eq=False)
class _Ddim(_UnscaledInput):
    moves: tuple[tuple[float, float], ...]  # (factor of latents, factor of noise_pred) by step

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        keep, add = self.moves[step]
        return keep * latents + add * noise_pred, history


@dataclass(frozen=True, slots=True, eq=False)
class _ClippedDdim(_UnscaledInput):
    """DDIM with its clean pictures within -1…1; the noise stays what was predicted."""

    clean: tuple[tuple[float, float], ...]  # factors that turn latents, prediction into x0
    noise: tuple[tuple[float, float], ...]  # and into noise
    ends: tuple[tuple[float, float], ...]  # of x0 and noise in the next latents

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        x0, noise = (
            of_latents * latents + of_prediction * noise_pred
            for of_latents, of_prediction in (self.clean[step], self.noise[step])
        )
        signal, spread = self.ends[step]
        return signal * x0.clip(-1, 1) + spread * noise, history


_ADAMS_BASHFORTH = {  # weights of the newest noise prediction, the one before, …
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True, slots=True, eq=False)
class _Pndm(_UnscaledInput):
    """Step 1 repeats step 0's move with the mean of both predictions (Heun), then multistep.

    History is (prediction, latents) after step 0, then the last three predictions, newest first,
    without step 1's.
    """

    moves: tuple[tuple[float, float], ...]

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        keep, add = self.moves[step]
        if step == 0:
            return keep * latents + add * noise_pred, (noise_pred, latents)
        if step == 1:
            first, start = history
            return keep * start + (add / 2) * (noise_pred + first), (first,)
        predictions = (noise_pred, *history)
        weights = _ADAMS_BASHFORTH[len(predictions)]
        mean = sum(w * p for w, p in zip(weights, predictions, strict=True))
        return keep * latents + add * mean, predictions[:3]


@dataclass(frozen=True, slots=True, eq=False)
class _Euler:
    name: str
    steps: int
    timesteps: NDArray[np.float32]
    sigmas: tuple[float, ...]
    prediction_type: str
    init_noise_sigma: float
    input_factors: tuple[float, ...]
    moves: tuple[tuple[float, float], ...]

    @property
    def fresh_noise(self) -> tuple[float, ...]:
        return (0.0,) * len(self.timesteps)

    def model_input(self, latents: Array, step: int) -> Array:
        return self.input_factors[step] * latents

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        keep, add = self.moves[step]
        return keep * latents + add * noise_pred, history


@dataclass(frozen=True, slots=True, eq=False)
class _Lcm(_UnscaledInput):
    """Each step predicts the clean latents; the next starts from them, noised anew."""

    moves: tuple[tuple[float, float], ...]
    noise: tuple[float, ...]

    @property
    def fresh_noise(self) -> tuple[float, ...]:
        return self.noise

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        keep, add = self.moves[step]
        return keep * latents + add * noise_pred, history


@dataclass(frozen=True, slots=True, eq=False)
class _DpmSolver(_UnscaledInput):
    """History is the last step's predicted clean latents."""

    clean: tuple[tuple[float, float], ...]  # factors that turn latents, noise_pred into x0
    moves: tuple[tuple[float, float, float], ...]  # factors of latents, x0, x0 - last x0

    def advance(
        self, latents: Array, noise_pred: Array, step: int, history: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        of_latents, of_noise = self.clean[step]
        x0 = of_latents * latents + of_noise * noise_pred
        keep, add, slope = self.moves[step]
        latents = keep * latents + add * x0
        if slope:
            latents = latents + slope * (x0 - history[0])
        return latents, (x0,)


def _shared(
    name: str, steps: int, timesteps: NDArray[Any], config: NoiseScheduleConfig
) -> tuple[str, int, NDArray[np.float32], tuple[float, ...], str]:
    """Returns the fields that all samplers begin with."""
    sigmas = _sigmas(timesteps, config)
    return name, steps, timesteps.astype(np.float32), sigmas, config.prediction_type


def _make_ddim(steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    timesteps = _spaced(steps, config).astype(int)
    jump = config.num_train_timesteps // steps
    moves = tuple(_move(t, t - jump, config) for t in timesteps)
    shared = (
        "ddim",
        steps,
        timesteps.astype(np.float32),
        _sigmas(timesteps, config),
        config.prediction_type,
    )
    if not config.clip_sample:
        return _Ddim(*shared, moves)
    starts = [math.sqrt(float(config.alphas_bar()[t])) for t in timesteps]
    spreads = [math.sqrt(1 - a**2) for a in starts]
    ends = [math.sqrt(_alpha_bar(t - jump, config)) for t in timesteps]
    epsilon = config.prediction_type == "epsilon"
    clean = [(1 / a, -s / a) if epsilon else (a, -s) for a, s in zip(starts, spreads, strict=True)]
    noise = [(0.0, 1.0) if epsilon else (s, a) for a, s in zip(starts, spreads, strict=True)]
    after = tuple((b, math.sqrt(1 - b**2)) for b in ends)
    return _ClippedDdim(*shared, tuple(clean), tuple(noise), after)


def _make_pndm(steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    timesteps = _spaced(steps, config).astype(int)
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])  # the second one twice
    jump = config.num_train_timesteps // steps
    starts = timesteps.copy()
    starts[1:2] += jump  # step 1 moves from where step 0 did
    moves = tuple(_move(t, t - jump, config) for t in starts)
    return _Pndm(*_shared("pndm", steps, timesteps, config), moves)


def _make_euler(steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    timesteps = _spaced(steps, config, whole=False)
    sigmas = _sigmas(timesteps, config)
    widths = [later - sigma for sigma, later in zip(sigmas, [*sigmas[1:], 0.0], strict=True)]
    factors = [1 / math.sqrt(sigma**2 + 1) for sigma in sigmas]
    if config.prediction_type == "epsilon":
        moves = tuple((1.0, width) for width in widths)
    else:  # the derivative is sigma / (sigma² + 1) · latents + v / sqrt(sigma² + 1)
        moves = tuple(
            (1 + width * sigma * factor**2, width * factor)
            for sigma, width, factor in zip(sigmas, widths, factors, strict=True)
        )
    leading = config.timestep_spacing == "leading"
    start = math.hypot(sigmas[0], 1) if leading else sigmas[0]
    rounded = timesteps.astype(np.float32)
    return _Euler(
        "euler", steps, rounded, sigmas, config.prediction_type, start, tuple(factors), moves
    )


def _make_dpmsolver(steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    timesteps = _spaced(steps, config, ends_at_zero=False)
    sigmas = _sigmas(timesteps, config)
    alphas = [1 / math.sqrt(sigma**2 + 1) for sigma in sigmas]
    if config.prediction_type == "epsilon":
        clean = tuple((1 / alpha, -sigma) for alpha, sigma in zip(alphas, sigmas, strict=True))
    else:
        clean = tuple((alpha, -sigma * alpha) for alpha, sigma in zip(alphas, sigmas, strict=True))
    moves = [(0.0, 1.0, 0.0)]  # the last step goes to sigma 0, where latents are x0
    lambdas = [-math.log(sigma) for sigma in sigmas]
    for step in reversed(range(steps - 1)):
        h = lambdas[step + 1] - lambdas[step]
        keep = sigmas[step + 1] * alphas[step + 1] / (sigmas[step] * alphas[step])
        add = -alphas[step + 1] * math.expm1(-h)
        slope = add * h / (2 * (lambdas[step] - lambdas[step - 1])) if step else 0.0
        moves.insert(0, (keep, add, slope))
    rounded = timesteps.astype(np.float32)
    return _DpmSolver(
        "dpmsolver++", steps, rounded, sigmas, config.prediction_type, clean, tuple(moves)
    )


def _make_lcm(steps: int, config: NoiseScheduleConfig) -> NoiseScheduler:
    timesteps = _lcm_timesteps(steps, config)
    alphas_bar = config.alphas_bar()[timesteps]
    moves = []
    for timestep, a in zip(timesteps, alphas_bar, strict=True):
        scaled = float(timestep) * _LCM_TIMESTEP_SCALING
        skip = _LCM_DATA_SIGMA**2 / (scaled**2 + _LCM_DATA_SIGMA**2)
        out = scaled / math.hypot(scaled, _LCM_DATA_SIGMA)
        keep, add = (1 / math.sqrt(a), -math.sqrt((1 - a) / a))  # of the clean latents
        if config.prediction_type == "v_prediction":
            keep, add = math.sqrt(a), -math.sqrt(1 - a)
        moves.append((skip + out * keep, out * add))
    after = [*alphas_bar[1:].tolist(), 1.0]  # the last step's latents stay as they are
    roots = [math.sqrt(b) for b in after]
    moves = [(root * keep, root * add) for root, (keep, add) in zip(roots, moves, strict=True)]
    noise = tuple(math.sqrt(1 - b) for b in after)
    sigmas = _sigmas(timesteps, config)
    return _Lcm(
        "lcm",
        steps,
        timesteps.astype(np.float32),
        sigmas,
        config.prediction_type,
        tuple(moves),
        noise,
    )


_MAKERS: dict[str, Callable[[int, NoiseScheduleConfig], NoiseScheduler]] = {
    "ddim": _make_ddim,
    "pndm": _make_pndm,
    "euler": _make_euler,
    "dpmsolver++": _make_dpmsolver,
    "lcm": _make_lcm,
}


def _move(start: int, end: int, config: NoiseScheduleConfig) -> tuple[float, float]:
    """Returns factors (keep, add): latents at `end` = keep · latents + add · prediction.

    Source: DDIM's formula 12 at eta 0, which PNDM's formula 9 equals; `end` < 0 is the end.
    """
    a, b = _alpha_bar(start, config), _alpha_bar(end, config)
    if config.prediction_type == "epsilon":
        return math.sqrt(b / a), math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)
    return (
        math.sqrt(a * b) + math.sqrt((1 - a) * (1 - b)),
        math.sqrt(a * (1 - b)) - math.sqrt(b * (1 - a)),
    )


def _alpha_bar(timestep: int, config: NoiseScheduleConfig) -> float:
    """Returns ᾱ at a timestep; one below 0 is the end."""
    alphas_bar = config.alphas_bar()
    if timestep >= 0:
        return float(alphas_bar[timestep])
    return 1.0 if config.set_alpha_to_one else float(alphas_bar[0])


def _sigmas(timesteps: NDArray[Any], config: NoiseScheduleConfig) -> tuple[float, ...]:
    """Returns sigma at each timestep, straight lines between the training timesteps'."""
    alphas_bar = config.alphas_bar()
    trained = np.sqrt((1 - alphas_bar) / alphas_bar)
    return tuple(np.interp(timesteps, np.arange(len(trained)), trained).tolist())


def _spaced(
    steps: int, config: NoiseScheduleConfig, *, whole: bool = True, ends_at_zero: bool = True
) -> NDArray[np.float64]:
    """Returns (steps,) timesteps, falling.

    Args:
        steps: How many.
        config: Says how they are spaced (table 2 of arXiv 2305.08891).
        whole: Whether linspace rounds (all but Euler).
        ends_at_zero: Whether timestep 0 (before the offset) is among them (all but DPM-Solver,
            which takes one more and drops it).
    """
    count = config.num_train_timesteps
    taken = steps if ends_at_zero else steps + 1
    if config.timestep_spacing == "leading":
        falling = np.arange(taken, dtype=np.float64)[::-1][:steps]
        return falling * (count // taken) + config.steps_offset
    if config.timestep_spacing == "linspace":
        spaced = np.linspace(0, count - 1, taken)[::-1][:steps]
        return np.round(spaced) if whole else spaced
    return np.round(count - np.arange(steps, dtype=np.float64) * (count / steps)) - 1


def _lcm_timesteps(steps: int, config: NoiseScheduleConfig) -> NDArray[np.int64]:
    """Returns (steps,) of the timesteps that consistency models are distilled on, falling."""
    distilled = np.arange(_LCM_STEPS, 0, -1) * (config.num_train_timesteps // _LCM_STEPS) - 1
    taken = np.floor(np.linspace(0, _LCM_STEPS, steps, endpoint=False)).astype(int)
    timesteps: NDArray[np.int64] = distilled[taken]
    return timesteps


def _fits(name: str, steps: int, config: NoiseScheduleConfig) -> bool:
    """Says whether the timesteps fall strictly and lie in the trained range."""
    timesteps: NDArray[Any] = (
        _lcm_timesteps(steps, config)
        if name == "lcm"
        else _spaced(steps, config, whole=name != "euler", ends_at_zero=name != "dpmsolver++")
    )
    inside = timesteps[0] < config.num_train_timesteps and timesteps[-1] >= 0
    return bool(inside and (np.diff(timesteps) < 0).all())


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ScheduleError(f'{key} is "{value}": it must be one of {", ".join(allowed)}')
