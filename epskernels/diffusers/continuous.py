"""On time from 1 to 0: DDPMWuerstchen, and the predictor of ScoreSdeVe."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import Ends, Formula, Generators, Levels, Options, Result, Timestep, as_float64, ends_of
from .plan import Plan
from .scheduler import FLOAT32
from .timesteps import OnTimesteps


class DDPMWuerstchenScheduler(OnTimesteps, theirs.scheduling_ddpm_wuerstchen.DDPMWuerstchenScheduler):
    """timestep: (B,), all the same. Pipelines round it to the model's dtype, and diffusers' numbers are of what it is then."""

    _options = (FLOAT32,)
    _tensors = "timesteps", "s", "_init_alpha_cumprod"
    _reads = ("scaler",)

    def _length(self) -> int:
        return len(self.timesteps) - 1

    def _abars(self, options: Options) -> Iterator[Array]:
        """alphas_cumprod of each step, and where it ends, which diffusers takes from the schedule as it is."""
        exact = self.timesteps.detach().cpu()
        rounded = exact.double() if options[0] is FLOAT32 else exact.to(options[0])
        return (as_float64(self._alpha_cumprod(t, "cpu")) for t in (rounded[:-1], exact.double()[1:]))

    def _model(self, options: Options) -> Levels:
        abar, _ = self._abars(options)
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        return alpha, sigma, 1 / alpha, -sigma / alpha

    def _ends_of(self, options: Options) -> Ends:
        _, abar = self._abars(options)
        return ends_of(np.sqrt(abar), np.where(as_float64(self.timesteps)[1:] == 0, 0.0, np.sqrt(1 - abar)))

    def _largest_sigma(self, sigma: Array) -> float:
        return float(np.nanmax(sigma))

    def _formula(self, options: Options) -> Formula:
        abar, abar_next = self._abars(options)
        _, sigma, d_x, d_f = self._model(options)
        ratio, ends = np.sqrt(abar / abar_next), as_float64(self.timesteps)[1:] == 0
        c_x, c_m0, variance = solvers.posterior(ratio, 1 - ratio**2, sigma, np.sqrt(abar_next), np.sqrt(1 - abar_next))
        columns = {"d_x": d_x, "d_f": d_f, "c_x": c_x, "c_m0": c_m0, "c_noise": np.where(ends, 0.0, np.sqrt(variance))}
        return columns | {"t": as_float64(self.timesteps)[:-1]}, True

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        return np.arange(rows), rows

    def _row(self, plan: Plan, timestep: Any) -> int | None:
        one = timestep.numel() == 1 or timestep.stride() == (0,)  # of a single element, which need not be read
        i = self._seen.place(timestep[0]) if one else None
        if i is None:
            first, *others = timestep.tolist()
            host = np.asarray(self._host(), dtype=np.float32)
            i = int(np.abs(host - np.float32(first)).argmin())
            if (
                any(other != first for other in others)
                or float(torch.tensor(self._host()[i]).to(timestep.dtype)) != first
            ):
                return None
        return i if i < len(plan) else None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f, x = model_output, sample
        if timestep.dim() != 1:
            return self._theirs.step(self, f, timestep, x, generator, return_dict)  # which raises
        row = self._enter(f, timestep, x, (timestep.dtype,))
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict)
        noise, seeds = self._noise(row, f, generator, seeds)
        x = self._step(row, f, x, noise, seeds, like_f=True, results=1).to(f.dtype)
        return theirs.scheduling_ddpm_wuerstchen.DDPMWuerstchenSchedulerOutput(prev_sample=x) if return_dict else (x,)


class ScoreSdeVeScheduler(OnTimesteps, theirs.scheduling_sde_ve.ScoreSdeVeScheduler):
    """The model's output is the score, -eps/sigma. step_correct, which is told no time, is diffusers' own and not scaled.

    A correction is of step_pred's prev_sample; prev_sample_mean is as without it.
    """

    _tensors = "timesteps", "discrete_sigmas"

    def _levels(self) -> tuple[Array, ...]:
        """sigma of each call and of the level below, 0 below the last."""
        sigmas, t = as_float64(self.discrete_sigmas), np.asarray(self._host(), dtype=np.float32)
        at = (t * np.float32(len(t) - 1)).astype(np.int64)
        sigma = np.where(at < len(sigmas), sigmas[np.minimum(at, len(sigmas) - 1)], np.nan)
        return sigma, np.where(at > 0, sigmas[np.clip(at - 1, 0, len(sigmas) - 1)], 0.0)

    def _model(self, options: Options) -> Levels:
        sigma = self._levels()[0]
        return np.ones(len(sigma)), sigma, np.ones(len(sigma)), sigma**2

    def _ends_of(self, options: Options) -> Ends:
        below = self._levels()[1]
        return ends_of(np.ones(len(below)), below)

    def _largest_sigma(self, sigma: Array) -> float:
        return float(np.nanmax(sigma))

    def _formula(self, options: Options) -> Formula:
        sigma, below = self._levels()
        variance = sigma**2 - below**2
        of_x0 = variance / sigma**2
        columns = {
            "d_x": np.ones(len(sigma)),
            "d_f": sigma**2,
            "c_x": 1.0,
            "c_f": variance,
            "c_noise": np.sqrt(variance),
        }
        return columns | {"k_x": 1 - of_x0, "k_m0": of_x0, "t": np.asarray(self._host())}, True

    def step_pred(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f, x = model_output, sample
        row = self._enter(f, timestep, x)
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, "step_pred", generator=generator, return_dict=return_dict)
        noise, seeds = self._noise(row, x, generator, seeds)
        x, _, mean = self._step(row, f, x.to(FLOAT32), noise, seeds, results=3)  # diffusers' sigmas are float32 tensors
        return theirs.scheduling_sde_ve.SdeVeOutput(x, mean) if return_dict else (x, mean)
