"""With the noise of a Brownian motion, which torchsde makes: CosineDPMSolverMultistep."""

import diffusers
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from .multistep import PreconditionedDPMSolver


class CosineDPMSolverMultistepScheduler(PreconditionedDPMSolver, diffusers.CosineDPMSolverMultistepScheduler):
    """sde-dpmsolver++ of orders one and two; each generator's first seed is a motion's."""

    _algorithm = "sde-dpmsolver++"

    def _noise(self, row, f, generator, seeds, given=None, dtype=None):
        if seeds is not None or (generator is None and self._seeds is not None):
            return super()._noise(row, f, generator, seeds)
        if not row.uses_noise:
            return None, None
        if getattr(self, "noise_sampler", None) is None:
            seed = [g.initial_seed() for g in generator] if isinstance(generator, list) else None
            if seed is None and generator is not None:
                seed = generator.initial_seed()
            ends = {"sigma_min": self.config.sigma_min, "sigma_max": self.config.sigma_max}
            self.noise_sampler = BrownianTreeNoiseSampler(f, **ends, seed=seed)
        return self.noise_sampler(self.sigmas[row.step], self.sigmas[row.step + 1]).to(f.device), None

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel, of no motion."""
        return self.dpm_step(model_output, timestep, sample, generator, None, return_dict, seeds)

    def __getstate__(self):
        return self.__dict__ | {"noise_sampler": None}  # which cannot be copied; the generator's seed makes it anew

    def _restart(self):
        super()._restart()
        self.noise_sampler = None
