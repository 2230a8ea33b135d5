"""Noise schedules in float64: x_t = alpha_t*x_0 + sigma_t*eps, and the grids of points at which a sampler calls the model.

DiscreteSchedule: DDPM betas (variance preserving). KarrasSchedule: EDM's noise levels (alpha = 1). FlowSchedule: rectified
flow (alpha = 1 - sigma). None of them knows a sampler, a model or lambda.
"""

import dataclasses
import math
import reprlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .typing import Array, Steps

__all__ = [
    "DiscreteSchedule", "FlowSchedule", "Grid", "KarrasSchedule", "cosine", "from_betas", "karras_sigmas", "linear",
    "scaled_linear",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """N model calls, the noisiest first, and the point where the last step ends.

    t, alpha, sigma, c_in: float64 (N,). t is what the model is told; c_in scales its input. discrete: t counts timesteps.
    initial_sigma: standard deviation of the latent to start from.
    """

    t: Array
    alpha: Array
    sigma: Array
    c_in: Array
    initial_sigma: float
    alpha_end: float = 1.0
    sigma_end: float = 0.0
    discrete: bool = True

    @property
    def alpha_next(self) -> Array:
        """alpha where each step ends: float64 (N,)."""
        return np.append(self.alpha[1:], self.alpha_end)

    @property
    def sigma_next(self) -> Array:
        """sigma where each step ends: float64 (N,)."""
        return np.append(self.sigma[1:], self.sigma_end)

    def __len__(self) -> int:
        return len(self.t)


def _readonly(values: ArrayLike) -> Array:
    copy = np.array(np.asarray(values, dtype=np.float64))  # in two: NumPy 2 warns of a copy of a tensor
    copy.setflags(write=False)
    return copy


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


# ---- DDPM betas ----


class DiscreteSchedule:
    """T timesteps with alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), abar_t = prod(1 - beta).

    betas: (T,) in [0, 1], the first above 0. Raises ValueError for others, such as alphas_cumprod.
    Source: Ho et al., arXiv 2006.11239, eq. 4.
    """

    def __init__(self, betas: ArrayLike, name: str = "betas"):
        betas = _readonly(betas)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas: expected shape (T,) with T >= 1, got {betas.shape}")
        bad = np.flatnonzero(~((betas >= 0) & (betas <= 1)))
        if bad.size:
            raise ValueError(f"betas: expected values in [0, 1], got {betas[bad[0]]} at {bad[0]}")
        if len(betas) > 1 and betas[0] > 0.5 and (np.diff(betas) < 0).all():
            raise ValueError(
                f"betas: expected small ones first, got values that fall from {betas[0]:.6g} to {betas[-1]:.6g}, as alphas and "
                "alphas_cumprod do; a beta is 1 - alphas[t], or 1 - alphas_cumprod[t]/alphas_cumprod[t - 1]"
            )
        if betas[0] == 0:
            raise ValueError("betas: expected the first above 0, got 0: its timestep would have no noise to remove")
        self.betas, self.name = betas, name
        self.abar = _readonly(np.cumprod(1 - betas))
        self.alpha, self.sigma = _readonly(np.sqrt(self.abar)), _readonly(np.sqrt(1 - self.abar))

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"DiscreteSchedule({self.name}, T={len(self)})"

    def zero_terminal_snr(self) -> "DiscreteSchedule":
        """The schedule shifted and scaled so that alpha is 0 at the last timestep (Lin et al., arXiv 2305.08891, alg. 1)."""
        alpha = (self.alpha - self.alpha[-1]) * self.alpha[0] / (self.alpha[0] - self.alpha[-1])
        abar = alpha**2
        return DiscreteSchedule(1 - np.append(abar[0], abar[1:] / abar[:-1]), f"{self.name}, zero terminal SNR")

    def timesteps(self, steps: Steps, spacing: str = "leading", steps_offset: int = 0) -> NDArray[np.int64]:
        """The timesteps of `steps` model calls, the noisiest first: int64 (N,).

        steps: a count, spaced by `spacing` ("leading", "trailing" or "linspace", as in diffusers; steps_offset is added to
        "leading"); ADM's section counts as a string ("100", "10,10,20" from the cleanest section up, "ddim25"); or the
        timesteps themselves, strictly decreasing. A string or a list says its timesteps itself: spacing and steps_offset have no
        part in it. Raises ValueError for anything else.
        """
        T = len(self)
        t: np.ndarray
        if (isinstance(steps, str) or np.ndim(steps) == 1) and (spacing, steps_offset) != ("leading", 0):
            raise ValueError(
                f"spacing, steps_offset: expected none where steps tells the timesteps, as {reprlib.repr(steps)} does, got "
                f"{spacing!r}, {steps_offset!r}"
            )
        if isinstance(steps, str):
            t = _section_timesteps(T, steps)[::-1]
        elif np.ndim(steps) == 1:
            t = np.asarray(steps)
            if not np.issubdtype(t.dtype, np.integer):
                raise ValueError(f"steps: expected integer timesteps, got dtype {t.dtype}")
        else:
            n = _positive_int("steps", steps)
            if not isinstance(steps_offset, (int, np.integer)):
                raise ValueError(f"steps_offset: expected an integer, got {steps_offset!r}")
            if n > T:
                raise ValueError(f"steps: expected at most T = {T}, got {n}")
            if spacing == "leading":
                t = np.arange(n)[::-1] * (T // n) + steps_offset
            elif spacing == "trailing":
                t = np.round(np.arange(T, 0, -T / n)[:n]) - 1  # diffusers' own arange: its rounding decides the ties
            elif spacing == "linspace":
                t = np.round(np.linspace(0, T - 1, n))[::-1]
            else:
                raise ValueError(f"spacing: expected 'leading', 'trailing' or 'linspace', got {spacing!r}")
        t = np.asarray(t).astype(np.int64)
        if t.size == 0 or t.min() < 0 or t.max() >= T or (np.diff(t) >= 0).any():
            raise ValueError(
                f"steps: expected strictly decreasing timesteps in [0, {T}), got {reprlib.repr(t.tolist())}"
            )
        return t

    def grid(self, steps: Steps, spacing: str = "leading", steps_offset: int = 0, final: str = "clean") -> Grid:
        """The grid of those timesteps. final: where the last step ends, "clean" (alpha 1) or "first" (timestep 0: LDM, and
        diffusers' set_alpha_to_one=False)."""
        t = self.timesteps(steps, spacing, steps_offset)
        if final not in ("clean", "first"):
            raise ValueError(f"final: expected 'clean' or 'first', got {final!r}")
        end = (1.0, 0.0) if final == "clean" else (self.alpha[0], self.sigma[0])
        return Grid(t.astype(np.float64), self.alpha[t], self.sigma[t], np.ones(len(t)), 1.0, *end)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas rising linearly (DDPM, ADM's "linear" at T = 1000)."""
    return DiscreteSchedule(np.linspace(beta_start, beta_end, _positive_int("T", T)), "linear")


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """Square roots of betas rising linearly (latent diffusion)."""
    return DiscreteSchedule(np.linspace(beta_start**0.5, beta_end**0.5, _positive_int("T", T)) ** 2, "scaled_linear")


def cosine(T: int = 1000, max_beta: float = 0.999) -> DiscreteSchedule:
    """diffusers' squaredcos_cap_v2 (Nichol and Dhariwal, arXiv 2102.09672, eq. 17, s = 0.008)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = _positive_int("T", T)
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta: expected a value in (0, 1], got {max_beta}")
    return DiscreteSchedule([min(1 - abar((i + 1) / T) / abar(i / T), max_beta) for i in range(T)], "cosine")


def from_betas(betas: ArrayLike) -> DiscreteSchedule:
    """Any betas, (T,) in [0, 1]."""
    return DiscreteSchedule(betas)


def _section_timesteps(T: int, counts: str) -> NDArray[np.int64]:
    """ADM's respacing: T cut into equal sections, each with its own count, evenly spaced and rounded; ascending."""
    if counts.startswith("ddim"):
        wanted, *more = _parse_counts(counts[4:], counts)
        if more:
            raise ValueError(f"steps: expected one count after 'ddim', got {counts!r}")
        for stride in range(1, T):
            if len(range(0, T, stride)) == wanted:
                return np.arange(0, T, stride)
        raise ValueError(f"steps: no integer stride through T = {T} gives {wanted} timesteps ({counts!r})")
    sections = _parse_counts(counts, counts)
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        size = T // len(sections) + (1 if i < T % len(sections) else 0)
        if count > size:
            raise ValueError(f"steps: section {i} of {counts!r} has {size} timesteps, expected at least {count}")
        distance = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += distance  # a running sum, as in ADM: its rounding decides the ties
        start += size
    return np.array(chosen)


def _parse_counts(text: str, whole: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"steps: expected counts such as '100', '10,20' or 'ddim25', got {whole!r}")
    return counts


# ---- EDM noise levels ----


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """(steps,) noise levels from sigma_max down to sigma_min (Karras et al., arXiv 2206.00364, eq. 5)."""
    n = _positive_int("steps", steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: expected a value above 0, got {rho}")
    ramp = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


class KarrasSchedule:
    """EDM's path: alpha = 1, sigma from sigma_max to sigma_min by eq. 5 of arXiv 2206.00364, then 0.

    Without `model`, the network is a denoiser that is told sigma itself (EDM's own; prediction "sample").
    sigma_min, sigma_max default to EDM's 0.002 and 80.
    model: a DiscreteSchedule, for a network trained on its timesteps: it is fed x/sqrt(1 + sigma^2) and the timestep whose
    noise-to-signal ratio is sigma (interpolated in log sigma); the defaults are then held to the ratios that it has seen.
    Raises ValueError for noise levels outside of those.
    """

    def __init__(
        self,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        model: DiscreteSchedule | None = None,
    ):
        if model is not None and not isinstance(model, DiscreteSchedule):
            raise TypeError(f"model: expected a DiscreteSchedule, got {type(model).__name__}")
        if model is not None and model.abar[-1] == 0:
            raise ValueError("model: expected a schedule with alpha > 0, got one with zero terminal SNR")
        self.model, self.rho = model, rho
        self._ratios = np.array([0.0, np.inf]) if model is None else model.sigma / model.alpha
        self.sigma_min = float(max(0.002, self._ratios[0]) if sigma_min is None else sigma_min)
        self.sigma_max = float(min(80.0, self._ratios[-1]) if sigma_max is None else sigma_max)
        self.grid(2)

    def __repr__(self) -> str:
        return f"KarrasSchedule({self.sigma_min:.4g}..{self.sigma_max:.4g}, rho={self.rho})"

    def grid(self, steps: int) -> Grid:
        """The grid of `steps` noise levels."""
        return self.grid_at(karras_sigmas(steps, self.sigma_min, self.sigma_max, self.rho))

    def grid_at(self, sigma: ArrayLike) -> Grid:
        """The grid of given noise levels, (N,) decreasing."""
        sigma = np.asarray(sigma, dtype=np.float64)
        if sigma.ndim != 1 or sigma.size == 0 or not (np.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError(f"sigma: expected (N,) finite values above 0, got {sigma.tolist()}")
        low, high = self._ratios[0], self._ratios[-1]
        outside = (sigma < low * (1 - 1e-9)) | (sigma > high * (1 + 1e-9))
        if outside.any():
            raise ValueError(f"sigma: expected values in [{low:.6g}, {high:.6g}], got {sigma[outside][0]:.6g}")
        if self.model is None:
            return Grid(sigma, np.ones_like(sigma), sigma, np.ones_like(sigma), sigma[0], discrete=False)
        t = np.interp(np.log(sigma), np.log(self._ratios), np.arange(len(self.model)))
        return Grid(t, np.ones_like(sigma), sigma, 1 / np.sqrt(1 + sigma**2), sigma[0], discrete=False)


class FlowSchedule:
    """Rectified flow: alpha = 1 - sigma, sigma = shift*s/(1 + (shift - 1)*s) for s from 1 down to 0; the model is told T*sigma.

    Source: Esser et al., arXiv 2403.03206, eq. 23.
    """

    def __init__(self, shift: float = 1.0, T: int = 1000):
        if not 0 < shift < math.inf:
            raise ValueError(f"shift: expected a value above 0, got {shift}")
        self.shift, self.T = shift, _positive_int("T", T)

    def __repr__(self) -> str:
        return f"FlowSchedule(shift={self.shift}, T={self.T})"

    def grid(self, steps: int) -> Grid:
        """The grid of `steps` evenly spaced s, from 1 to 1/steps."""
        s = np.linspace(1, 0, _positive_int("steps", steps) + 1)[:-1]
        sigma = self.shift * s / (1 + (self.shift - 1) * s)
        return Grid(self.T * sigma, 1 - sigma, sigma, np.ones_like(sigma), sigma[0], discrete=False)
