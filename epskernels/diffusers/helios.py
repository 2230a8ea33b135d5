"""UniPC and Euler on the stages of Helios: HeliosScheduler."""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from torch import Tensor

from ..typing import Array
from .common import Formula, Generators, Options, Result, Timestep, as_float64
from .multistep import UniPC
from .plan import Plan


class HeliosScheduler(UniPC, theirs.scheduling_helios.HeliosScheduler):
    """last_sample in the result is not the corrected state, but what is known of the next one before the model's call."""

    def _read_config(self) -> None:
        self._thresholds = False

    def _refuses(self) -> str | None:
        if self.config.thresholding:
            return "thresholding, which diffusers' class does not have"
        return super()._refuses()

    def _alpha_sigma(self, sigmas: Array) -> tuple[Array, Array]:
        alpha, sigma = super()._alpha_sigma(sigmas)
        return alpha, np.maximum(sigma, 1e-8) if self.config.use_flow_sigmas else sigma

    def _formula(self, options: Options) -> Formula:
        if self.config.scheduler_type != "euler":
            return super()._formula(options)
        sigma, sigma_next = (sigmas := as_float64(self.sigmas))[:-1], sigmas[1:]
        d_x, d_f = self._denoiser()
        return {"d_x": d_x, "d_f": d_f, "c_x": np.ones(len(sigma)), "c_f": sigma_next - sigma}, False

    def _check_last_steps(self, plan: Plan) -> None:
        """All have a limit: sigma ends at 1e-8."""

    def _init_step_index(self, timestep: Timestep) -> None:
        self._step_index = 0

    def step(
        self, model_output: Tensor, timestep: Any = None, sample: Any = None, generator: Generators = None,
        return_dict: bool = True,
    ) -> Result:  # fmt: skip
        """diffusers' step, which draws no noise."""
        f, x = model_output, sample
        row = self._enter(f, timestep, x)
        if self.config.scheduler_type not in ("unipc", "euler"):
            row = row.refused(f"scheduler_type {self.config.scheduler_type!r} has no step")
        if row.why is not None:
            return self._own(row, f, timestep, x, return_dict=return_dict)
        if self.config.scheduler_type == "euler":
            results = {"prev_sample": self._step(row, f, x, like_f=True, results=1)}
            self._step_index += 1
        else:
            left = len(self.timesteps) - row.step if self.config.lower_order_final else self.config.solver_order
            self.this_order = min(self.config.solver_order, left, self.lower_order_nums + 1)
            results = {"prev_sample": self.corrected_step(row, f, x), "model_outputs": None}
            results |= {"last_sample": self.last_sample, "this_order": self.this_order}
        return theirs.scheduling_helios.HeliosSchedulerOutput(**results) if return_dict else tuple(results.values())
