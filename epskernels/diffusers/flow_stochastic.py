"""Rectified flow with new noise in each step: FlowMatchLCM, LTXEulerAncestralRF."""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from .. import solvers
from ..typing import SeedsLike
from .common import OURS, Formula, Generators, Options, Result, Timestep, as_dtype_of, refuse_integers
from .flow import OnFlow
from .plan import set_by_attribute
from .scheduler import FLOAT32


class FlowMatchLCMScheduler(OnFlow, theirs.scheduling_flow_match_lcm.FlowMatchLCMScheduler):
    """To the estimate of x_0, then new noise, in each step."""

    _reads = "_scale_factors", "_upscale_mode"

    def _formula(self, options: Options) -> Formula:
        return self._redrawn()

    def _refuses(self) -> str | None:
        if self._scale_factors and self._upscale_mode:
            return "scale_factors resize the estimate of x_0"
        return None

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        refuse_integers(self, timestep)
        f = model_output
        if self._step_index is None:
            self._init_size = None  # diffusers' own step asks for it anew where a trajectory begins
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        noise, seeds = self._noise(row, f, generator, seeds, dtype=FLOAT32)  # as diffusers, whatever the model's dtype
        x = self._step(row, f, sample, noise, seeds, like_f=True, results=1)
        self._step_index += 1
        output = theirs.scheduling_flow_match_lcm.FlowMatchLCMSchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)


class LTXEulerAncestralRFScheduler(OnFlow, theirs.scheduling_ltx_euler_ancestral_rf.LTXEulerAncestralRFScheduler):
    """Euler's step to a level below, then new noise up to the schedule's (`solvers.flow_ancestral`)."""

    _needs_steps = True

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """diffusers makes another scheduler of the configuration there, which would say that it ignores ours."""
        own = self._internal_dict
        self._internal_dict = FrozenDict({name: value for name, value in own.items() if name not in OURS})
        self._internal_dict.__dict__.update(set_by_attribute(own))
        try:
            super()._set_timesteps(*args, **kwargs)
        finally:
            self._internal_dict = own

    def _formula(self, options: Options) -> Formula:
        sigma, sigma_next = self._sigmas()
        eta, s_noise = float(self.config.eta), float(self.config.s_noise)
        last = np.abs(sigma_next) < 1e-8
        draws = ~last & (eta > 0) & (s_noise > 0)
        c_x, c_m0, std = solvers.flow_ancestral(sigma, np.where(last, 0.0, sigma_next), eta, draws)
        return {"d_x": 1.0, "d_f": -sigma, "t": sigma, "c_x": c_x, "c_m0": c_m0, "c_noise": std * s_noise}, draws

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        refuse_integers(self, timestep)
        f = model_output
        more: dict[str, Any] = {"generator": generator, "return_dict": return_dict}
        if (
            self._step_index is not None and self._step_index >= self._length()
        ):  # of a schedule's last timestep, at sigma 0
            return self._theirs.step(self, f, timestep, sample, **more)
        row = self._enter(f, timestep, sample)
        if row.why is not None:
            return self._own(row, f, timestep, sample, seeds, **more)
        noise, seeds = self._noise(row, f, generator, seeds, dtype=FLOAT32)
        x = as_dtype_of(self._step(row, f, sample, noise, seeds, results=1), sample)
        self._step_index += 1
        output = theirs.scheduling_ltx_euler_ancestral_rf.LTXEulerAncestralRFSchedulerOutput
        return output(prev_sample=x) if return_dict else (x,)
