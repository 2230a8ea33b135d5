"""On steps counted from the first, x = x_0 + sigma*eps: Euler, EulerAncestral, Heun, EDMEuler."""

import math
from typing import Any

import numpy as np
import torch
from diffusers import schedulers as theirs
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
    as_float64,
    clip_of,
    ends_of,
    output_of,
    positive_zeros,
    refuse_integers,
    say,
    widest,
)
from .scheduler import FLOAT32, Fused, InHalves


class OnSigmas(Fused):
    """x = x_0 + sigma*eps at the schedule's sigmas; steps are counted from the first."""

    def _sigmas(self) -> tuple[Array, Any]:
        """sigma at each model call, and where its step ends."""
        return (sigmas := as_float64(self.sigmas))[:-1], sigmas[1:]

    def _input_scale(self) -> list[float] | None:
        return (1 / np.sqrt(as_float64(self.sigmas) ** 2 + self._data_variance())).tolist()

    def _data_variance(self) -> float:
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """sample/sqrt(sigma^2 + data's variance) for the step to come, in sample's dtype: what the model reads. Raises IndexError
        after the last step."""
        if self._step_index is None:
            self._init_step_index(timestep)
        seen = self._seen
        if seen is None or not seen.is_of(self):
            seen = self._look()
        scales, i = seen.schedule.input_scale, self._step_index
        if i >= len(scales):
            raise IndexError(f"scale_model_input: expected a step below {len(scales)}, the schedule's, got step {i}")
        self.is_scale_input_called = True
        return sample * scales[i]

    def _output(self, sigma: Array, at: Array | None = None) -> tuple[Array, Array]:
        """(d_x, d_f) of x_0; at: the level that v_prediction takes, where it is not sigma."""
        kind = self.config.prediction_type
        kind = "sample" if kind == "original_sample" else kind
        level = at if at is not None and kind == "v_prediction" else sigma
        c_in = solvers.preconditioned(level, 1.0)[2]  # the network knows x/sqrt(1 + sigma^2)
        return positive_zeros(solvers.x0_of(*output_of(kind, c_in, c_in * level), 1.0, level))

    def _model(self, options: Options) -> Levels:
        sigma = self._sigmas()[0]
        return np.ones(len(sigma)), sigma, *self._output(sigma)

    def _ends_of(self, options: Options) -> Ends:
        sigma_next = self._sigmas()[1]
        return ends_of(np.ones(len(sigma_next)), sigma_next)

    def _result(self, x: Tensor, m0: Tensor, return_dict: bool) -> Result:
        self._step_index += 1
        return self._output_class(prev_sample=x, pred_original_sample=m0) if return_dict else (x, m0)


def warn_of_unscaled_input(scheduler: object) -> None:
    """Says that scale_model_input was not called before step."""
    say(scheduler, "expects scale_model_input to be called on what the model is given, before step, and it was not")


class _Euler(OnSigmas):
    """Euler with churn, whose noise the model's estimate sees too: x gets it in an operation of its own."""

    _options = (0.0, 0.0, math.inf)

    def _hat(self, options: Options) -> tuple[Array, Array]:
        sigma = self._sigmas()[0]
        return sigma, solvers.churned(sigma, len(self.sigmas) - 1, *options)

    def _model(self, options: Options) -> Levels:
        sigma, hat = self._hat(options)
        return np.ones(len(sigma)), hat, *self._output(hat, sigma)

    def _formula(self, options: Options) -> Formula:
        sigma, hat = self._hat(options)
        d_x, d_f = self._output(hat, sigma)
        c_x, c_m0 = solvers.first_order(1.0, hat, 1.0, self._sigmas()[1])
        churn_std = np.sqrt(hat**2 - sigma**2)
        return {"d_x": d_x, "d_f": d_f, "c_x": c_x, "c_m0": c_m0, "churn_std": churn_std, "t": sigma}, churn_std > 0

    def _euler(
        self, f: Tensor, timestep: Timestep, x: Tensor, churn: dict[str, Any], s_noise: float, generator: Generators,
        return_dict: bool, seeds: SeedsLike | None, **more: Any,
    ) -> Result:  # fmt: skip
        if type(timestep) is not Tensor or timestep.dtype is not FLOAT32:
            refuse_integers(self, timestep)
        if not self.is_scale_input_called:
            warn_of_unscaled_input(self)
        s_churn, s_tmin, s_tmax = churn.values()
        row = self._enter(f, timestep, x, (float(s_churn), float(s_tmin), float(s_tmax)))
        if more.get("pred_original_sample") is not None:
            row = row.refused("pred_original_sample is given")
            if self.config.eps_scaling != 1:
                raise ValueError("pred_original_sample: expected None, since it has its own lambda, got a tensor")
        if row.why is not None:
            return self._own(
                row, f, timestep, x, seeds, **churn, s_noise=s_noise, generator=generator, return_dict=return_dict,
                **more,
            )  # fmt: skip
        if row.draws or seeds is not None:
            noise = self._drawn(*self._noise(row, f, generator, seeds), x, row.step)
            if noise is not None:
                x = torch.add(x.float(), noise, alpha=row.churn_std * s_noise)
        x, m0 = self._step(row, f, x, like_f=True)
        return self._result(x, m0, return_dict)


class EulerDiscreteScheduler(_Euler, theirs.scheduling_euler_discrete.EulerDiscreteScheduler):
    """Euler's step with churn (arXiv 2206.00364, alg. 2, without its second half)."""

    _output_class = theirs.scheduling_euler_discrete.EulerDiscreteSchedulerOutput

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        seeds: SeedsLike | None = None,
    ) -> Result:
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        return self._euler(model_output, timestep, sample, churn, s_noise, generator, return_dict, seeds)


class Preconditioned(Fused):
    """EDM's c_skip and c_out (arXiv 2206.00364, table 1)."""

    def _output(self, sigma: Array, at: Array | None = None) -> tuple[Array, Array]:
        c_skip, c_out, _ = solvers.preconditioned(sigma, self.config.sigma_data)
        signs = {"epsilon": 1.0, "v_prediction": -1.0}
        if self.config.prediction_type not in signs:
            raise ValueError(f"prediction_type: expected one of {tuple(signs)}, got {self.config.prediction_type!r}")
        return c_skip, signs[self.config.prediction_type] * c_out

    def _data_variance(self) -> float:
        return self.config.sigma_data**2


class EDMEulerScheduler(Preconditioned, _Euler, theirs.scheduling_edm_euler.EDMEulerScheduler):
    """Euler's step with churn on EDM's denoiser (arXiv 2206.00364, alg. 2, without its second half)."""

    _output_class = theirs.scheduling_edm_euler.EDMEulerSchedulerOutput

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        *,
        seeds: SeedsLike | None = None,
    ) -> Result:
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        return self._euler(
            model_output, timestep, sample, churn, s_noise, generator, return_dict, seeds,
            pred_original_sample=pred_original_sample,
        )  # fmt: skip


class EulerAncestralDiscreteScheduler(
    OnSigmas, theirs.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler
):
    """Euler's step to sigma_down, then new noise (k-diffusion's euler_ancestral)."""

    _output_class = theirs.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput

    def _formula(self, options: Options) -> Formula:
        if self.config.prediction_type == "sample":
            raise NotImplementedError("prediction_type: 'sample' is not one of EulerAncestralDiscreteScheduler's")
        sigma, sigma_next = self._sigmas()
        d_x, d_f = self._output(sigma)
        down, up = solvers.ancestral(1.0, sigma, 1.0, sigma_next, 1.0)
        c_x, c_m0 = solvers.first_order(1.0, sigma, 1.0, down)
        return {"d_x": d_x, "d_f": d_f, "c_x": c_x, "c_m0": c_m0, "c_noise": up, "t": sigma}, True

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        if type(timestep) is not Tensor or timestep.dtype is not FLOAT32:
            refuse_integers(self, timestep)
        if not self.is_scale_input_called:
            warn_of_unscaled_input(self)
        f = model_output
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        x, m0 = self._step(row, f, sample, *self._noise(row, f, generator, seeds), like_f=True)
        return self._result(x, m0, return_dict)


class HeunDiscreteScheduler(InHalves, OnSigmas, theirs.scheduling_heun_discrete.HeunDiscreteScheduler):
    """Two rows for each step but the last; the second goes on from the state that the first was given, as diffusers does."""

    _output_class = theirs.scheduling_heun_discrete.HeunDiscreteSchedulerOutput
    _mixes = False
    _first_m0: Tensor | None = None
    dt: float | None
    prev_derivative: None

    def _ends_of(self, options: Options) -> Ends:
        at, after = self._sigmas()
        end = np.where(np.arange(len(at)) % 2 == 1, at, after)
        return ends_of(np.ones(len(at)), end, self._ends_steps())

    def _formula(self, options: Options) -> Formula:
        at, after = self._sigmas()
        second = np.arange(len(at)) % 2 == 1
        start = np.where(second, np.roll(at, 1), at)  # where the step began
        end = np.where(second, at, after)
        d_x, d_f = self._output(at)
        first = dict(zip(("c_x", "c_m0"), solvers.first_order(1.0, start, 1.0, end), strict=True))
        then = dict(zip(("c_y", "c_m1", "c_x", "c_m0"), solvers.trapezoid(start, end), strict=True))
        columns = {"d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "t": at}
        columns |= {name: np.where(second, column, first.get(name, 0.0)) for name, column in then.items()}
        return columns, False

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise. Raises ValueError for a second half of a step whose first half did not run."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x, first = widest(model_output, sample), self.state_in_first_order
        if first and row.step % 2:
            raise ValueError(f"timestep: {timestep} begins at the second half of a step, whose first half did not run")
        next_x, m0 = self._step(row, model_output, x, m1=self._first_m0, y=None if first else self.sample)
        if first:  # dt is what state_in_first_order looks at
            self.dt, self.sample, self._first_m0 = row.t, x, m0
        else:
            self.prev_derivative = self.dt = self.sample = self._first_m0 = None
        return self._result(next_x, m0, return_dict)

    def _restart(self) -> None:
        super()._restart()
        self.prev_derivative = self.dt = self.sample = self._first_m0 = None
