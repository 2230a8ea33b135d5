"""On alphas_cumprod at the timesteps: DDPM, UnCLIP, DDIM, DDIMInverse."""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import (
    Columns,
    Ends,
    Formula,
    Generators,
    Levels,
    Options,
    Result,
    Timestep,
    as_float64,
    clip_of,
    ends_of,
    eps_of,
    output_of,
    x0_of,
)
from .plan import Plan, Row
from .scheduler import FLOAT32, FromCleanest, Fused


class OnAlphas(Fused):
    """Of alphas_cumprod at the timesteps."""

    _tensors: tuple[str, ...] = ("timesteps", "alphas_cumprod")
    alphas_cumprod: Tensor

    def _length(self) -> int:
        return len(self.timesteps)

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        """Timesteps that are left of those that set_timesteps made keep their lambda."""
        known = {t: i for i, t in enumerate(self._scheduled)}
        places = [known.get(t) for t in self._host()]
        if None in places or len(set(places)) < rows:
            return np.arange(rows), rows
        return np.array(places), len(self._scheduled)

    def _t(self) -> NDArray[np.integer]:
        return np.asarray(self._host(), dtype=np.int64)

    def _abar(self, t: NDArray[np.integer], beyond: float | Tensor = 1.0) -> Array:
        """alphas_cumprod at t; `beyond` where t < 0, NaN above what there is."""
        abar = as_float64(self.alphas_cumprod)
        inside = abar[np.clip(t, 0, len(abar) - 1)]
        return np.where(t < 0, float(beyond), np.where(t < len(abar), inside, np.nan))

    def _ratio(self, a: Array, b: Array) -> Array:
        """a/b as diffusers rounds it: near t = 0, one minus it has few digits, and lambda 1 promises diffusers' numbers."""
        if self.alphas_cumprod.dtype is not FLOAT32:
            return a / b
        return (a.astype(np.float32) / b.astype(np.float32)).astype(np.float64)

    def _largest_sigma(self, sigma: Array) -> float:
        t = np.asarray(self._scheduled or self._host(), dtype=np.int64)
        return super()._largest_sigma(np.append(sigma, np.sqrt(1 - self._abar(t))))

    def _level(self) -> Array:
        """alphas_cumprod of the state that each call of the model is given."""
        return self._abar(self._t())

    def _model(self, options: Options) -> Levels:
        abar = self._level()
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        return alpha, sigma, *x0_of(self.config.prediction_type, alpha, sigma)


class OnTimesteps(OnAlphas):
    """A step is found by its timestep alone: none is counted."""

    def _abar_next(self, t: NDArray[np.integer]) -> Array:
        """alphas_cumprod where the step at each timestep ends."""
        raise NotImplementedError

    def _ends_of(self, options: Options) -> Ends:
        abar = self._abar_next(self._t())
        return ends_of(np.sqrt(abar), np.sqrt(1 - abar))

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        i = self._seen.place(timestep) if isinstance(timestep, Tensor) else None
        return self._place(timestep) if i is None else i


# ---- the posterior of x' given x and x_0 ----


class Posterior(OnTimesteps):
    """x' drawn from its distribution given x and the estimate of x_0 (`solvers.posterior`)."""

    _configured: str | None = None
    variance_type: str

    def _read_config(self) -> None:
        super()._read_config()
        self._configured = self.config.variance_type

    def _posterior(
        self, row: Row, f: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool,
        seeds: SeedsLike | None, **more: Any,
    ) -> Result:  # fmt: skip
        v, kind = None, self.variance_type
        if kind != self._configured and row.why is None:
            row = row.refused("variance_type is not its configuration's")
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict, **more)
        if (kind == "learned" or kind == "learned_range") and f.shape[1] == 2 * x.shape[1]:
            f, v = f.split(x.shape[1], dim=1)
        noise, seeds = self._noise(row, f, generator, seeds)
        if v is not None and kind == "learned":  # its root scales the noise before the launch
            noise, seeds = self._drawn(noise, seeds, x, row.step), None
            noise, v = None if noise is None else v.sqrt() * noise, None
        results = self._step(row, f, x, noise, seeds, v=v)
        return self._output_class(*results) if return_dict else results


class DDPM(Posterior):
    """DDPMScheduler, whichever class of diffusers it stands for."""

    def _abar_next(self, t: NDArray[np.integer]) -> Array:
        return self._abar(np.append(t[1:], -1))

    def _formula(self, options: Options) -> Formula:
        t = self._t()
        abar, abar_prev = self._abar(t), self._abar_next(t)
        ratio = self._ratio(abar, abar_prev)
        beta, sigma = 1 - ratio, np.sqrt(1 - abar)
        d_x, d_f = self._model(options)[2:]
        c_x, c_m0, small = solvers.posterior(np.sqrt(ratio), beta, sigma, np.sqrt(abar_prev), np.sqrt(1 - abar_prev))
        small = np.maximum(small, 1e-20)
        kind, inside = self.config.variance_type, t > 0
        columns: Columns = {"d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "t": t, "c_m0": c_m0, "c_x": c_x}
        if kind in ("learned", "learned_range"):
            columns["c_noise"] = np.ones(len(t))
            if kind == "learned_range":
                columns["logvar_min"], columns["logvar_max"] = np.log(small) * inside, np.log(beta) * inside
        else:
            variance = {"fixed_large": beta, "fixed_large_log": np.log(beta)}
            columns["c_noise"] = np.sqrt(variance.get(kind, small))  # any other is fixed_small to diffusers
        columns["c_noise"] = np.where(inside, columns["c_noise"], 0.0)
        return columns, inside

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        row = self._enter(model_output, timestep, sample)
        return self._posterior(row, model_output, timestep, sample, generator, return_dict, seeds)


class DDPMScheduler(DDPM, theirs.scheduling_ddpm.DDPMScheduler):
    """DDPM (arXiv 2006.11239, eq. 6 and 7), with the variances of arXiv 2102.09672 too."""

    _output_class = theirs.scheduling_ddpm.DDPMSchedulerOutput


class UnCLIPScheduler(Posterior, theirs.scheduling_unclip.UnCLIPScheduler):
    """DDPM's step as unCLIP's prior and decoders take it (arXiv 2204.06125), by default to the timestep below."""

    _output_class = theirs.scheduling_unclip.UnCLIPSchedulerOutput
    _options = (False,)
    _tensors = "timesteps", "alphas_cumprod", "alphas", "betas"

    def _before(self, options: Options) -> NDArray[np.integer]:
        """Where each step ends; options: whether at the schedule's next timestep, not at the one below."""
        t = self._t()
        return np.append(t[1:], t[-1] - 1) if options[0] else t - 1

    def _ends_of(self, options: Options) -> Ends:
        abar = self._abar(self._before(options))
        return ends_of(np.sqrt(abar), np.sqrt(1 - abar))

    def _formula(self, options: Options) -> Formula:
        t, prev = self._t(), self._before(options)
        abar, abar_prev = self._abar(t), self._abar(prev)
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        output_of(self.config.prediction_type, alpha, sigma, ("epsilon", "sample"))  # the others raise
        near = prev == t - 1
        ratio = np.where(near, as_float64(self.alphas)[t], self._ratio(abar, abar_prev))
        beta = np.where(near, as_float64(self.betas)[t], 1 - ratio)
        c_x, c_m0, small = solvers.posterior(np.sqrt(ratio), beta, sigma, np.sqrt(abar_prev), np.sqrt(1 - abar_prev))
        d_x, d_f = self._model(options)[2:]
        columns: Columns = {"d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "t": t, "c_m0": c_m0, "c_x": c_x}
        if self.config.variance_type == "learned_range":
            columns |= {"logvar_min": np.log(small), "logvar_max": np.log(beta), "c_noise": 1.0}
        else:
            columns["c_noise"] = np.sqrt(np.maximum(small, 1e-20))
        for name in set(columns) & {"logvar_min", "logvar_max", "c_noise"}:
            columns[name] = np.where(t > 0, columns[name], 0.0)
        return columns, t > 0

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, prev_timestep: Timestep | None = None,
        generator: Generators = None, return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        row = self._enter(model_output, timestep, sample, (prev_timestep is not None,))
        if row.why is None and prev_timestep is not None and self._place(prev_timestep) != row.step + 1:
            row = row.refused(f"prev_timestep {prev_timestep} is not the schedule's next")
        return self._posterior(
            row, model_output, timestep, sample, generator, return_dict, seeds, prev_timestep=prev_timestep
        )


# ---- by how much of x's noise is kept ----


class DDIM(OnTimesteps):
    """DDIMScheduler, whichever class of diffusers it stands for."""

    _options: Options = (0.0, False)
    final_alpha_cumprod: Tensor
    _tensors = "timesteps", "alphas_cumprod", "final_alpha_cumprod"
    _needs_steps = True

    def _apart(self) -> int:
        """How far apart the timesteps are, to diffusers' step."""
        return self.config.num_train_timesteps // (self.num_inference_steps or 1)

    def _abar_next(self, t: NDArray[np.integer]) -> Array:
        return self._abar(t - self._apart(), self.final_alpha_cumprod)

    def _formula(self, options: Options) -> Formula:
        eta, clipped = options[:2]
        t = self._t()
        abar, abar_prev = self._level(), self._abar_next(t)
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        d_x, d_f = self._model(options)[2:]
        ratio, alpha_next, sigma_next = self._ratio(abar, abar_prev), np.sqrt(abar_prev), np.sqrt(1 - abar_prev)
        _, _, variance = solvers.posterior(np.sqrt(ratio), 1 - ratio, sigma, alpha_next, sigma_next)
        std = eta * np.sqrt(variance) if eta else np.zeros(len(t))
        towards = np.sqrt(sigma_next**2 - std**2)  # NaN for an eta that is too large, as in diffusers
        columns: Columns = {"d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "c_noise": std, "t": t}
        if clipped:  # eps from x_0 as clamped
            columns["c_x"], columns["c_m0"] = solvers.first_order(alpha, sigma, alpha_next, towards)
        else:
            e_x, e_f = eps_of(self.config.prediction_type, alpha, sigma)
            columns["c_x"], columns["c_f"], columns["c_m0"] = towards * e_x, towards * e_f, alpha_next
        return columns, eta > 0

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: SeedsLike | None = None,
    ) -> Result:
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        options = (float(eta), bool(use_clipped_model_output))
        row = self._enter(model_output, timestep, sample, options)
        if row.why is not None:
            return self._own(
                row, model_output, timestep, sample, seeds, eta=eta, use_clipped_model_output=use_clipped_model_output,
                generator=generator, variance_noise=variance_noise, return_dict=return_dict,
            )  # fmt: skip
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("generator, variance_noise: expected one of them, got both")
        noise = None
        if row.draws or seeds is not None:
            noise, seeds = self._noise(row, model_output, generator, seeds, variance_noise)
        x, m0 = self._step(row, model_output, sample, noise, seeds)
        if not return_dict:
            return x, m0
        return self._output_class(prev_sample=x, pred_original_sample=m0)


class DDIMScheduler(DDIM, theirs.scheduling_ddim.DDIMScheduler):
    """DDIM (arXiv 2010.02502, eq. 12); eta: 0 draws no noise, 1 as much as DDPM."""

    _output_class = theirs.scheduling_ddim.DDIMSchedulerOutput


class DDIMInverseScheduler(FromCleanest, DDIM, theirs.scheduling_ddim_inverse.DDIMInverseScheduler):
    """DDIM towards noise, from an image."""

    _output_class = theirs.scheduling_ddim_inverse.DDIMSchedulerOutput
    _tensors = "timesteps", "alphas_cumprod", "initial_alpha_cumprod"

    def __init__(
        self, *args: Any, **kwargs: Any
    ) -> None:  # by this name diffusers knows a class with deprecated arguments
        super().__init__(*args, **kwargs)

    def _level(self) -> Array:
        return self._abar(self._t() - self._apart(), self.initial_alpha_cumprod)

    def _abar_next(self, t: NDArray[np.integer]) -> Array:
        return self._abar(t)

    def _lambdas(self, alpha: Array, sigma: Array, d_x: Array) -> Array:
        return super()._lambdas(alpha, np.maximum(sigma, 1e-30), d_x)  # eps counts where x is x_0 alone too

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:  # type: ignore[override]
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample, self._options)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x, m0 = self._step(row, model_output, sample)
        return self._output_class(prev_sample=x, pred_original_sample=m0) if return_dict else (x, m0)
