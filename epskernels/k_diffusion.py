"""k-diffusion's samplers by its own signatures, with Epsilon Scaling: sample_euler(model, x, sigmas, ...), and so on.

model(x, sigma, **extra_args): any denoiser of x = x_0 + sigma*eps; a flow's is refused where that can be told.
sigmas: (N + 1,) for N steps; they must not rise. Every table is that of `samplers` there; an update is one launch.
eps_scaling: lambda, in any form that scaling.as_scaling takes: denoised' = x - (x - denoised)/lambda. Above sigma 900 x
is noise alone, and lambda is 1. seeds: (B,), for noise made in the kernel. Without them the noise comes from
noise_sampler(sigma, sigma_next), by default torch.randn_like, also where k-diffusion has a Brownian tree.
`scale_denoised` is the scaling alone, for a loop of one's own.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from . import samplers, scaling, solvers
from .ops import DTYPES, as_seeds, step
from .schedule import Grid, KarrasSchedule
from .spec import COLUMNS
from .table import Table, denoising_rows
from .trajectory import Trajectory
from .typing import Array

Denoiser = Callable[..., Tensor]
Sigmas = Tensor | Sequence[float]
Extra = dict[str, Any] | None  # the model's other arguments
Callback = Callable[[dict[str, Any]], Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor] | None
Seeds = Tensor | Iterable[SupportsIndex] | None


class _Levels(KarrasSchedule):
    """A caller's noise levels. If the last is above 0, the table gets a step from there to 0, which is not run."""

    def __init__(self, levels: Array):
        self.model, self._ratios = None, np.array([0.0, np.inf])
        self.levels = levels[levels > 0]

    def grid(self, steps: int) -> Grid:
        """The grid of the levels, however many `steps` says."""
        return self.grid_at(self.levels)


class _Sampling:
    """A run of N steps. Raises ValueError or TypeError, naming the argument, before the model is called.

    calls: of the levels, (N + 1,): how many model calls each step has, (N,); None for one. churn: (s_churn, s_tmin, s_tmax,
    s_noise) for EDM's samplers, None for the others. slope_first: whether k-diffusion forms the slope before it calls back.
    middle: where, in log sigma, the noise after the first of a step's two calls ends; None where there is none. dpm: whether
    the callback is told t, too.
    """

    def __init__(
        self,
        sampler: Callable[..., Table],
        x: Tensor,
        sigmas: Sigmas,
        levels: Array,
        eps_scaling: scaling.ScalingLike,
        seeds: Tensor | None,
        noise_sampler: NoiseSampler,
        *,
        calls: Callable[[Array], NDArray[np.int64]] | None,
        churn: tuple[float, float, float, float] | None,
        slope_first: bool,
        middle: float | None,
        dpm: bool,
        options: dict[str, Any],
    ):
        self.levels, self.seeds, self.noise_sampler = levels, seeds, noise_sampler
        self.slope_first, self.middle, self.dpm = slope_first, middle, dpm
        self.sigmas = (
            sigmas if isinstance(sigmas, Tensor) else torch.tensor(levels, dtype=torch.float32, device=x.device)
        )
        hats, self.first_churn, self.edm = levels[:-1], 0.0, churn is not None
        if churn is not None:
            hats, self.first_churn, options = _churned(levels, *churn)
        lambda_t = scaling.lambdas(
            scaling.as_scaling(eps_scaling, "eps_scaling"), scaling.noise_alone(1.0, hats, 1.0), "eps_scaling"
        )
        # A step of length 0 leaves x as it is. EDM's tables have rows for it; in the others, history would divide by 0.
        self.moves = (np.diff(levels) < 0) | self.edm
        grid = _Levels(np.append(levels[:-1][self.moves], levels[-1]))
        lambda_t = np.append(lambda_t[self.moves], lambda_t[-1])[: len(grid.levels)]
        self.table = sampler(
            grid, len(grid.levels), scaling=scaling.array(lambda_t, origin="noisiest"), prediction="sample", **options
        ).to(x.device)
        # rows[i]: the rows of step i, one for each model call. A step of length 0 has one call, and shares the next row.
        of_step = np.where(self.moves, 1 if calls is None else calls(levels), 0)
        begins = np.cumsum(of_step) - of_step
        ends = begins + np.maximum(of_step, 1)
        self.rows = [range(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        self.noisy, self.coefficients = self.table["c_noise"] != 0, self.table.rows
        if self.edm and levels[-1] > 0:  # its last row has the churn of the step that is not run
            last = self.rows[-1][-1]
            self.noisy = self.noisy & (np.arange(len(self.table)) != last)
            self.coefficients = self.coefficients.clone()
            self.coefficients[last, COLUMNS.index("c_noise")] = 0.0
        self.churns = churn is not None and churn[0] > 0

    def noise(self, x: Tensor, i: int, added: bool, drawn: bool, middle: float | None = None) -> dict[str, Any]:
        """Step i's noise, as an input of the op; none if it is not added.

        drawn: whether k-diffusion draws it nevertheless. torch's generator must then go on as it does there. middle: where it
        ends, if not where the step does.
        """
        if self.seeds is not None:
            return {"seeds": self.seeds} if added else {}
        if self.noise_sampler is not None:
            if not added:
                return {}
            ends = self.sigmas[i], self.sigmas[i + 1]
            if self.middle is not None:  # as there by way of the logarithm, to the last bit: a Brownian tree sees it
                t, t_next = -ends[0].log(), -ends[1].log()
                ends = (-t).exp(), (-(t_next if middle is None else t + (t_next - t) * middle)).exp()
            return {"noise": self.noise_sampler(*ends).to(x.dtype)}
        noise = torch.randn_like(x) if added or drawn else None
        return {"noise": noise} if noise is not None and added else {}

    def noise_of_row(self, x: Tensor, i: int, row: int) -> dict[str, Any]:
        """A step's noise; in EDM's samplers the churn before the next step."""
        is_last = row == self.rows[i][-1]
        if not self.edm:
            return self.noise(x, i, self.noisy[row], False, None if is_last else self.middle)
        return self.noise(x, i + 1, self.noisy[row], self.churns and is_last and i + 1 < len(self.rows))

    def begin(self, x: Tensor) -> Tensor:
        """x with the churn before the first step: no row comes before it to add it."""
        noise = self.noise(x, 0, self.first_churn > 0, self.churns)
        if not noise:
            return x
        return step(x, x, *_sample_rows(x, c_x=1.0, c_noise=self.first_churn, draw=len(self.table)), **noise)

    def tell(
        self, callback: Callable[[dict[str, Any]], Any], i: int, row: int, x: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls the callback, which may write to x and to denoised. Returns (x, f, coefficients) for the update.

        As in k-diffusion, samplers that form their slope first keep copies; the others read what was written.
        """
        denoised = f
        if self.table["lambda_t"][row] != 1:  # in float32: the update then has the same bits as without a callback
            scaled = denoising_rows(self.table.rows)
            scaled[:, COLUMNS.index("c_m0")] = 1.0
            if not self.table.keeps_x0:
                by = 1 / self.table["lambda_t"][row]
                scaled[:, COLUMNS.index("d_x")], scaled[:, COLUMNS.index("d_f")] = 1 - by, by
            denoised = step(x.float(), f, scaled, self.table.row_index[row])
        kept = (x.clone(), f.clone() if denoised is f else f) if self.slope_first else (x, denoised)
        sigma_hat = self.sigmas[i] * (self.table["t"][row] / self.levels[i])
        info = {"x": x, "i": i, "sigma": self.sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised}
        if self.dpm:
            info |= {"t": -self.sigmas[i].log(), "t_up": -self.sigmas[i].log()}
        callback(info)
        coefficients = self.coefficients
        if not self.slope_first:
            coefficients = coefficients.clone()
            coefficients[:, COLUMNS.index("d_x")], coefficients[:, COLUMNS.index("d_f")] = 0.0, 1.0
        return *kept, coefficients

    def run(
        self, model: Denoiser, x: Tensor, extra_args: dict[str, Any], callback: Callback, disable: bool | None
    ) -> Tensor:
        """The state after the last step."""
        trajectory = Trajectory(self.table, self.begin(x))
        for i in tqdm(range(len(self.rows)), disable=disable):
            for row in self.rows[i]:
                x, trajectory.rows = trajectory.x, self.coefficients
                f = _check_output(model(x, x.new_full((len(x),), self.table["t"][row]), **extra_args), x)
                state, tells = x, callback is not None and row == self.rows[i][0]
                if callback is not None and tells:
                    state, f, trajectory.rows = self.tell(callback, i, row, x, f)
                if not self.moves[i]:
                    self.noise(x, i, False, self.noisy.any())
                    continue
                trajectory.x = state
                noise = self.noise_of_row(x, i, row)
                trajectory.step(self.table.row_index[row], f, **noise, returns_m0=False)
                if tells and self.slope_first:
                    written = x - state  # by the callback: the slope is followed from there
                    trajectory.x = trajectory.x + written
                    if self.table.keeps_x0:
                        trajectory.m = [m + written for m in trajectory.m]
        return trajectory.x


def _run(
    sampler: Callable[..., Table],
    model: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Extra,
    callback: Callback,
    disable: bool | None,
    eps_scaling: scaling.ScalingLike,
    seeds: Seeds,
    noise_sampler: NoiseSampler = None,
    *,
    calls: Callable[[Array], NDArray[np.int64]] | None = None,
    churn: tuple[float, float, float, float] | None = None,
    slope_first: bool = False,
    middle: float | None = None,
    dpm: bool = False,
    **options: Any,
) -> Tensor:
    levels = _as_levels(sigmas)
    _check(model, x)
    chosen = None if seeds is None else _as_seeds(seeds, noise_sampler, x)
    if len(levels) < 2:
        return x
    with torch.no_grad():
        sampling = _Sampling(
            sampler, x, sigmas, levels, eps_scaling, chosen, noise_sampler,
            calls=calls, churn=churn, slope_first=slope_first, middle=middle, dpm=dpm, options=options,
        )  # fmt: skip
        return sampling.run(model, x, extra_args or {}, callback, disable)


def _twice(levels: Array) -> NDArray[np.int64]:
    """The calls of steps with two, of which one to 0 has one."""
    return np.where(levels[1:] > 0, 2, 1)


def _twice_down(eta: float) -> Callable[[Array], NDArray[np.int64]]:
    """The calls of ancestral steps with two, of which one down to 0 has one."""
    return lambda levels: np.where(solvers.ancestral(1.0, levels[:-1], 1.0, levels[1:], eta)[0] > 0, 2, 1)


def _churned(
    levels: Array, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Array, float, dict[str, float]]:
    """(each step's raised level, (N,); the standard deviation of the first step's churn; the options of EDM's tables)."""
    s_churn, s_noise = _number("s_churn", s_churn), _number("s_noise", s_noise)
    if np.isnan(s_tmin) or np.isnan(s_tmax):
        raise ValueError(f"s_tmin, s_tmax: expected numbers, got {s_tmin}, {s_tmax}")
    steps, grid_length = len(levels) - 1, int((levels > 0).sum())
    at = levels[:-1]
    gamma = np.where((s_tmin <= at) & (at <= s_tmax), min(s_churn / steps, 2**0.5 - 1), 0.0)
    first = s_noise * at[0] * np.sqrt((1 + gamma[0]) ** 2 - 1)
    # Its tables divide S_churn by their own count of steps, which may be one more.
    options = {"S_churn": s_churn * grid_length / steps, "S_min": s_tmin, "S_max": s_tmax, "S_noise": s_noise}
    return at * (1 + gamma), float(first), options


# ---- what is checked ----


def _as_levels(sigmas: Sigmas) -> Array:
    """(N + 1,) float64. Raises ValueError for levels that rise, are not finite, or are not above 0."""
    levels = np.array(sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas, dtype=np.float64)
    falls = levels.ndim == 1 and np.isfinite(levels).all() and (np.diff(levels) <= 0).all()
    if not falls or (len(levels) > 1 and not (levels[-2] > 0 and levels[-1] >= 0)):
        raise ValueError(
            "sigmas: expected (N + 1,) finite values above 0 that do not rise, of which the last may be 0, "
            f"got {reprlib.repr(levels.tolist())}"
        )
    return levels


def _number(name: str, value: Any, above_0: bool = False) -> float:
    """value as a float. Raises ValueError, naming the argument, for one below 0, or not above it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number < np.inf or (above_0 and number == 0):
        expected = "above 0" if above_0 else "of at least 0"
        raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")
    return number


def _noisy(eta: float, s_noise: float) -> dict[str, Any]:
    """The tables' options."""
    return {"eta": _number("eta", eta), "S_noise": _number("s_noise", s_noise)}


def _check(model: Denoiser, x: Tensor) -> None:
    """Raises ValueError for an x that the step does not take, or ComfyUI's model of a flow."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected (B, ...), float32, float16 or bfloat16, not empty, got {_shown(x)}")
    wrapped: Any = model
    for _ in range(4):  # ComfyUI's samplers are given a wrapper of a wrapper of the model
        if is_flow(getattr(wrapped, "model_sampling", None)):
            raise ValueError(
                "model: expected a denoiser of x_0 + sigma*eps, got ComfyUI's model of a flow, "
                "(1 - sigma)*x_0 + sigma*eps: take ComfyUI's own samplers, and the node in integrations/comfyui to scale it"
            )
        wrapped = getattr(wrapped, "inner_model", None)


def is_flow(model_sampling: object) -> bool:
    """Whether ComfyUI's `model_sampling` is a flow's: one of its classes is named CONST."""
    return any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)


def _as_seeds(seeds: Any, noise_sampler: NoiseSampler, x: Tensor) -> Tensor:
    """int64 (B,). Raises ValueError for another number of them, or beside a noise sampler."""
    if noise_sampler is not None:
        raise ValueError("seeds, noise_sampler: expected one of them, got both")
    seeds = as_seeds(seeds, x.device)
    if len(seeds) != len(x):
        raise ValueError(f"seeds: expected one for each of {len(x)} samples, got {len(seeds)}")
    return seeds


def _check_output(denoised: Any, x: Tensor) -> Tensor:
    """What the model returned. Raises ValueError for another shape or dtype."""
    if not isinstance(denoised, torch.Tensor) or denoised.shape != x.shape or denoised.dtype not in DTYPES:
        raise ValueError(
            f"model: expected an output of shape {tuple(x.shape)}, as x has, float32, float16 or bfloat16, "
            f"got {_shown(denoised)}"
        )
    return denoised


def _shown(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


# ---- the samplers ----


def sample_euler(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's Euler (arXiv 2206.00364, alg. 2). noise_sampler and seeds are for the churn."""
    return _run(
        samplers.edm_euler, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True,
    )  # fmt: skip


def sample_heun(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's Heun (arXiv 2206.00364, alg. 2): two model calls in a step. noise_sampler and seeds are for the churn."""
    return _run(
        samplers.edm_heun, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True, calls=_twice,
    )  # fmt: skip


def sample_dpm_2(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's algorithm 2 with the slope of the step's middle: two model calls in a step. noise_sampler and seeds are for the
    churn."""
    return _run(
        samplers.dpm_2, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True, calls=_twice,
    )  # fmt: skip


def sample_euler_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Euler down to sigma_down, then noise up."""
    return _run(
        samplers.euler_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise),
    )  # fmt: skip


def sample_dpm_2_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """sample_dpm_2 down to sigma_down, then noise up: two model calls in a step, one and no noise where sigma_down is 0."""
    options = _noisy(eta, s_noise)
    return _run(
        samplers.dpm_2_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        calls=_twice_down(options["eta"]), **options,
    )  # fmt: skip


def sample_dpmpp_2s_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S), ancestral: two model calls in a step, one where sigma_down is 0."""
    options = _noisy(eta, s_noise)
    return _run(
        samplers.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        calls=_twice_down(options["eta"]), **options,
    )  # fmt: skip


def sample_lms(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    order: int = 4, *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Linear multistep of order 1 to 4. It draws no noise: seeds are taken as in the other samplers, and change nothing."""
    return _run(
        samplers.lms, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, slope_first=True, order=order
    )


def sample_dpmpp_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, r: float = 1 / 2,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++, SDE: two model calls in a step, and noise after each; r: where the second lies in log sigma, in (0, 1]."""
    return _run(
        samplers.dpmpp_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        calls=_twice, middle=r, r=r, **_noisy(eta, s_noise),
    )  # fmt: skip


def sample_dpmpp_2m(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M). It draws no noise: seeds are taken as in the other samplers, and change nothing."""
    return _run(
        samplers.dpmpp_2m, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, lower_order_final=False
    )


def sample_dpmpp_2m_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, solver_type: str = "midpoint",
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), SDE; solver_type "midpoint" or "heun"."""
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type: expected 'midpoint' or 'heun', got {solver_type!r}")
    return _run(
        samplers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise), solver=solver_type, lower_order_final=False,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M), SDE."""
    return _run(
        samplers.dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise), lower_order_final=False,
    )  # fmt: skip


def sample_dpm_fast(
    model: Denoiser, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (arXiv 2206.00927, section 3.4): n model calls in n//3 + 1 steps of orders 3, 3, ..., equal in log sigma.

    It ends at sigma_min, above 0. An array of lambda has a value for each step.
    """
    _check_ends(sigma_min, sigma_max)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n: expected an integer of at least 1, got {n!r}")
    steps = int(n) // 3 + 1
    orders = [3] * (steps - 2) + [2, 1] if n % 3 == 0 else [3] * (steps - 1) + [int(n) % 3]
    start, end = (-torch.tensor([float(sigma_max), float(sigma_min)]).log()).tolist()
    sigmas = (-torch.linspace(start, end, steps + 1)).exp().to(x.device if isinstance(x, Tensor) else "cpu")
    return _run(
        samplers.dpm_solver, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        calls=lambda levels: np.array(orders), slope_first=True, dpm=True,
        order=[*orders, 1], least=float(sigmas[-1]), **_noisy(eta, s_noise),
    )  # fmt: skip


def sample_dpm_adaptive(
    model: Denoiser, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05,
    pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler = None, return_info: bool = False,
    *, eps_scaling: scaling.ScalingLike = 1.0, seeds: Seeds = None,
) -> Tensor | tuple[Tensor, dict[str, int]]:  # fmt: skip
    """DPM-Solver-12 or 23 (arXiv 2206.00927, appendix C): steps as long as the two orders agree.

    It ends at sigma_min, above 0; the error is one number of the whole batch, which the host waits for. eps_scaling: one
    number, since the steps are not known. With seeds, the k-th accepted step has the k-th noise. return_info: also {"steps",
    "nfe", "n_accept", "n_reject"}.
    """
    _check_ends(sigma_min, sigma_max)
    _check(model, x)
    if order not in (2, 3):
        raise ValueError(f"order: expected 2 or 3, got {order!r}")
    lambda_t = scaling.as_scaling(eps_scaling, "eps_scaling")
    if lambda_t.spec is None or lambda_t.spec["kind"] != "constant":
        raise ValueError(f"eps_scaling: expected one number, since the steps are not known, got {eps_scaling!r}")
    options = _noisy(eta, s_noise)
    chosen = None if seeds is None else _as_seeds(seeds, noise_sampler, x)
    controller = _StepSize(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    t, t_end = (-torch.tensor(float(sigma)).log() for sigma in (sigma_max, sigma_min))
    x_prev = x
    with torch.no_grad(), tqdm(disable=disable) as bar:
        while t < t_end - 1e-5:
            t_next = torch.minimum(t_end, t + controller.h)
            sigma, sigma_next = ((-each).exp().to(x.device) for each in (t, t_next))
            pair = _Pair(order, sigma, sigma_next, float((-t_end).exp()), lambda_t, options, x)
            low, high, denoised = pair.run(model, x, extra_args or {})
            allowed = torch.clamp(rtol * torch.maximum(low.float().abs(), x_prev.float().abs()), min=atol)
            error = torch.linalg.norm((low.float() - high.float()) / allowed) / x.numel() ** 0.5
            if controller.accepts(float(error)):
                noise: dict[str, Any] = {}
                if pair.noise and chosen is not None:
                    noise = {"seeds": chosen}
                elif pair.noise:
                    drawn = torch.randn_like(x) if noise_sampler is None else noise_sampler(sigma, sigma_next)
                    noise = {"noise": drawn.to(x.dtype)}
                x_prev, x, t = low, high, t_next
                if noise:
                    x = step(x, x, *_sample_rows(x, c_x=1.0, c_noise=pair.noise, draw=float(info["n_accept"])), **noise)
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            bar.update(order)
            if callback is not None:
                at = (-t).exp()
                told = {
                    "sigma": at,
                    "sigma_hat": at,
                    "x": x,
                    "i": info["steps"] - 1,
                    "t": t,
                    "t_up": t,
                    "denoised": denoised,
                }
                callback(told | {"error": error, "h": controller.h} | info)
    return (x, info) if return_info else x


def _check_ends(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless sigma falls from sigma_max to a sigma_min above 0."""
    low, high = _number("sigma_min", sigma_min, above_0=True), _number("sigma_max", sigma_max, above_0=True)
    if not low < high:
        raise ValueError(f"sigma_min, sigma_max: expected sigma_min < sigma_max, got {sigma_min}, {sigma_max}")


class _Pair:
    """One step from sigma to sigma_next by two methods of neighbouring orders, which share the calls of the lower one.

    noise: what follows the step, its standard deviation.
    """

    def __init__(
        self,
        order: int,
        sigma: Tensor,
        sigma_next: Tensor,
        least: float,
        lambda_t: scaling.EpsilonScaling,
        options: dict[str, float],
        x: Tensor,
    ):
        levels = _Levels(np.array([float(sigma), float(sigma_next)]))
        # order two then has its second call where order three has it
        made = [
            samplers.dpm_solver(
                levels, 2, scaling=lambda_t, prediction="sample", order=[each, 1], r=1 / 3 if order == 3 else 1 / 2,
                least=least, **options,
            ).to(x.device)
            for each in (order - 1, order)
        ]  # fmt: skip
        self.order, self.table, self.noise = order, made[1], float(made[1]["c_noise"][order - 1])
        self.low, self.high = (table.rows.clone() for table in made)
        for rows in (self.low, self.high):
            rows[:, COLUMNS.index("c_noise")] = 0.0

    def run(self, model: Denoiser, x: Tensor, extra_args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(the state by the lower order, by the higher, the estimate of x_0 at the step's start)."""
        trajectory, low, denoised = Trajectory(self.table, x, rows=self.high), x, x
        for row in range(self.order):
            at, index = trajectory.x, self.table.row_index[row]
            f = _check_output(model(at, at.new_full((len(at),), self.table["t"][row]), **extra_args), at)
            if row == self.order - 2:
                low = step(at, f, self.low, index, m1=trajectory.m[0] if row else None)
            m0 = trajectory.step(index, f)
            if row == 0 and m0 is not None:
                denoised = m0
        return low, trajectory.x, denoised


class _StepSize:
    """The length h of the next step in log sigma, by a PID controller of the error (k-diffusion's)."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, accept_safety: float):
        self.h, self.accept_safety = abs(_number("h_init", h, above_0=True)), accept_safety
        self.powers = (p + i + d) / order, -(p + 2 * d) / order, d / order
        self.errors: list[float] = []  # inverse: of this step, and of the last two that were accepted

    def accepts(self, error: float) -> bool:
        """Whether a step with this error counts; h is then, and otherwise, that of the next try."""
        inverse = 1 / (error + 1e-8)
        self.errors = [inverse, *self.errors[1:]] if self.errors else [inverse] * 3
        factor = math.prod(each**power for each, power in zip(self.errors, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.errors = [self.errors[0], self.errors[0], self.errors[1]]
        self.h *= factor
        return accepted


# ---- the scaling alone ----


def scale_denoised(x: Tensor, denoised: Tensor, eps_scaling: float | Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """The denoised estimate with its eps divided by lambda, in one pass: x/alpha - (x/alpha - denoised)/lambda.

    x: (B, ...), alpha*x_0 + sigma*eps: alpha is 1 for k-diffusion's state, 1 - sigma for a flow's. denoised: x's shape.
    eps_scaling: lambda. It and alpha: a finite number above 0, or a tensor of them, float32 or float64, () or (B,), one
    for each sample. Returns x's shape and dtype. Raises ValueError for lambda or alpha. On a GPU the host does not read a
    tensor's values: a sample with a bad one comes out as NaN.
    """
    lambda_t, alpha = _per_sample("eps_scaling", eps_scaling, x), _per_sample("alpha", alpha, x)
    return step(x, denoised, *_sample_rows(x, c_x=(lambda_t - 1) / lambda_t / alpha, c_f=1 / lambda_t))


def _per_sample(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(value, torch.Tensor):
        return _number(name, value, above_0=True)
    if (
        value.dtype not in (torch.float32, torch.float64)
        or value.shape not in ((), (len(x),))
        or value.device != x.device
    ):
        raise ValueError(
            f"{name}: expected a number, or a tensor of float32 or float64, () or ({len(x)},), on {x.device}, "
            f"got {_shown(value)} on {value.device}"
        )
    good = (value > 0) & (value < np.inf)
    if value.device.type == "cpu" and not good.all():
        raise ValueError(f"{name}: expected finite numbers above 0, got {reprlib.repr(value.tolist())}")
    return torch.where(good, value, torch.nan)


def _sample_rows(x: Tensor, **columns: float | Tensor) -> tuple[Tensor, Tensor]:
    """A row for each sample, (B, 24), and their index. columns: numbers, () or (B,); all others are 0, and g is 1.

    They are made on the device, without waiting for it, and anew in each call: a tensor that was kept would belong to the
    mode of its first call, such as inference mode, and fail outside it.
    """
    rows = x.new_zeros((len(x), len(COLUMNS)), dtype=torch.float32)
    for name, values in {"g": 1.0, **columns}.items():
        rows[:, COLUMNS.index(name)] = values
    return rows, torch.arange(len(x), device=x.device)
