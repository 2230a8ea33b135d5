"""What the functions of k-diffusion's names share: its levels as a grid, its noise, its callback, and the loop."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .. import scaling, solvers
from ..ops import DTYPES, as_seeds, step
from ..schedule import Grid, KarrasSchedule
from ..spec import COLUMNS
from ..table import Table, denoising_rows
from ..trajectory import Trajectory
from ..typing import Array

Denoiser = Callable[..., Tensor]
Sigmas = Tensor | Sequence[float]
Extra = dict[str, Any] | None  # the model's other arguments
Callback = Callable[[dict[str, Any]], Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor] | None
Seeds = Tensor | Iterable[SupportsIndex] | None


class Levels(KarrasSchedule):
    """A caller's noise levels. If the last is above 0, the table gets a step from there to 0, which is not run."""

    def __init__(self, levels: Array):
        self.model, self._ratios = None, np.array([0.0, np.inf])
        self.levels = levels[levels > 0]

    def grid(self, steps: int) -> Grid:
        """The grid of the levels, however many `steps` says."""
        return self.grid_at(self.levels)


class Sampling:
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
            hats, self.first_churn, options = churned(levels, *churn)
        lambda_t = scaling.lambdas(
            scaling.as_scaling(eps_scaling, "eps_scaling"), scaling.noise_alone(1.0, hats, 1.0), "eps_scaling"
        )
        # A step of length 0 leaves x as it is. EDM's tables have rows for it; in the others, history would divide by 0.
        self.moves = (np.diff(levels) < 0) | self.edm
        grid = Levels(np.append(levels[:-1][self.moves], levels[-1]))
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
        return step(x, x, *sample_rows(x, c_x=1.0, c_noise=self.first_churn, draw=len(self.table)), **noise)

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
                f = check_output(model(x, x.new_full((len(x),), self.table["t"][row]), **extra_args), x)
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


def run(
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
    """The state after the last of the sampler's steps; all arguments as the functions of k-diffusion's names take them."""
    levels = as_levels(sigmas)
    check(model, x)
    chosen = None if seeds is None else as_noise_seeds(seeds, noise_sampler, x)
    if len(levels) < 2:
        return x
    with torch.no_grad():
        sampling = Sampling(
            sampler, x, sigmas, levels, eps_scaling, chosen, noise_sampler,
            calls=calls, churn=churn, slope_first=slope_first, middle=middle, dpm=dpm, options=options,
        )  # fmt: skip
        return sampling.run(model, x, extra_args or {}, callback, disable)


def twice(levels: Array) -> NDArray[np.int64]:
    """The calls of steps with two, of which one to 0 has one."""
    return np.where(levels[1:] > 0, 2, 1)


def twice_down(eta: float) -> Callable[[Array], NDArray[np.int64]]:
    """The calls of ancestral steps with two, of which one down to 0 has one."""
    return lambda levels: np.where(solvers.ancestral(1.0, levels[:-1], 1.0, levels[1:], eta)[0] > 0, 2, 1)


def churned(
    levels: Array, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Array, float, dict[str, float]]:
    """(each step's raised level, (N,); the standard deviation of the first step's churn; the options of EDM's tables)."""
    s_churn, s_noise = number("s_churn", s_churn), number("s_noise", s_noise)
    if np.isnan(s_tmin) or np.isnan(s_tmax):
        raise ValueError(f"s_tmin, s_tmax: expected numbers, got {s_tmin}, {s_tmax}")
    steps, grid_length = len(levels) - 1, int((levels > 0).sum())
    at = levels[:-1]
    raised = solvers.churned(at, steps, s_churn, s_tmin, s_tmax)
    first = s_noise * np.sqrt(raised[0] ** 2 - at[0] ** 2)
    # Its tables divide S_churn by their own count of steps, which may be one more.
    options = {"S_churn": s_churn * grid_length / steps, "S_min": s_tmin, "S_max": s_tmax, "S_noise": s_noise}
    return raised, float(first), options


# ---- what is checked ----


def as_levels(sigmas: Sigmas) -> Array:
    """(N + 1,) float64. Raises ValueError for levels that rise, are not finite, or are not above 0."""
    levels = np.array(sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas, dtype=np.float64)
    falls = levels.ndim == 1 and np.isfinite(levels).all() and (np.diff(levels) <= 0).all()
    if not falls or (len(levels) > 1 and not (levels[-2] > 0 and levels[-1] >= 0)):
        raise ValueError(
            "sigmas: expected (N + 1,) finite values above 0 that do not rise, of which the last may be 0, "
            f"got {reprlib.repr(levels.tolist())}"
        )
    return levels


def number(name: str, value: Any, above_0: bool = False) -> float:
    """value as a float. Raises ValueError, naming the argument, for one below 0, or not above it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number < np.inf or (above_0 and number == 0):
        expected = "above 0" if above_0 else "of at least 0"
        raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")
    return number


def noisy(eta: float, s_noise: float) -> dict[str, Any]:
    """The tables' options."""
    return {"eta": number("eta", eta), "S_noise": number("s_noise", s_noise)}


def check(model: Denoiser, x: Tensor) -> None:
    """Raises ValueError for an x that the step does not take, or ComfyUI's model of a flow."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected (B, ...), float32, float16 or bfloat16, not empty, got {shown(x)}")
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


def as_noise_seeds(seeds: Any, noise_sampler: NoiseSampler, x: Tensor) -> Tensor:
    """int64 (B,). Raises ValueError for another number of them, or beside a noise sampler."""
    if noise_sampler is not None:
        raise ValueError("seeds, noise_sampler: expected one of them, got both")
    seeds = as_seeds(seeds, x.device)
    if len(seeds) != len(x):
        raise ValueError(f"seeds: expected one for each of {len(x)} samples, got {len(seeds)}")
    return seeds


def check_output(denoised: Any, x: Tensor) -> Tensor:
    """What the model returned. Raises ValueError for another shape or dtype."""
    if not isinstance(denoised, torch.Tensor) or denoised.shape != x.shape or denoised.dtype not in DTYPES:
        raise ValueError(
            f"model: expected an output of shape {tuple(x.shape)}, as x has, float32, float16 or bfloat16, "
            f"got {shown(denoised)}"
        )
    return denoised


def shown(value: object) -> str:
    """A value as an error names it."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


# ---- the samplers ----


def sample_rows(x: Tensor, **columns: float | Tensor) -> tuple[Tensor, Tensor]:
    """A row for each sample, (B, 24), and their index. columns: numbers, () or (B,); all others are 0, and g is 1.

    They are made on the device, without waiting for it, and anew in each call: a tensor that was kept would belong to the
    mode of its first call, such as inference mode, and fail outside it.
    """
    rows = x.new_zeros((len(x), len(COLUMNS)), dtype=torch.float32)
    for name, values in {"g": 1.0, **columns}.items():
        rows[:, COLUMNS.index(name)] = values
    return rows, torch.arange(len(x), device=x.device)
