"""Consistency models: LCM, TCD, SCM, CMStochasticIterative, ConsistencyDecoder."""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import (
    Ends,
    Formula,
    Generators,
    Levels,
    Options,
    Result,
    Timestep,
    as_dtype_of,
    as_float64,
    clip_of,
    ends_of,
    refuse_integers,
    say,
    widest,
)
from .plan import Plan
from .scheduler import FLOAT32, Fused
from .sigmas import OnSigmas
from .timesteps import OnAlphas


class _Consistency(OnAlphas):
    """Their second result is y'."""

    _needs_steps = True

    def _end(self) -> Array:
        """alphas_cumprod where each step ends."""
        raise NotImplementedError

    def _ends_of(self, options: Options) -> Ends:
        abar = self._end()
        return ends_of(np.sqrt(abar), np.sqrt(1 - abar))

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index  # beyond where timesteps were cut, diffusers goes on by the timestep that it is given
        return i if i < self._seen.length else None

    def _consistency(
        self, options: Options, f: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool,
        seeds: SeedsLike | None, **more: Any,
    ) -> Result:  # fmt: skip
        row = self._enter(f, timestep, x, options)
        if row.why is None and self._place(timestep) != row.step:
            row = row.refused(f"timestep {timestep} is not that of step {row.step}")
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict, **more)
        x = widest(f, x)
        noise, seeds = self._noise(row, f, generator, seeds, dtype=x.dtype)
        x, _, y = self._step(row, f, x, noise, seeds, results=3)
        self._step_index += 1
        return self._output_class(x, y) if return_dict else (x, y)


class LCMScheduler(_Consistency, theirs.scheduling_lcm.LCMScheduler):
    """Latent consistency (arXiv 2310.04378, alg. 3): to the estimate of x_0, then new noise."""

    _output_class = theirs.scheduling_lcm.LCMSchedulerOutput

    def _end(self) -> Array:
        t = self._t()
        abar = self._abar(np.append(t[1:], t[-1]))  # of itself, where the schedule ends before num_inference_steps
        return np.where(np.arange(len(t)) == self.num_inference_steps - 1, 1.0, abar)

    def _formula(self, options: Options) -> Formula:
        t, abar_prev = self._t(), self._end()
        last = np.arange(len(t)) == self.num_inference_steps - 1
        c_skip, c_out = solvers.boundary(t * self.config.timestep_scaling)
        root = np.sqrt(abar_prev)
        d_x, d_f = self._model(options)[2:]
        columns = {
            "d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "t": t, "c_x": root * c_skip, "c_m0": root * c_out,
            "c_noise": np.sqrt(1 - abar_prev), "k_x": c_skip, "k_m0": c_out,
        }  # fmt: skip
        return columns, ~last

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self._consistency((), model_output, timestep, sample, generator, return_dict, seeds)


class TCDScheduler(_Consistency, theirs.scheduling_tcd.TCDScheduler):
    """Trajectory consistency (arXiv 2402.19159): along the path, then new noise, the more the larger eta is."""

    _output_class = theirs.scheduling_tcd.TCDSchedulerOutput
    _options = (0.3,)

    def _read_config(self) -> None:
        self._thresholds = False  # diffusers' step does not look at it

    def _end(self) -> Array:
        return self._abar(np.append(self._t()[1:], 0))

    def _formula(self, options: Options) -> Formula:
        (eta,) = options
        t = self._t()
        prev = np.append(t[1:], 0)
        # diffusers multiplies in float32, whose floor may be another integer.
        s = np.floor(np.float32(1 - eta) * prev.astype(np.float32)).astype(np.int64)
        abar_s, (alpha, sigma, d_x, d_f) = self._abar(s), self._model(options)
        k_x, k_m0 = solvers.first_order(alpha, sigma, np.sqrt(abar_s), np.sqrt(1 - abar_s))
        draws = (np.arange(len(t)) != self.num_inference_steps - 1) & (eta > 0)
        ratio = np.where(draws, self._ratio(self._abar(prev), abar_s), 1.0)
        columns = {
            "d_x": d_x, "d_f": d_f, "t": t, "k_x": k_x, "k_m0": k_m0, "c_x": np.sqrt(ratio) * k_x, "c_m0": np.sqrt(ratio) * k_m0,
            "c_noise": np.sqrt(1 - ratio),
        }  # fmt: skip
        return columns, draws

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, eta: float = 0.3, generator: Generators = None,
        return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
        return self._consistency((float(eta),), model_output, timestep, sample, generator, return_dict, seeds, eta=eta)


class SCMScheduler(Fused, theirs.scheduling_scm.SCMScheduler):
    """TrigFlow: the timesteps are angles, one more than steps."""

    _tensors = ("timesteps",)
    _needs_steps = True

    def _length(self) -> int:
        return len(self.timesteps) - 1

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        at, steps = OnAlphas._lambda_steps(self, rows + 1)
        return at[:-1], steps - 1

    def _model(self, options: Options) -> Levels:
        if self.config.prediction_type != "trigflow":
            raise ValueError(f"prediction_type: expected 'trigflow', got {self.config.prediction_type!r}")
        alpha, sigma = solvers.trigonometric(as_float64(self.timesteps)[:-1])
        return alpha, sigma, alpha, -sigma

    def _ends_of(self, options: Options) -> Ends:
        return ends_of(*solvers.trigonometric(as_float64(self.timesteps)[1:]))

    def _largest_sigma(self, sigma: Array) -> float:
        return super()._largest_sigma(np.append(sigma, np.sin(self._scheduled)))

    def _formula(self, options: Options) -> Formula:
        t = as_float64(self.timesteps)
        _, _, d_x, d_f = self._model(options)
        alpha_next, sigma_next = solvers.trigonometric(t[1:])
        return {
            "d_x": d_x, "d_f": d_f, "t": t[:-1], "c_x": np.zeros(len(d_x)), "c_m0": alpha_next,
            "c_noise": sigma_next * self.config.sigma_data,
        }, True  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step, whose state is float32 after it, as its noise is; seeds: (B,), for noise made in the kernel."""
        f = model_output
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        noise, seeds = self._noise(row, f, generator, seeds, dtype=FLOAT32)
        x, m0 = self._step(row, f, sample.float(), noise, seeds)
        self._step_index += 1
        m0 = as_dtype_of(m0, widest(f, sample))
        return theirs.scheduling_scm.SCMSchedulerOutput(x, m0) if return_dict else (x, m0)


class CMStochasticIterativeScheduler(OnSigmas, theirs.scheduling_consistency_models.CMStochasticIterativeScheduler):
    """Consistency models (arXiv 2303.01469, alg. 1): to the estimate of x_0, then new noise."""

    def _data_variance(self) -> float:
        return self.config.sigma_data**2

    def _model(self, options: Options) -> Levels:
        sigma = self._sigmas()[0]
        c_skip, c_out = solvers.consistency_boundary(sigma, self.config.sigma_min, self.config.sigma_data)
        return (
            np.ones(len(sigma)),
            np.where(c_out == 0, 0.0, sigma),
            c_skip,
            c_out,
        )  # at sigma_min the output counts nothing

    def _std(self) -> Array:
        """Of the noise that comes to the estimate of x_0."""
        config, sigma_next = self.config, self._sigmas()[1]
        return solvers.rest(np.clip(sigma_next, config.sigma_min, config.sigma_max), config.sigma_min)

    def _ends_of(self, options: Options) -> Ends:
        std = self._std()
        return ends_of(np.ones(len(std)), std * (len(self.timesteps) > 1))

    def _formula(self, options: Options) -> Formula:
        config, sigma = self.config, self._sigmas()[0]
        _, _, d_x, d_f = self._model(options)
        draws = len(self.timesteps) > 1
        return {
            "d_x": d_x, "d_f": d_f, "clip": 1.0 if config.clip_denoised else np.inf, "t": sigma, "c_x": np.zeros(len(sigma)),
            "c_m0": 1.0, "c_noise": self._std() * config.s_noise * draws,
        }, draws  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        refuse_integers(self, timestep)
        if not self.is_scale_input_called:
            say(self, "expects scale_model_input to be called on what the model is given, before step, and it was not")
        f = model_output
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        x = self._step(row, f, sample, *self._noise(row, f, generator, seeds), results=1)
        self._step_index += 1
        output = theirs.scheduling_consistency_models.CMStochasticIterativeSchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)


class ConsistencyDecoderScheduler(Fused, theirs.ConsistencyDecoderScheduler):
    """Two steps, by their timesteps: it has no step index."""

    _tensors = "timesteps", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "c_skip", "c_out"

    def _length(self) -> int:
        return len(self.timesteps)

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        return self._place(timestep)

    def _model(self, options: Options) -> Levels:
        alpha, sigma, d_x, d_f = (as_float64(getattr(self, name))[self._host()] for name in self._tensors[1:])
        return alpha, sigma, d_x, d_f

    def _ends_of(self, options: Options) -> Ends:
        alpha, sigma = (
            np.append(level[1:], end) for level, end in zip(self._model(options)[:2], (1.0, 0.0), strict=True)
        )
        return ends_of(alpha, sigma)

    def _formula(self, options: Options) -> Formula:
        alpha, sigma, d_x, d_f = self._model(options)
        last = np.arange(len(alpha)) == len(alpha) - 1
        return {
            "d_x": d_x, "d_f": d_f, "t": self._host(), "c_x": np.zeros(len(alpha)),
            "c_m0": np.where(last, 1.0, np.roll(alpha, -1)), "c_noise": np.where(last, 0.0, np.roll(sigma, -1)),
        }, ~last  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f = model_output
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        x = widest(f, sample)
        x = self._step(row, f, x, *self._noise(row, f, generator, seeds, dtype=x.dtype), results=1)
        output = theirs.scheduling_consistency_decoder.ConsistencyDecoderSchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)
