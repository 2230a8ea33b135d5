"""Rectified flow, without noise or with any: FlowMatchEuler, FlowMatchHeun, FlowMapEuler, MiniMaxH3."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import scaling, solvers
from ..ops import step
from ..table import COLUMNS, DEFAULTS
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
    ends_of,
    refuse_integers,
    widest,
)
from .plan import Plan, Row
from .scheduler import FLOAT32, Fused, InHalves


class OnFlow(Fused):
    """x = (1 - sigma)*x_0 + sigma*eps, and the output eps - x_0."""

    def _sigmas(self) -> tuple[Array, Array]:
        """sigma at each model call, and where its step ends."""
        return (sigmas := as_float64(self.sigmas))[:-1], sigmas[1:]

    def _ends_of(self, options: Options) -> Ends:
        return ends_of(*self._path(self._sigmas()[1]))

    def _path(self, sigma: Array) -> tuple[Array, Array]:
        """(alpha, sigma) of x where the schedule has `sigma`."""
        if self._inverts():
            return sigma, 1 - sigma
        return (1 - sigma if self._interpolates(self._sigmas()[0]) else np.ones(len(sigma))), sigma

    def _model(self, options: Options) -> Levels:
        sigma = self._sigmas()[0]
        one = np.ones(len(sigma))
        if self._inverts():  # the schedule's are of x_0
            return *self._path(sigma), one, 1 - sigma
        return *self._path(sigma), one, -sigma  # of x = x_0 + sigma*eps the velocity is eps

    def _inverts(self) -> bool:
        return getattr(self.config, "invert_sigmas", False)

    def _interpolates(self, sigma: Array) -> bool:
        """Whether x = (1 - sigma)*x_0 + sigma*eps at the schedule's sigmas, in float64 on the host."""
        return not self._inverts() and sigma.max() <= 1.001

    def _euler(self) -> Result:
        """The columns of Euler's step; m0 counts for a correction alone."""
        sigma, sigma_next = self._sigmas()
        d_x, d_f = self._model(())[2:]
        return {"d_x": d_x, "d_f": d_f, "t": sigma, "c_x": np.ones(len(sigma)), "c_f": sigma_next - sigma}, False

    def _redrawn(self) -> Formula:
        """The columns of a step to the estimate of x_0, and to new noise."""
        sigma, sigma_next = self._sigmas()
        to = {"c_x": np.zeros(len(sigma)), "c_m0": 1 - sigma_next, "c_noise": sigma_next}
        return {"d_x": 1.0, "d_f": -sigma, "t": sigma} | to, True


class FlowMatchEulerDiscreteScheduler(
    OnFlow, theirs.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler
):
    """Euler's step on a rectified flow (arXiv 2209.03003); stochastic_sampling: to the estimate of x_0, then new noise."""

    def _formula(self, options: Options) -> Formula:
        return self._redrawn() if self.config.stochastic_sampling else self._euler()

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: SeedsLike | None = None,
    ) -> Result:
        """diffusers' step, which ignores the four s_ too; seeds: (B,), for noise made in the kernel."""
        f = model_output
        if type(timestep) is not Tensor or timestep.dtype is not FLOAT32:
            refuse_integers(self, timestep)
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(
                row, f, timestep, sample, seeds, generator=generator, per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )  # fmt: skip
        if per_token_timesteps is not None:  # some tokens may have noise to come in the schedule's last step
            row = dataclasses.replace(row, uses_noise=row.draws)
        # diffusers draws in float32, whatever the model's dtype.
        noise = None
        if row.draws or seeds is not None:
            noise, seeds = self._noise(row, f, generator, seeds, dtype=FLOAT32)
        if per_token_timesteps is None:
            x = self._step(row, f, sample, noise, seeds, like_f=True, results=1)
        else:
            if self.correction is not None:
                raise ValueError(
                    "correction: expected None with per_token_timesteps, whose rows are made on the device"
                )
            x = self._per_token(row, f, widest(f, sample).float(), per_token_timesteps, noise, seeds)
        self._step_index += 1
        if not return_dict:
            return (x,)
        return theirs.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)

    def _per_token(
        self, row: Row, f: Tensor, x: Tensor, timesteps: Tensor, noise: Tensor | None, seeds: Tensor | None
    ) -> Tensor:
        """Each token with a level of its own, (B, N) timesteps: one launch with a row for each token, made on the device."""
        try:
            shape: Any = x.shape[:2] if x.dim() == 3 else None
            timesteps = timesteps.expand(shape)
        except (TypeError, RuntimeError):
            raise ValueError(
                "per_token_timesteps: expected (B, N), or a shape that broadcasts to it, for a sample (B, N, C) "
                f"{tuple(x.shape)}, got {tuple(timesteps.shape)}"
            ) from None
        sigma = timesteps / self.config.num_train_timesteps
        levels = self.sigmas.to(sigma.device)[:, None, None]
        below = ((levels < sigma[None] - 1e-6) * levels).max(dim=0).values
        rows = torch.zeros(*sigma.shape, len(COLUMNS), dtype=torch.float32, device=x.device)
        columns = {name: rows[..., j] for j, name in enumerate(COLUMNS)}
        for name, value in DEFAULTS.items():
            if name in columns:
                columns[name].fill_(value)
        at, steps = self._lambda_steps(self._length())
        made = self._as_scaling()
        if made.by_level:
            raise ValueError(f"eps_scaling: expected lambda of steps with per_token_timesteps, got {made}")
        lambda_t = float(made.values(steps)[at[row.step]])
        if lambda_t != 1 and not self._interpolates(as_float64(self.sigmas)[:-1]):
            raise ValueError(
                f"eps_scaling: expected 1 with per_token_timesteps and sigmas inverted or above 1, got {lambda_t:g}"
            )
        nowhere = scaling.noise_alone(1 - sigma, sigma, -1)  # lambda is 1 there
        on_f = torch.where(nowhere, 1.0, 1 / lambda_t)
        to_x = torch.where(nowhere, 0.0, -(1 - 1 / lambda_t) / (1 - sigma))
        if self.config.stochastic_sampling:
            columns["d_x"].copy_(1 - sigma * to_x)
            columns["d_f"].copy_(-sigma * on_f)
            columns["c_m0"].copy_(1 - below)
            columns["c_noise"].copy_(below)
        else:
            columns["c_x"].copy_(1 + (sigma - below) * to_x)
            columns["c_f"].copy_((sigma - below) * on_f)
        noise = self._drawn(noise, seeds, x, row.step)
        noise = None if noise is None else noise.flatten(0, 1)
        self.path = "fused"
        index = torch.arange(sigma.numel(), device=x.device)
        return step(x.flatten(0, 1), f.flatten(0, 1), rows.flatten(0, 1), index, noise=noise).unflatten(0, sigma.shape)


class FlowMatchHeunDiscreteScheduler(
    InHalves, OnFlow, theirs.scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler
):
    """Two rows for each step but the last, as HeunDiscreteScheduler has them; m0 and m1 are the slopes: the outputs."""

    _options = (0.0, 0.0, math.inf)
    _mixes = False
    _first_m0: Tensor | None = None
    dt: float | None
    prev_derivative: None

    def _churned(self, options: Options) -> tuple[NDArray[np.bool_], Array, Array, Array]:
        """(which rows are second halves, sigma where the step began, that once it is raised, and where the step ends)."""
        at, after = self._sigmas()
        second = np.arange(len(at)) % 2 == 1
        start = np.where(second, np.roll(at, 1), at)
        hat = solvers.churned(start, len(self.sigmas) - 1, *options)
        return second, start, hat, np.where(second, at, after)

    def _ends_of(self, options: Options) -> Ends:
        return ends_of(*self._path(self._churned(options)[3]), self._ends_steps())

    def _formula(self, options: Options) -> Formula:
        second, start, hat, end = self._churned(options)
        step, slope = end - hat, start / hat  # diffusers divides what the model gave at sigma by the raised one
        columns = {
            "d_x": np.zeros(len(step)), "d_f": 1.0, "t": self._sigmas()[0], "c_x": np.where(second, 0.0, 1.0),
            "c_y": np.where(second, 1.0, 0.0), "c_m0": np.where(second, step / 2, step * slope),
            "c_m1": np.where(second, step * slope / 2, 0.0), "churn_std": np.where(second, 0.0, np.sqrt(hat**2 - start**2)),
        }  # fmt: skip
        return columns, hat > start  # diffusers draws in the second half too, for nothing

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
        refuse_integers(self, timestep)
        f = model_output
        churn: dict[str, Any] = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        row = self._enter(f, timestep, sample, tuple(float(value) for value in churn.values()))
        if row.why is not None:
            return self._own(
                row, f, timestep, sample, seeds, **churn, s_noise=s_noise, generator=generator, return_dict=return_dict
            )
        x, first = widest(f, sample), self.state_in_first_order
        if first and row.step % 2:
            raise ValueError(f"timestep: {timestep} begins at the second half of a step, whose first half did not run")
        if row.draws or seeds is not None:
            noise = self._drawn(*self._noise(row, f, generator, seeds), x, row.step)
            if noise is not None:
                x = torch.add(x.float(), noise, alpha=row.churn_std * s_noise)
        y: Any = None if first else self.sample
        next_x, m0 = self._step(row, f, x if first else as_dtype_of(x, y), m1=self._first_m0, y=y, like_f=True)
        if first:  # dt is what state_in_first_order looks at
            self.dt, self.sample, self._first_m0 = row.t, x, m0
        else:
            self.prev_derivative = self.dt = self.sample = self._first_m0 = None
        self._step_index += 1
        output = theirs.scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput
        return output(prev_sample=next_x) if return_dict else (next_x,)

    def _restart(self) -> None:
        super()._restart()
        self.prev_derivative = self.dt = self.sample = self._first_m0 = None


class FlowMapEulerDiscreteScheduler(OnFlow, theirs.scheduling_flow_map_euler_discrete.FlowMapEulerDiscreteScheduler):
    """The mean velocity of a step is taken for the one at its beginning, where lambda scales it."""

    _uncorrected = "whose model gives the mean velocity of a step, which says nothing of x_0"

    def _formula(self, options: Options) -> Formula:
        return self._euler()

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        """By the timestep, or the nearest within 0.001; the step's number is for those who look at it."""
        if self._step_index is None:
            self._init_step_index(timestep)
        if (i := self._place(timestep)) is None:
            i = self.index_for_timestep(timestep)
        return i

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, r_timestep: Timestep | None = None,
        return_dict: bool = True,
    ) -> Result:  # fmt: skip
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample)
        if r_timestep is not None and row.why is None:
            row = row.refused("r_timestep is given")
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, r_timestep=r_timestep, return_dict=return_dict)
        x = self._step(row, model_output, sample, like_f=True, results=1)
        self._step_index += 1
        output = theirs.scheduling_flow_map_euler_discrete.FlowMapEulerDiscreteSchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)


class MiniMaxH3Scheduler(OnFlow, theirs.scheduling_minimax_h3.MiniMaxH3Scheduler):
    """Its output is x_0 - eps, and its timesteps are the shares of x_0, which diffusers takes from there and not from sigmas."""

    _needs_steps = True

    def _model(self, options: Options) -> Levels:
        alpha, given = 1 - self._sigmas()[0], as_float64(self.timesteps)
        alpha[: len(given)] = given
        return alpha, 1 - alpha, np.ones(len(alpha)), 1 - alpha

    def _formula(self, options: Options) -> Formula:
        sigma, sigma_next = self._sigmas()
        alpha, level, d_x, d_f = self._model(options)
        return {"d_x": d_x, "d_f": d_f, "t": alpha, "c_x": d_x, "c_f": (1 - sigma_next / sigma) * level}, False

    def _init_step_index(self, timestep: Timestep) -> None:
        if (i := self._begin_index) is None and self._seen is not None:
            i = self._place(timestep)
        self._step_index = self.index_for_timestep(timestep) if i is None else i

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise."""
        refuse_integers(self, timestep)
        row = self._enter(model_output, timestep, sample)
        if row.why is None and self._place(timestep) != row.step:
            row = row.refused(f"timestep {timestep} is not that of step {row.step}")
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x = as_dtype_of(self._step(row, model_output, sample, results=1), sample)
        self._step_index += 1
        output = theirs.scheduling_minimax_h3.MiniMaxH3SchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)
