"""With the noise of a Brownian motion, which torchsde makes: CosineDPMSolverMultistep, DPMSolverSDE."""

from typing import Any

import numpy as np
import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import Columns, Draws, Generators, Result, Timestep, as_float64
from .multistep import PreconditionedDPMSolver
from .plan import Row
from .two_calls import TwoCalls


class CosineDPMSolverMultistepScheduler(
    PreconditionedDPMSolver, theirs.scheduling_cosine_dpmsolver_multistep.CosineDPMSolverMultistepScheduler
):
    """sde-dpmsolver++ of orders one and two; each generator's first seed is a motion's."""

    _algorithm = "sde-dpmsolver++"

    def _noise(
        self, row: Row, f: Tensor, generator: Generators, seeds: SeedsLike | None, given: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        if seeds is not None or (generator is None and self._seeds is not None):
            return super()._noise(row, f, generator, seeds)
        if not row.uses_noise:
            return None, None
        if getattr(self, "noise_sampler", None) is None:
            seed: int | list[int] | None = None
            if isinstance(generator, list):
                seed = [g.initial_seed() for g in generator]
            elif generator is not None:
                seed = generator.initial_seed()
            ends = {"sigma_min": self.config.sigma_min, "sigma_max": self.config.sigma_max}
            self.noise_sampler = BrownianTreeNoiseSampler(f, **ends, seed=seed)
        return self.noise_sampler(self.sigmas[row.step], self.sigmas[row.step + 1]).to(f.device), None

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel, of no motion."""
        return self.dpm_step(model_output, timestep, sample, generator, None, return_dict, seeds)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"noise_sampler": None}  # which cannot be copied; the generator's seed makes it anew

    def _restart(self) -> None:
        super()._restart()
        self.noise_sampler = None


class DPMSolverSDEScheduler(TwoCalls, theirs.scheduling_dpmsolver_sde.DPMSolverSDEScheduler):
    """Without seeds, the noise is a Brownian tree's, diffusers' own. With them, each call's is its own."""

    _output_class = theirs.scheduling_dpmsolver_sde.DPMSolverSDESchedulerOutput
    _options = (1.0,)
    noise_sampler: Any  # a BrownianTreeNoiseSampler, or None

    def _ends(self) -> tuple[Array, ...]:
        sigmas = as_float64(self.sigmas)
        return sigmas[::2], np.sqrt(sigmas[::2] * sigmas[1::2]), sigmas[1::2]

    def _two_rows(self, begin: Array, middle: Array, end: Array, s_noise: float) -> tuple[Columns, Columns]:
        rows = solvers.two_noises(begin, middle, end, 1.0, 0.5)
        kept = ("c_x", "c_y", "c_m0", "c_noise")
        first, second = ({k: v * s_noise if k == "c_noise" else v for k, v in row.items() if k in kept} for row in rows)
        return first, second

    def _draws(self) -> Draws:
        return self._interleaved(self._ends()[2] > 0, np.ones(len(self._ends()[2]), dtype=bool))

    def _tree_noise(self, i: int, x: Tensor) -> Tensor:
        """The tree's noise of call i, at the times that diffusers computes, in float32."""
        if self.noise_sampler is None:
            self.noise_sampler = BrownianTreeNoiseSampler(
                x, self.sigmas[self.sigmas > 0].min().item(), self.sigmas.max().item(), self.noise_sampler_seed
            )
        t, t_next = self.sigmas[i - i % 2 : i - i % 2 + 2].log().neg()
        t_next = t_next if i % 2 else t + (t_next - t) * 0.5
        return self.noise_sampler(t.neg().exp(), t_next.neg().exp())

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0, *,
        seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel, in place of the tree's."""
        options = (float(s_noise),)
        row = self._enter(model_output, timestep, sample, options)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, seeds, return_dict=return_dict, s_noise=s_noise)
        by_tree = row.draws and seeds is None and self._seeds is None
        given = self._tree_noise(row.step, sample) if by_tree else None
        noise, seeds = self._noise(row, sample, None, seeds, given)
        result = self._two_calls(row, model_output, sample, return_dict, noise, seeds)
        if row.step + 1 == self._seen.length:
            self.sample = None  # as diffusers ends
        rows = self._plan(options, sample.device).rows
        self.mid_point_sigma = None if self.sample is None else rows[row.step + 1].t
        return result

    def _restart(self) -> None:
        super()._restart()
        self.mid_point_sigma = self.noise_sampler = None
