"""RePaint: the unknown part of a step in one launch, the known part and the mask after it."""

import dataclasses

import numpy as np
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import SeedsLike
from .common import Formula, Generators, Levels, Options, Result, Timestep
from .timesteps import DDIM


class RePaintScheduler(DDIM, theirs.scheduling_repaint.RePaintScheduler):
    """lambda is of each timestep, however often the schedule jumps back to it. undo_step is diffusers' own."""

    _uncorrected = "whose known part of the image is put in after the step"
    _options = ()
    _reads = ("eta",)

    def _model(self, options: Options) -> Levels:
        alpha, sigma = np.sqrt(self._level()), np.sqrt(1 - self._level())
        return alpha, sigma, 1 / alpha, -sigma / alpha

    def _formula(self, options: Options) -> Formula:
        """c_in, which is the caller's, has the known part's weight of the image."""
        t, abar, abar_next = self._t(), self._level(), self._abar_next(self._t())
        sigma, d_x, d_f = self._model(options)[1:]
        ratio, alpha_next, sigma_next = self._ratio(abar, abar_next), np.sqrt(abar_next), np.sqrt(1 - abar_next)
        _, _, variance = solvers.posterior(np.sqrt(ratio), 1 - ratio, sigma, alpha_next, sigma_next)
        std = self.eta * np.sqrt(variance)
        columns = {
            "d_x": d_x,
            "d_f": d_f,
            "clip": 1.0 if self.config.clip_sample else np.inf,
            "c_m0": alpha_next,
            "t": t,
        }
        columns |= {"c_f": np.sqrt(sigma_next**2 - std**2), "c_noise": np.where(t > 0, std, 0.0)}
        return columns | {"c_in": alpha_next}, True

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        levels, at = np.unique(-self._t(), return_inverse=True)
        return at, len(levels)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, original_image: Tensor, mask: Tensor,
        generator: Generators = None, return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        f, x = model_output, sample
        row = self._enter(f, timestep, x)
        if row.why is not None:
            return self._own(
                row, f, timestep, x, seeds, original_image=original_image, mask=mask, generator=generator,
                return_dict=return_dict,
            )  # fmt: skip
        drawing = dataclasses.replace(row, uses_noise=True)
        noise = self._drawn(*self._noise(drawing, f, generator, seeds), x, row.step)
        unknown, m0 = self._step(row, f, x, noise if row.uses_noise else None)
        alpha = self._plan((), x.device).columns["c_in"][row.step].item()
        known = alpha * original_image + max(0.0, 1 - alpha**2) ** 0.5 * noise
        x = mask * known + (1.0 - mask) * unknown
        return theirs.scheduling_repaint.RePaintSchedulerOutput(x, m0) if return_dict else (x, m0)
