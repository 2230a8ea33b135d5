"""k-diffusion's samplers by its own signatures, with Epsilon Scaling: sample_euler(model, x, sigmas, ...), and so on.

model(x, sigma, **extra_args): any denoiser of x = x_0 + sigma*eps; a flow's is refused where that can be told.
sigmas: (N + 1,) for N steps; they must not rise. Every table is that of `samplers` there; an update is one launch.
eps_scaling: lambda, in any form that scaling.as_scaling takes: denoised' = x - (x - denoised)/lambda. Above sigma 900 x
is noise alone, and lambda is 1. seeds: (B,), for noise made in the kernel. Without them the noise comes from
noise_sampler(sigma, sigma_next), by default torch.randn_like, also where k-diffusion has a Brownian tree.
`scale_denoised` is the scaling alone, for a loop of one's own.
"""

import reprlib

import numpy as np
import torch
from tqdm.auto import tqdm

from . import samplers, scaling
from .ops import DTYPES, as_seeds, step
from .schedule import KarrasSchedule
from .table import COLUMNS, denoising_rows
from .trajectory import Trajectory


class _Levels(KarrasSchedule):
    """A caller's noise levels. If the last is above 0, the table gets a step from there to 0, which is not run."""

    def __init__(self, levels):
        self.model, self._ratios = None, np.array([0.0, np.inf])
        self.levels = levels[levels > 0]

    def grid(self, steps):
        return self.grid_at(self.levels)


class _Sampling:
    """A run of N steps. Raises ValueError or TypeError, naming the argument, before the model is called.

    churn: (s_churn, s_tmin, s_tmax, s_noise) for EDM's two samplers, None for the others.
    """

    def __init__(self, sampler, x, sigmas, levels, eps_scaling, seeds, noise_sampler, churn, options):
        self.sigmas, self.levels, self.seeds, self.noise_sampler = sigmas, levels, seeds, noise_sampler
        if not isinstance(sigmas, torch.Tensor):
            self.sigmas = torch.tensor(levels, dtype=torch.float32, device=x.device)
        hats, self.first_churn, self.edm = levels[:-1], 0.0, churn is not None
        if self.edm:
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
        calls = -(-len(self.table) // len(grid.levels))
        begins = calls * (np.cumsum(self.moves) - self.moves)
        ends = np.where(self.moves, np.minimum(begins + calls, len(self.table)), begins + 1)
        self.rows = [range(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        self.noisy, self.coefficients = self.table["c_noise"] != 0, self.table.rows
        if self.edm and levels[-1] > 0:  # its last row has the churn of the step that is not run
            last = self.rows[-1][-1]
            self.noisy = self.noisy & (np.arange(len(self.table)) != last)
            self.coefficients = self.coefficients.clone()
            self.coefficients[last, COLUMNS.index("c_noise")] = 0.0
        self.churns = self.edm and churn[0] > 0

    def noise(self, x, i, added, drawn):
        """Step i's noise, as an input of the op; none if it is not added.

        drawn: whether k-diffusion draws it nevertheless. torch's generator must then go on as it does there.
        """
        if self.seeds is not None:
            return {"seeds": self.seeds} if added else {}
        if self.noise_sampler is not None:
            return {"noise": self.noise_sampler(self.sigmas[i], self.sigmas[i + 1]).to(x.dtype)} if added else {}
        noise = torch.randn_like(x) if added or drawn else None
        return {"noise": noise} if added else {}

    def noise_of_row(self, x, i, row):
        """A step's noise; in EDM's samplers the churn before the next step."""
        if not self.edm:
            return self.noise(x, i, self.noisy[row], False)
        before_next = row == self.rows[i][-1] and i + 1 < len(self.rows)
        return self.noise(x, i + 1, self.noisy[row], self.churns and before_next)

    def begin(self, x):
        """x with the churn before the first step: no row comes before it to add it."""
        noise = self.noise(x, 0, self.first_churn > 0, self.churns)
        if not noise:
            return x
        return step(x, x, *_sample_rows(x, c_x=1.0, c_noise=self.first_churn, draw=len(self.table)), **noise)

    def tell(self, callback, i, row, x, f):
        """Calls the callback, which may write to x and to denoised. Returns (x, denoised, coefficients) for the update.

        As in k-diffusion, EDM's samplers have formed their slope by then, so they keep copies; the others read what was
        written.
        """
        if self.table["lambda_t"][row] != 1:  # in float32: the update then has the same bits as without a callback
            scaled = denoising_rows(self.table.rows)
            scaled[:, COLUMNS.index("c_m0")] = 1.0
            f = step(x.float(), f, scaled, self.table.row_index[row])
        kept = (x.clone(), f.clone()) if self.edm else (x, f)
        sigma_hat = self.sigmas[i] * (self.table["t"][row] / self.levels[i])
        callback({"x": x, "i": i, "sigma": self.sigmas[i], "sigma_hat": sigma_hat, "denoised": f})
        coefficients = self.coefficients.clone()
        coefficients[:, COLUMNS.index("d_x")], coefficients[:, COLUMNS.index("d_f")] = 0.0, 1.0
        return *kept, coefficients

    def run(self, model, x, extra_args, callback, disable):
        trajectory = Trajectory(self.table, self.begin(x))
        for i in tqdm(range(len(self.rows)), disable=disable):
            for row in self.rows[i]:
                x, trajectory.rows = trajectory.x, self.coefficients
                f = _check_output(model(x, x.new_full((len(x),), self.table["t"][row]), **extra_args), x)
                state, tells = x, callback is not None and row == self.rows[i][0]
                if tells:
                    state, f, trajectory.rows = self.tell(callback, i, row, x, f)
                if not self.moves[i]:
                    self.noise(x, i, False, self.noisy.any())
                    continue
                trajectory.x = state
                noise = self.noise_of_row(x, i, row)
                trajectory.step(self.table.row_index[row], f, **noise, returns_m0=False)
                if tells and self.edm:
                    written = x - state  # by the callback: the slope is followed from there
                    trajectory.x, trajectory.m = trajectory.x + written, [m + written for m in trajectory.m]
        return trajectory.x


def _run(
    sampler, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler=None, churn=None, **options
):  # fmt: skip
    levels = _as_levels(sigmas)
    _check(model, x)
    if seeds is not None:
        seeds = _as_seeds(seeds, noise_sampler, x)
    if len(levels) < 2:
        return x
    with torch.no_grad():
        sampling = _Sampling(sampler, x, sigmas, levels, eps_scaling, seeds, noise_sampler, churn, options)
        return sampling.run(model, x, extra_args or {}, callback, disable)


def _churned(levels, s_churn, s_tmin, s_tmax, s_noise):
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


def _as_levels(sigmas):
    """(N + 1,) float64."""
    levels = np.array(sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas, dtype=np.float64)
    falls = levels.ndim == 1 and np.isfinite(levels).all() and (np.diff(levels) <= 0).all()
    if not falls or (len(levels) > 1 and not (levels[-2] > 0 and levels[-1] >= 0)):
        raise ValueError(
            "sigmas: expected (N + 1,) finite values above 0 that do not rise, of which the last may be 0, "
            f"got {reprlib.repr(levels.tolist())}"
        )
    return levels


def _number(name, value, above_0=False):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number < np.inf or (above_0 and number == 0):
        expected = "above 0" if above_0 else "of at least 0"
        raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")
    return number


def _noisy(eta, s_noise):
    """The tables' options."""
    return {"eta": _number("eta", eta), "S_noise": _number("s_noise", s_noise)}


def _check(model, x):
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected (B, ...), float32, float16 or bfloat16, not empty, got {_shown(x)}")
    wrapped = model
    for _ in range(4):  # ComfyUI's samplers are given a wrapper of a wrapper of the model
        if is_flow(getattr(wrapped, "model_sampling", None)):
            raise ValueError(
                "model: expected a denoiser of x_0 + sigma*eps, got ComfyUI's model of a flow, "
                "(1 - sigma)*x_0 + sigma*eps: take ComfyUI's own samplers, and the node in integrations/comfyui to scale it"
            )
        wrapped = getattr(wrapped, "inner_model", None)


def is_flow(model_sampling):
    """Whether ComfyUI's `model_sampling` is a flow's: one of its classes is named CONST."""
    return any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)


def _as_seeds(seeds, noise_sampler, x):
    if noise_sampler is not None:
        raise ValueError("seeds, noise_sampler: expected one of them, got both")
    seeds = as_seeds(seeds, x.device)
    if len(seeds) != len(x):
        raise ValueError(f"seeds: expected one for each of {len(x)} samples, got {len(seeds)}")
    return seeds


def _check_output(denoised, x):
    if not isinstance(denoised, torch.Tensor) or denoised.shape != x.shape or denoised.dtype not in DTYPES:
        raise ValueError(
            f"model: expected an output of shape {tuple(x.shape)}, as x has, float32, float16 or bfloat16, "
            f"got {_shown(denoised)}"
        )
    return denoised


def _shown(value):
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


# ---- the samplers ----


def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
    *, eps_scaling=1.0, noise_sampler=None, seeds=None,
):  # fmt: skip
    """EDM's Euler (arXiv 2206.00364, alg. 2). noise_sampler and seeds are for the churn."""
    return _run(
        samplers.edm_euler, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_heun(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
    *, eps_scaling=1.0, noise_sampler=None, seeds=None,
):  # fmt: skip
    """EDM's Heun (arXiv 2206.00364, alg. 2): two model calls in a step. noise_sampler and seeds are for the churn."""
    return _run(
        samplers.edm_heun, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise),
    )  # fmt: skip


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """Euler down to sigma_down, then noise up."""
    return _run(
        samplers.euler_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise),
    )  # fmt: skip


def sample_dpmpp_2s_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(2S), ancestral: two model calls in a step."""
    return _run(
        samplers.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise),
    )  # fmt: skip


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eps_scaling=1.0, seeds=None):
    """DPM-Solver++(2M). It draws no noise: seeds are taken as in the other samplers, and change nothing."""
    return _run(
        samplers.dpmpp_2m, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, lower_order_final=False
    )


def sample_dpmpp_2m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    solver_type="midpoint", *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(2M), SDE; solver_type "midpoint" or "heun"."""
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type: expected 'midpoint' or 'heun', got {solver_type!r}")
    return _run(
        samplers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise), solver=solver_type, lower_order_final=False,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(3M), SDE."""
    return _run(
        samplers.dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        **_noisy(eta, s_noise), lower_order_final=False,
    )  # fmt: skip


# ---- the scaling alone ----


def scale_denoised(x, denoised, eps_scaling, alpha=1.0):
    """The denoised estimate with its eps divided by lambda, in one pass: x/alpha - (x/alpha - denoised)/lambda.

    x: (B, ...), alpha*x_0 + sigma*eps: alpha is 1 for k-diffusion's state, 1 - sigma for a flow's. denoised: x's shape.
    eps_scaling: lambda. It and alpha: a finite number above 0, or a tensor of them, float32 or float64, () or (B,), one
    for each sample. Returns x's shape and dtype. Raises ValueError for lambda or alpha. On a GPU the host does not read a
    tensor's values: a sample with a bad one comes out as NaN.
    """
    lambda_t, alpha = _per_sample("eps_scaling", eps_scaling, x), _per_sample("alpha", alpha, x)
    return step(x, denoised, *_sample_rows(x, c_x=(lambda_t - 1) / lambda_t / alpha, c_f=1 / lambda_t))


def _per_sample(name, value, x):
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


def _sample_rows(x, **columns):
    """A row for each sample, (B, 24), and their index. columns: numbers, () or (B,); all others are 0, and g is 1.

    They are made on the device, without waiting for it, and anew in each call: a tensor that was kept would belong to the
    mode of its first call, such as inference mode, and fail outside it.
    """
    rows = x.new_zeros((len(x), len(COLUMNS)), dtype=torch.float32)
    for name, values in {"g": 1.0, **columns}.items():
        rows[:, COLUMNS.index(name)] = values
    return rows, torch.arange(len(x), device=x.device)
