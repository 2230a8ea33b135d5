"""Consistency models: LCM, TCD."""

import diffusers
import numpy as np
from diffusers import schedulers as theirs

from .. import solvers
from .common import clip_of, widest
from .timesteps import OnAlphas


class _Consistency(OnAlphas):
    """Their second result is y'."""

    _needs_steps = True

    def _row(self, plan, timestep):
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index  # beyond where timesteps were cut, diffusers goes on by the timestep that it is given
        return i if i < self._seen.length else None

    def _consistency(self, options, f, timestep, x, generator, return_dict, seeds, **more):
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


class LCMScheduler(_Consistency, diffusers.LCMScheduler):
    _output_class = theirs.scheduling_lcm.LCMSchedulerOutput

    def _formula(self, options):
        t = self._t()
        last = np.arange(len(t)) == self.num_inference_steps - 1
        abar_prev = self._abar(np.append(t[1:], t[-1]))  # of itself, where the schedule ends before num_inference_steps
        c_skip, c_out = solvers.boundary(t * self.config.timestep_scaling)
        root = np.where(last, 1.0, np.sqrt(abar_prev))
        d_x, d_f = self._model(options)[2:]
        columns = {
            "d_x": d_x, "d_f": d_f, "clip": clip_of(self.config), "t": t, "c_x": root * c_skip, "c_m0": root * c_out,
            "c_noise": np.where(last, 0.0, np.sqrt(1 - abar_prev)), "k_x": c_skip, "k_m0": c_out,
        }  # fmt: skip
        return columns, ~last

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self._consistency((), model_output, timestep, sample, generator, return_dict, seeds)


class TCDScheduler(_Consistency, diffusers.TCDScheduler):
    _output_class = theirs.scheduling_tcd.TCDSchedulerOutput
    _options = (0.3,)

    def _read_config(self):
        self._thresholds = False  # diffusers' step does not look at it

    def _formula(self, options):
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

    def step(self, model_output, timestep, sample, eta=0.3, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
        return self._consistency((float(eta),), model_output, timestep, sample, generator, return_dict, seeds, eta=eta)
