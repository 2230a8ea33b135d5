"""Rectified flow: FlowMatchEuler."""

import dataclasses

import diffusers
import numpy as np
import torch
from diffusers import schedulers as theirs
from torch import Tensor

from .. import scaling
from ..ops import step
from ..table import COLUMNS, DEFAULTS
from .common import as_float64, refuse_integers, widest
from .scheduler import FLOAT32, Fused


class FlowMatchEulerDiscreteScheduler(Fused, diffusers.FlowMatchEulerDiscreteScheduler):
    def _model(self, options):
        sigma = as_float64(self.sigmas)[:-1]
        one = np.ones(len(sigma))
        if self.config.invert_sigmas:  # the schedule's are of x_0
            return sigma, 1 - sigma, one, 1 - sigma
        if not self._interpolates(sigma):  # x = x_0 + sigma*eps: the velocity is eps
            return one, sigma, one, -sigma
        return 1 - sigma, sigma, one, -sigma

    def _interpolates(self, sigma):
        """Whether x = (1 - sigma)*x_0 + sigma*eps at the schedule's sigmas, in float64 on the host."""
        return not self.config.invert_sigmas and sigma.max() <= 1.001

    def _formula(self, options):
        sigma, sigma_next = (sigmas := as_float64(self.sigmas))[:-1], sigmas[1:]
        columns = {"d_x": 1.0, "d_f": -sigma, "t": sigma}
        if self.config.stochastic_sampling:
            return columns | {"c_x": np.zeros(len(sigma)), "c_m0": 1 - sigma_next, "c_noise": sigma_next}, True
        return columns | {"c_x": np.ones(len(sigma)), "c_f": sigma_next - sigma}, False

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        per_token_timesteps=None,
        return_dict=True,
        *,
        seeds=None,
    ):
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
            x = self._per_token(row, f, widest(f, sample).float(), per_token_timesteps, noise, seeds)
        self._step_index += 1
        if not return_dict:
            return (x,)
        return theirs.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)

    def _per_token(self, row, f, x, timesteps, noise, seeds):
        """Each token with a level of its own, (B, N) timesteps: one launch with a row for each token, made on the device."""
        try:
            timesteps = timesteps.expand(x.shape[:2] if x.dim() == 3 else None)
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
        lambda_t = float(scaling.as_scaling(self.config.eps_scaling, "eps_scaling").values(steps)[at[row.step]])
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
        noise = {} if noise is None else {"noise": noise.flatten(0, 1)}
        self.path = "fused"
        index = torch.arange(sigma.numel(), device=x.device)
        return step(x.flatten(0, 1), f.flatten(0, 1), rows.flatten(0, 1), index, **noise).unflatten(0, sigma.shape)
