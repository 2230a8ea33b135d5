"""What the functions of k-diffusion's names share: its levels as a grid, its noise, its callback, and the loop."""

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .. import scaling, solvers
from ..corrections import CorrectionLike, as_correction, check_bands, folded
from ..ops import DTYPES, as_seeds, step
from ..schedule import Grid, KarrasSchedule
from ..spec import BAND_COLUMNS, COLUMNS
from ..table import VALUES, Table
from ..trajectory import Trajectory
from ..typing import Array
from .flows import BY_VELOCITY, Flow, along_ratio, along_velocity, flow_grid, is_flow, sampling_of

Denoiser = Callable[..., Tensor]
Sigmas = Tensor | Sequence[float]
Extra = dict[str, Any] | None  # the model's other arguments
Callback = Callable[[dict[str, Any]], Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor] | None
Seeds = Tensor | Iterable[SupportsIndex] | None
Correction = CorrectionLike | None


# What the docstrings of all functions say of their arguments (docstrings.described).
ARGUMENTS = {
    "model": "model(x, sigma, **extra_args), a denoiser of x = x_0 + sigma*eps, or ComfyUI's model of a flow, x = "
    "(1 - sigma)*x_0 + sigma*eps: its `model_sampling` says so. sigma: (B,).",
    "x": "the state to begin with, (B, ...), float32, float16 or bfloat16, at the first noise level.",
    "sigmas": "(N + 1,) noise levels for N steps. They must not rise; the last may be 0.",
    "sigma_min": "where the last step ends, above 0.",
    "sigma_max": "the noise level of x.",
    "extra_args": "the model's other arguments, by name.",
    "callback": 'called in every step with a dict: "x", "i", "sigma", "sigma_hat" and "denoised".',
    "disable": "True hides the progress bar.",
    "eta": "how much noise there is; 0 is the sampler without noise.",
    "s_churn": "how much noise is added before steps, over all of them; 0 for none.",
    "s_tmin": "steps from a level below it have no churn.",
    "s_tmax": "steps from a level above it have no churn.",
    "s_noise": "a factor of the noise that is added.",
    "noise_sampler": "noise_sampler(sigma, sigma_next) gives the noise of a step. Default torch.randn_like, also where "
    "k-diffusion has a Brownian tree.",
    "max_order": "1 to 4.",
    "ge_gamma": "the share of the newest slope; 1 is Euler.",
    "eps_scaling": "lambda, by which eps is divided, in any form that `scaling.as_scaling` takes: denoised' = x - (x - "
    "denoised)/lambda. Above sigma 900 x is noise alone, and lambda is 1.",
    "correction": "of the state after each step, except those to sigma 0, in any form that `corrections.as_correction` takes; "
    "None for none.",
    "seeds": "(B,), one for each sample, for noise made in the kernel; None takes noise_sampler's. A sampler without noise "
    "ignores their values.",
}

_OFFSET = 1e-4  # how far from the beginning a flow's first log SNR is taken


class Levels(KarrasSchedule):
    """A caller's noise levels, (N + 1,), for N steps, of which the last may end above 0."""

    def __init__(self, levels: Array):
        self.model, self._ratios = None, np.array([0.0, np.inf])
        self.levels = levels

    def grid(self, steps: int) -> Grid:
        """The grid of the levels, however many `steps` says."""
        return dataclasses.replace(self.grid_at(self.levels[:-1]), sigma_end=float(self.levels[-1]))


def table_of(
    sampler: Callable[..., Table],
    levels: Array,
    eps_scaling: scaling.EpsilonScaling,
    lambda_t: Array,
    calls: NDArray[np.int64],
    options: dict[str, Any],
    flow: Flow | None,
) -> Table:
    """The table of steps between the levels, (N + 1,); lambda_t, calls: of each step, (N,). flow: None for x_0 + sigma*eps.

    eps_scaling: what lambda_t is made of; by noise level, each call of a step has its own.
    """
    steps = len(levels) - 1
    scaled = eps_scaling if eps_scaling.by_level else scaling.array(lambda_t, origin="noisiest")
    if flow is None:
        return sampler(Levels(levels), steps, scaling=scaled, prediction="sample", **options)
    if flow.sampler is not None:
        return flow.sampler(flow_grid(levels), steps, scaling=scaled, prediction="sample", **options)
    by_ratio = flow.form == "ratio"
    made = sampler(Levels(levels / (1 - levels) if by_ratio else levels), steps, prediction="sample", **options)
    of_calls = np.repeat(lambda_t, calls)
    if eps_scaling.by_level:
        alpha, sigma = made["alpha_in"] if by_ratio else 1 - made["sigma_in"], made["sigma_in"]
        alone, at = scaling.noise_alone(alpha, sigma, 1.0), scaling.log_snr(alpha, sigma)
        of_calls = scaling.lambdas(eps_scaling, alone, "eps_scaling", levels=at)
    return (along_ratio if by_ratio else along_velocity)(made, of_calls)


class Sampling:
    """A run of N steps. Raises ValueError or TypeError, naming the argument, before the model is called.

    calls: of the levels, (N + 1,): how many model calls each step has, (N,); None for one. churn: (s_churn, s_tmin, s_tmax,
    s_noise) for EDM's samplers, None for the others. slope_first: whether the slope is formed before the callback. middles:
    where, in log SNR, the calls after the first lie, if noise follows each call; chained: whether a noise begins where the one
    before ends, or where the step does. dpm: whether the callback is told t, too. flow: None for x_0 + sigma*eps.
    model_sampling: ComfyUI's, or None. to_image: whether the last step leads to an image, though its sigma is above 0.
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
        middles: tuple[float, ...],
        chained: bool,
        dpm: bool,
        flow: Flow | None,
        model_sampling: Any,
        correction: Correction,
        to_image: bool,
        options: dict[str, Any],
    ):
        self.levels, self.seeds, self.noise_sampler = levels, seeds, noise_sampler
        self.slope_first, self.middles, self.chained, self.dpm = slope_first, middles, chained, dpm
        self.flow, self.model_sampling = flow, model_sampling
        self.sigmas = (
            sigmas if isinstance(sigmas, Tensor) else torch.tensor(levels, dtype=torch.float32, device=x.device)
        )
        self.hats, self.first_churn, self.edm = levels[:-1], 0.0, churn is not None
        if churn is not None:
            self.hats, self.first_churn, options = churned(levels, *churn)
        self.alpha = np.ones(len(self.hats)) if flow is None else 1 - self.hats
        value, alone = scaling.as_scaling(eps_scaling, "eps_scaling"), scaling.noise_alone(self.alpha, self.hats, 1.0)
        self.lambda_t = scaling.lambdas(value, alone, "eps_scaling", levels=scaling.log_snr(self.alpha, self.hats))
        # A step of length 0 leaves x as it is. EDM's tables have rows for it; in the others, history would divide by 0.
        self.moves = (np.diff(levels) < 0) | self.edm
        of_step = np.where(self.moves, 1 if calls is None else calls(levels), 0)
        ends = np.cumsum(of_step)
        self.rows = [range(end - count, end) for end, count in zip(ends.tolist(), of_step.tolist(), strict=True)]
        moved = np.append(levels[:-1][self.moves], levels[-1])
        if len(moved) == 1:  # no step moves: a table all the same, of a step that is not run
            moved = np.append(moved, 0.0)
        own = self.lambda_t[self.moves] if self.moves.any() else np.ones(1)
        table = table_of(sampler, moved, value, own, of_step[of_step > 0], options, flow)
        self.table = self.corrected(table, correction, to_image).to(x.device)
        check_bands("x", x, self.table.band_dims)
        self.noisy = self.table["c_noise"] != 0
        self.churns = churn is not None and churn[0] > 0

    def corrected(self, table: Table, correction: Correction, to_image: bool) -> Table:
        """The table with the correction in the last row of each step that does not lead to an image."""
        made = as_correction(correction)
        if made is None:
            return table
        if self.edm and (self.first_churn or (self.hats != self.levels[:-1]).any()):
            raise ValueError(
                "s_churn: expected 0 beside a correction: the state that a step leaves has the next one's churn in it"
            )
        sampler = table.name.partition("[")[0]
        own = sampler.removeprefix("edm_")
        made.warn_of_transfer(len(self.hats), f"sample_{own}", own, sampler)
        weights = made.weights(scaling.log_snr(self.alpha, self.hats), self.hats, float(self.hats.max()))
        low, high = np.zeros(len(table)), np.zeros(len(table))
        for i in np.flatnonzero(self.moves & (self.levels[1:] > 0)).tolist():
            if not (to_image and i == len(self.rows) - 1):
                low[self.rows[i][-1]], high[self.rows[i][-1]] = weights[0][i], weights[1][i]
        values = folded({name: table[name] for name in VALUES}, made, low, high)
        return Table(values, name=table.name, initial_sigma=table.initial_sigma)

    def noise(self, x: Tensor, i: int, added: bool, drawn: bool, call: int = -1) -> dict[str, Any]:
        """Step i's noise, as an input of the op; none if it is not added.

        drawn: whether k-diffusion draws it nevertheless. torch's generator must then go on as it does there. call: after which
        of the step's calls, where `middles` says that noise follows each.
        """
        if self.seeds is not None:
            return {"seeds": self.seeds} if added else {}
        if not (added or drawn):
            return {}
        if self.noise_sampler is None:
            noise = torch.randn_like(x)
        elif added or self.middles:
            noise = self.noise_sampler(*self.noise_ends(i, call)).to(x.dtype)
        return {"noise": noise} if added else {}

    def noise_ends(self, i: int, call: int) -> tuple[Tensor, Tensor]:
        """The two sigmas that a noise sampler is told, worked out as there to the last bit: a Brownian tree sees it."""
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        if not self.middles:
            return sigma, sigma_next
        is_last, const = call in (-1, len(self.middles)), self.flow is not None
        t, t_next = (-each.logit() if const else -each.log() for each in (sigma, sigma_next))

        def level(at: Tensor) -> Tensor:
            return (-at).sigmoid() if const else (-at).exp()

        def between(k: int) -> Tensor:
            at = torch.lerp(t, t_next, self.middles[k]) if self.chained else t + (t_next - t) * self.middles[k]
            return level(at)

        if self.model_sampling is None:  # k-diffusion's dpmpp_sde
            sigma, sigma_next = level(t), level(t_next)
        begin = between(call - 1) if self.chained and call > 0 else sigma
        return begin, sigma_next if is_last else between(call)

    def noise_of_row(self, x: Tensor, i: int, row: int) -> dict[str, Any]:
        """A step's noise; in EDM's samplers the churn before the next step."""
        if not self.edm:
            drawn = len(self.rows[i]) > 1 and bool(self.middles) and self.noisy.any()  # exp_heun_2_x0_sde's second
            return self.noise(x, i, self.noisy[row], drawn, row - self.rows[i][0])
        is_last = row == self.rows[i][-1]
        return self.noise(x, i + 1, self.noisy[row], self.churns and is_last and i + 1 < len(self.rows))

    def begin(self, x: Tensor) -> Tensor:
        """x with the churn before the first step: no row comes before it to add it."""
        noise = self.noise(x, 0, self.first_churn > 0, self.churns)
        if not noise:
            return x
        return step(x, x, *sample_rows(x, c_x=1.0, c_noise=self.first_churn, draw=len(self.table)), **noise)

    def tell(
        self, callback: Callable[[dict[str, Any]], Any], i: int, x: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Table | Tensor]:
        """Calls the callback, which may write to x and to denoised. Returns (x, f, coefficients) for the update.

        As in k-diffusion, samplers that form their slope first keep copies; the others read what was written.
        """
        denoised = f
        if self.lambda_t[i] != 1:  # in float32: the update then has the same bits as without a callback
            d_x, d_f = scaling.scale(0.0, 1.0, self.alpha[i], self.lambda_t[i])
            rows, index = sample_rows(x[:1], d_x=d_x, d_f=d_f, c_m0=1.0, clip=np.inf)
            denoised = step(x.float(), f, rows, index[0])
        kept = (x.clone(), f.clone() if denoised is f else f) if self.slope_first else (x, denoised)
        sigma_hat = self.sigmas[i] * (self.hats[i] / self.levels[i])
        info = {"x": x, "i": i, "sigma": self.sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised}
        if self.dpm:
            info |= {"t": -self.sigmas[i].log(), "t_up": -self.sigmas[i].log()}
        callback(info)
        if self.slope_first:
            return *kept, self.table
        coefficients = self.table.rows.clone()
        coefficients[:, COLUMNS.index("d_x")], coefficients[:, COLUMNS.index("d_f")] = 0.0, 1.0
        return *kept, coefficients

    def correction_of(self, written: Tensor, row: int) -> Tensor:
        """What the correction of a row makes of a part of x'."""
        if not self.table.corrected:
            return written
        columns = {name: self.table[name][row] for name in ("l_next", "band_dims")}
        rows, index = sample_rows(written[:1], c_x=self.table["w_next"][row], clip=np.inf, **columns)
        return step(written, written, rows, index[0])

    def run(
        self, model: Denoiser, x: Tensor, extra_args: dict[str, Any], callback: Callback, disable: bool | None
    ) -> Tensor:
        """The state after the last step."""
        trajectory = Trajectory(self.table, self.begin(x))
        for i in tqdm(range(len(self.rows)), disable=disable):
            for row in self.rows[i] or [-1]:
                x, trajectory.rows = trajectory.x, self.table
                is_first = row < 0 or row == self.rows[i][0]
                level = self.hats[i] if is_first else self.table["t"][row]
                f = check_output(model(x, x.new_full((len(x),), level), **extra_args), x)
                state, tells = x, callback is not None and is_first
                if callback is not None and tells:
                    state, f, trajectory.rows = self.tell(callback, i, x, f)
                if row < 0:  # a step of length 0
                    self.noise(x, i, False, self.noisy.any())
                    continue
                trajectory.x = state
                noise = self.noise_of_row(x, i, row)
                trajectory.step(self.table.row_index[row], f, **noise, returns_m0=False)
                if tells and self.slope_first:
                    written = x - state  # by the callback: the slope is followed from there
                    trajectory.x = trajectory.x + self.correction_of(written, row)
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
    correction: Correction,
    seeds: Seeds,
    noise_sampler: NoiseSampler = None,
    *,
    to_image: bool = False,
    calls: Callable[[Array], NDArray[np.int64]] | None = None,
    churn: tuple[float, float, float, float] | None = None,
    slope_first: bool = False,
    middles: tuple[float, ...] = (),
    chained: bool = False,
    dpm: bool = False,
    flow: Flow = BY_VELOCITY,
    **options: Any,
) -> Tensor:
    """The state after the last of the sampler's steps; all arguments as the functions of k-diffusion's names take them.

    flow: what the sampler is on a flow, where ComfyUI's model is one. The others are Sampling's.
    """
    levels = as_levels(sigmas)
    check(x)
    chosen = None if seeds is None else as_noise_seeds(seeds, noise_sampler, x)
    if len(levels) < 2:
        return x
    model_sampling = sampling_of(model)
    on_flow = flow if is_flow(model_sampling) else None
    if on_flow is not None:
        check_flow(on_flow, levels, churn)
        calls = on_flow.calls or calls
        if on_flow.form == "ratio" and levels[0] == 1:  # x is noise alone, and has no log SNR: as ComfyUI
            sigmas = sigmas.clone() if isinstance(sigmas, Tensor) else torch.tensor(levels, device=x.device)
            sigmas[0] = float(model_sampling.percent_to_sigma(_OFFSET))
            levels = as_levels(sigmas)
    with torch.no_grad():
        sampling = Sampling(
            sampler, x, sigmas, levels, eps_scaling, chosen, noise_sampler,
            calls=calls, churn=churn, slope_first=slope_first, middles=middles, chained=chained, dpm=dpm, flow=on_flow,
            model_sampling=model_sampling, correction=correction, to_image=to_image, options=options,
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
    at = levels[:-1]
    raised = solvers.churned(at, len(at), s_churn, s_tmin, s_tmax)
    first = s_noise * np.sqrt(raised[0] ** 2 - at[0] ** 2)
    return raised, float(first), {"S_churn": s_churn, "S_min": s_tmin, "S_max": s_tmax, "S_noise": s_noise}


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


def check(x: Tensor) -> None:
    """Raises ValueError for an x that the step does not take."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected (B, ...), float32, float16 or bfloat16, not empty, got {shown(x)}")


def check_flow(flow: Flow, levels: Array, churn: tuple[float, ...] | None = None) -> None:
    """Raises ValueError for what a flow, x = (1 - sigma)*x_0 + sigma*eps, does not have."""
    if flow.refusal:
        raise ValueError(flow.refusal)
    if levels[0] > 1:
        raise ValueError(f"sigmas: expected values of at most 1 for a flow, got {reprlib.repr(levels.tolist())}")
    if churn is not None and number("s_churn", churn[0]) > 0:
        raise ValueError(
            f"s_churn: expected 0 for a flow, which noise alone does not raise to another level, got {churn[0]}; "
            "take euler_ancestral"
        )


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
    """A row for each sample, (B, 24), or (B, 28) with the columns of a band, and their index. columns: numbers, () or (B,); all
    others are 0, and g is 1.

    They are made on the device, without waiting for it, and anew in each call: a tensor that was kept would belong to the
    mode of its first call, such as inference mode, and fail outside it.
    """
    names = COLUMNS + BAND_COLUMNS if columns.get("band_dims", 0) else COLUMNS
    rows = x.new_zeros((len(x), len(names)), dtype=torch.float32)
    for name, values in {"g": 1.0, **columns}.items():
        if name in names:
            rows[:, names.index(name)] = values
    return rows, torch.arange(len(x), device=x.device)
