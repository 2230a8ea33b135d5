"""CogVideoX's schedulers, on alphas_cumprod: neither looks at clipping, and DDIM at no noise either."""

import numpy as np
from diffusers import schedulers as theirs
from torch import Tensor

from .. import solvers
from ..typing import SeedsLike
from .common import Formula, Generators, Options, Result, Timestep
from .timesteps import DDIM


class CogVideoXDDIMScheduler(DDIM, theirs.scheduling_ddim_cogvideox.CogVideoXDDIMScheduler):
    """DDIM (arXiv 2010.02502, eq. 12) without noise, whatever eta."""

    _output_class = theirs.scheduling_ddim_cogvideox.DDIMSchedulerOutput

    def _formula(self, options: Options) -> Formula:
        t = self._t()
        abar_next = self._abar_next(t)
        alpha, sigma, d_x, d_f = self._model(options)
        c_x, c_m0 = solvers.first_order(alpha, sigma, np.sqrt(abar_next), np.sqrt(1 - abar_next))
        return {"d_x": d_x, "d_f": d_f, "c_x": c_x, "c_m0": c_m0, "t": t}, False

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Result:
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample, self._options)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x, m0 = self._step(row, model_output, sample)
        return self._output_class(prev_sample=x, pred_original_sample=m0) if return_dict else (x, m0)


class CogVideoXDPMScheduler(DDIM, theirs.scheduling_dpm_cogvideox.CogVideoXDPMScheduler):
    """DPM-Solver++ as an SDE: of order two where the last call's x_0 is given. diffusers draws twice there, for one noise."""

    _output_class = theirs.scheduling_dpm_cogvideox.DDIMSchedulerOutput

    def _formula(self, options: Options) -> Formula:
        t = self._t()
        abar_next = self._abar_next(t)
        alpha, sigma, d_x, d_f = self._model(options)
        alpha_next, sigma_next = np.sqrt(abar_next), np.sqrt(1 - abar_next)
        at = solvers.log_snr(alpha, sigma)
        h, h1 = (
            solvers.log_snr(alpha_next, sigma_next) - at,
            np.diff(at, prepend=np.nan),
        )  # timesteps may be unevenly apart
        a = solvers.integrals(alpha_next, -2 * h)[0]
        first = np.array([a, np.zeros(len(t))])
        second = first + 0.5 * a * solvers.differences(h, h1, h1)[0][:2]
        columns = dict(zip(("c_m0", "c_m1"), np.concatenate([first, second], axis=1), strict=True))
        c_x, c_noise = sigma_next / sigma * solvers.decay(h, 1.0), solvers.sde_noise(sigma_next, h, 1.0)
        once = {"d_x": d_x, "d_f": d_f, "c_x": c_x, "c_noise": c_noise, "t": t}
        return columns | {name: np.tile(column, 2) for name, column in once.items()}, True

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Timestep,
        timestep_back: Timestep | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
        *,
        seeds: SeedsLike | None = None,
    ) -> Result:
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f, x, m1, second = model_output, sample, old_pred_original_sample, False
        row = self._enter(f, timestep, x, self._options)
        if row.why is None and m1 is not None and row.t >= self._apart():
            second = True
            if timestep_back is None or self._place(timestep_back) != row.step - 1:
                row = row.refused(f"timestep_back {timestep_back} is not the one before in the schedule")
            else:
                row = self._plan(self._options, x.device).rows[len(self._host()) + row.step]
        if row.why is not None:
            return self._own(
                row, f, timestep, x, seeds, old_pred_original_sample=m1, timestep_back=timestep_back, generator=generator,
                return_dict=return_dict,
            )  # fmt: skip
        noise, of_seeds = self._noise(row, x, generator, seeds)
        if second and noise is not None:
            noise, of_seeds = self._noise(row, x, generator, seeds)
        x, m0 = self._step(row, f, x, noise, of_seeds, m1=m1 if second else None)
        return self._output_class(prev_sample=x, pred_original_sample=m0) if return_dict and second else (x, m0)
