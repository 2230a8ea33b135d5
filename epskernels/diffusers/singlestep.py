"""Several calls a step, each from the step's first state: DPMSolverSinglestep."""

import numpy as np
from diffusers import schedulers as theirs
from torch import Tensor

from .. import solvers
from ..typing import SeedsLike
from .common import Ends, Formula, Generators, Options, Result, Timestep, ends_of, widest
from .multistep import DPMSolver
from .plan import Plan
from .scheduler import Fused


class DPMSolverSinglestepScheduler(DPMSolver, theirs.scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler):
    """The rows of order k at position i: (k - 1)*N + i; a step's first state is y in its later calls."""

    _tensors = "timesteps", "sigmas"
    sample: Tensor | None  # where the step began

    def _refuses(self) -> str | None:
        config = self.config
        if (config.algorithm_type, config.solver_type, config.solver_order) == ("sde-dpmsolver++", "heun", 3):
            return "diffusers' third order of sde-dpmsolver++ with heun"
        return super()._refuses()

    def _formula(self, options: Options) -> Formula:
        config, n = self.config, self._length()
        alpha, sigma, h = self._levels()
        by_noise, sde = config.algorithm_type == "dpmsolver", config.algorithm_type == "sde-dpmsolver++"
        of_level = np.append(0.0, np.cumsum(h))
        rows = []
        for order in range(1, config.solver_order + 1):
            first, end = np.arange(n) - (order - 1), np.arange(1, n + 1)
            step = of_level[end] - of_level[first]
            gaps = [of_level[end - 1 - age] - of_level[first] for age in range(order - 1)]
            z = step if by_noise else -(1.0 + sde) * step
            weights = solvers.stage(
                solvers.integrals((sigma if by_noise else alpha)[end], z), step, gaps, config.solver_type
            )
            kept = (
                alpha[end] / alpha[first] if by_noise else sigma[end] / sigma[first] * solvers.decay(step, float(sde))
            )
            noise = solvers.sde_noise(sigma[end], step, 1.0) if sde else np.zeros(n)
            of_x, of_y = (kept, np.zeros(n)) if order == 1 else (np.zeros(n), kept)
            rows.append(np.array([of_x, of_y, *weights, noise]))
        names, levels = ("c_x", "c_y", "c_m0", "c_m1", "c_m2", "c_noise"), len(rows)
        columns = dict(zip(names, np.concatenate(rows, axis=1), strict=True))
        of_x0 = zip(("d_x", "d_f"), self._kept(by_noise), strict=True)
        return columns | {name: np.tile(column, levels) for name, column in of_x0}, sde

    def _ends_of(self, options: Options) -> Ends:
        alpha, sigma, *_ = super()._ends_of(options)
        first = np.resize(self.order_list, self._length()) == 1  # longer where timesteps were cut
        return ends_of(alpha, sigma, np.append(first[1:], True))

    def _order(self, i: int) -> int:
        """diffusers' order of the step at position i: as many outputs as are kept, this one's included."""
        order, kept = self.order_list[i], [*self.model_outputs[1:], True]
        while kept[-order] is None:
            order -= 1
        return order

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        i: int = Fused._row(self, plan, timestep)
        return (self._order(i) - 1) * self._seen.length + i

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f, x = model_output, sample
        row = self._enter(f, timestep, x)
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict)
        if self._leading is not None:
            f = f[:, : self._leading]
        first = self._order(row.step) == 1
        noise, seeds = self._noise(
            row, f, generator, seeds, dtype=f.dtype if self._keeps_output else widest(f, x).dtype
        )
        m1, m2 = self._history(row)
        next_x, m0 = self._step(row, f, x, noise, seeds, m1, m2, None if first else self.sample)
        if first:
            self.sample = x
        self.model_outputs = [*self.model_outputs[1:], m0]
        self._step_index += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=next_x) if return_dict else (next_x,)

    def _restart(self) -> None:
        Fused._restart(self)
        self.model_outputs, self.sample = [None] * self.config.solver_order, None
