"""DDPM and DDIM for ParaDiGMS (arXiv 2305.16317), where a batch's samples are at timesteps of their own."""

import copy
import dataclasses
from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import scaling
from ..corrections import Correction, as_correction
from ..table import COLUMNS
from ..typing import Array
from .common import Columns, Draws, Options, Timestep, say
from .plan import Plan
from .scheduler import FLOAT32, Fused
from .timesteps import DDIM, DDPM, OnTimesteps

BATCH = "batch"


class _Parallel(OnTimesteps):
    """The rows of a batch: one for each training timestep, so that timesteps are indices, and none is read back.

    As in diffusers, a row's next timestep is a constant number below, whatever the spacing; alphas_cumprod is 1 below 0.
    Between the schedule's timesteps lambda is interpolated, and so are a correction's weights.
    """

    # Of each training timestep, in the twin that makes the rows of a batch: lambda, and the weights of a correction.
    _dense: Array | None = None
    _dense_weights: tuple[Array, Array]

    def _scaled_formula(self, options: Options) -> tuple[Columns, Draws, Array, Array]:
        if BATCH not in options:
            return super()._scaled_formula(options)
        twin, t = copy.copy(self), np.asarray(self._host())
        of_steps = np.array(self._plan(options[:-1], self.timesteps.device).lambda_t)
        order = np.argsort(t, kind="stable")
        made = [of_steps]
        if (correction := as_correction(self.correction)) is not None:
            made += super()._weights(correction, *self._model(options)[:2])
        dense = [np.interp(np.arange(self.config.num_train_timesteps), t[order], each[order]) for each in made]
        twin._dense, twin._dense_weights = dense[0], tuple(dense[1:])
        columns, _, scale, on_x = Fused._scaled_formula(twin, options)
        for name in ("c_noise", "logvar_min", "logvar_max"):
            columns.pop(name, None)
        if not all(np.isfinite(column).all() for name, column in columns.items() if name != "clip"):
            columns["c_x"] = columns["c_x"] * np.nan  # all rows or none
        return columns, False, scale, on_x

    def _t(self) -> NDArray[np.integer]:
        return super()._t() if self._dense is None else np.arange(len(self._dense))

    def _abar_next(self, t: NDArray[np.integer]) -> Array:
        if self._dense is None:
            return super()._abar_next(t)
        trained = self.config.num_train_timesteps
        return self._abar(t - trained // (self.num_inference_steps or trained))

    def _lambdas(self, alpha: Array, sigma: Array, d_x: Array) -> Array:
        if self._dense is None or self._as_scaling().by_level:
            return super()._lambdas(alpha, sigma, d_x)
        alone = scaling.noise_alone(alpha, sigma, ~(np.abs(d_x * alpha - 1) < 1e-9))
        return np.where(alone | (sigma == 0), 1.0, self._dense)

    def _weights(self, correction: Correction, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        return super()._weights(correction, alpha, sigma) if self._dense is None else self._dense_weights

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        return 0 if timestep is None else super()._row(plan, timestep)

    def _batch(self, f: Tensor, timesteps: Tensor, x: Tensor, options: Options, **arguments: Any) -> Tensor:
        row, plan = self._enter(f, None, x, (*options, BATCH)), self._plan((*options, BATCH), x.device)
        at = timesteps.reshape(-1).to(f.device)
        if f.shape[1] == 2 * x.shape[1] and getattr(self, "variance_type", None) in ("learned", "learned_range"):
            f = f[:, : x.shape[1]]
        each = (-1, *[1] * (x.dim() - 1))
        if row.why is not None:
            self._refuse_uncorrected(dataclasses.replace(row, corrects=True))  # some row of the batch is
            if self.config.eps_scaling != 1:
                of_rows = ([getattr(row, name) for row in plan.rows] for name in ("lambda_t", "to_x"))
                lambda_t, to_x = (x.new_tensor(values)[at].view(each) for values in of_rows)
                f = self._scaled_output(f, x, lambda_t, to_x)
            self.path = f"diffusers: {row.why}"
            say(self, f"runs diffusers' own step: {row.why}")
            return self._theirs.batch_step_no_noise(self, f, timesteps, x, **arguments)
        index = at if at.numel() > 1 else at[0]
        d_x, d_f = (plan.table[at, COLUMNS.index(name)].view(each) if row.thresholds else 0 for name in ("d_x", "d_f"))
        row = dataclasses.replace(row, index=index, d_x=d_x, d_f=d_f)
        return self._step(row, f, x.to(FLOAT32), results=1)  # diffusers' numbers of a sample are float32 tensors


class DDPMParallelScheduler(_Parallel, DDPM, theirs.scheduling_ddpm_parallel.DDPMParallelScheduler):
    """DDPMScheduler, and batches whose samples are at timesteps of their own."""

    _output_class = theirs.scheduling_ddpm_parallel.DDPMParallelSchedulerOutput

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """diffusers' step without its noise, of samples at timesteps of their own, (B,): one launch."""
        return self._batch(model_output, timesteps, sample, ())


class DDIMParallelScheduler(_Parallel, DDIM, theirs.scheduling_ddim_parallel.DDIMParallelScheduler):
    """DDIMScheduler, and batches whose samples are at timesteps of their own."""

    _output_class = theirs.scheduling_ddim_parallel.DDIMParallelSchedulerOutput

    def batch_step_no_noise(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False,
    ) -> Tensor:  # fmt: skip
        """diffusers' step without noise, of samples at timesteps of their own, (B,): one launch."""
        if eta != 0:
            raise ValueError(f"eta: expected 0, since no noise is added, got {eta}")
        clipped = bool(use_clipped_model_output)
        return self._batch(model_output, timesteps, sample, (0.0, clipped), use_clipped_model_output=clipped)
