"""With the estimates of earlier calls: DPMSolver, EDMDPMSolver, UniPC."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import (
    Columns,
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
    eps_of,
    x0_of,
)
from .plan import Plan, Row
from .scheduler import FromCleanest, Fused
from .sigmas import OnSigmas, Preconditioned


class Multistep(Fused):
    """The rows of a step at position i with L calls before it, at most solver_order: row L*N + i."""

    _needs_steps = True
    model_outputs: list[Tensor | None]
    lower_order_nums: int

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        i = super()._row(plan, timestep)
        number, most = self.lower_order_nums * self._seen.length + i, len(plan.rows)
        return (
            number if number < most else most - self._seen.length + i
        )  # of more calls than the order, which was lowered

    def _levels(self) -> tuple[Array, ...]:
        """The alphas and sigmas of the schedule, (N + 1,), and the steps' lengths in log SNR, (N,), in float64."""
        sigmas = as_float64(self.sigmas)
        alpha, sigma = self._alpha_sigma(sigmas)
        return alpha, sigma, np.diff(solvers.log_snr(alpha, sigma))

    def _alpha_sigma(self, sigmas: Array) -> tuple[Array, Array]:
        if self.config.use_flow_sigmas:
            return 1 - sigmas, sigmas
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        return alpha, sigmas * alpha

    def _denoiser(self) -> tuple[Array, Array]:
        alpha, sigma = (level[:-1] for level in self._alpha_sigma(as_float64(self.sigmas)))
        if self.config.prediction_type == "flow_prediction":
            sigma = as_float64(self.sigmas)[:-1]
        return x0_of(self.config.prediction_type, alpha, sigma)

    def _model(self, options: Options) -> Levels:
        alpha, sigma = self._alpha_sigma(as_float64(self.sigmas)[:-1])
        return alpha, sigma, *self._denoiser()

    def _ends_of(self, options: Options) -> Ends:
        sigmas = as_float64(self.sigmas)[1:]
        alpha, sigma = self._alpha_sigma(sigmas)
        return ends_of(alpha, np.where(sigmas == 0, 0.0, sigma))

    def _kept(self, by_noise: bool) -> tuple[Array, Array]:
        """(d_x, d_f) of what the history keeps: x_0, or eps where that is integrated."""
        if not by_noise:
            return self._denoiser()
        alpha, sigma = (level[:-1] for level in self._alpha_sigma(as_float64(self.sigmas)))
        return eps_of(self.config.prediction_type, alpha, sigma)

    def _keep(self, m0: Tensor) -> None:
        """m0 into the history that diffusers keeps too."""
        self.model_outputs = [*self.model_outputs[1:], m0]
        self.lower_order_nums = min(self.lower_order_nums + 1, len(self.model_outputs))

    def _history(self, row: Row) -> tuple[Tensor | None, Tensor | None]:
        """(m1, m2), as many as the row reads."""
        return self.model_outputs[-1] if row.history else None, self.model_outputs[-2] if row.history > 1 else None

    def _restart(self) -> None:
        super()._restart()
        self.model_outputs, self.lower_order_nums = [None] * len(self.model_outputs), 0


class DPMSolver(Multistep):
    """DPM-Solver (arXiv 2206.00927), DPM-Solver++ (arXiv 2211.01095) and their SDEs, by the last one to three outputs."""

    @property
    def _algorithm(self) -> str:
        return self.config.algorithm_type

    def _formula(self, options: Options) -> Formula:
        config, algorithm, n = self.config, self._algorithm, self._length()
        alpha, sigma, h = self._levels()
        by_noise = algorithm in ("dpmsolver", "sde-dpmsolver")  # the model's eps is integrated, not its x_0
        sde = algorithm.startswith("sde")
        if by_noise:
            a, b, c = solvers.integrals(sigma[1:], h)
            c_x = alpha[1:] / alpha[:-1]
            if sde:
                a, b, c = 2 * a, 2 * b, np.full(n, np.nan)  # diffusers has no third order
        else:
            a, b, c = solvers.integrals(alpha[1:], -2 * h if sde else -h)
            c_x = sigma[1:] / sigma[:-1] * solvers.decay(h, float(sde))
            if sde:
                c = c - alpha[1:] if self._third_order_sde else np.full(n, np.nan)  # diffusers' sign of its 1/2
        updates = solvers.multistep(h, (a, b, c), config.solver_type)
        weights = [solvers.of_order(order, updates) for order in self._orders(n)]
        columns = dict(zip(("c_m0", "c_m1", "c_m2"), np.concatenate(weights, axis=1), strict=True))
        levels = len(weights)
        columns |= {
            name: np.tile(column, levels) for name, column in zip(("d_x", "d_f"), self._kept(by_noise), strict=True)
        }
        noise = solvers.sde_noise(sigma[1:], h, 1.0, not by_noise) if sde else np.zeros(n)
        columns["c_x"], columns["c_noise"] = np.tile(c_x, levels), np.tile(noise, levels)
        return columns, sde

    _third_order_sde = True

    def _orders(self, n: int) -> Iterator[NDArray[np.integer]]:
        """diffusers' order of each step, for each number of calls before it."""
        config, i, steps = self.config, np.arange(n), len(self.timesteps)  # which may have been cut
        few = config.lower_order_final and steps < 15
        ends_by_euler = getattr(config, "euler_at_final", False) or getattr(config, "final_sigmas_type", None) == "zero"
        last = (i == steps - 1) & bool(few or ends_by_euler)
        last_but_one = (i == steps - 2) & bool(few)
        for before in range(config.solver_order + 1):
            order = min(config.solver_order, before + 1)
            yield np.where(last, 1, np.where(last_but_one, min(order, 2), order))

    _leading: int | None = None
    _keeps_output = False

    def _refuses(self) -> str | None:
        if getattr(self.config, "thresholding", False) and not self._thresholds:
            return "dynamic thresholding of a solver that integrates eps"
        return None

    def _read_config(self) -> None:
        config, by_x0 = self.config, self._algorithm.endswith("++")
        learned = getattr(config, "variance_type", None) in ("learned", "learned_range")
        self._leading = 3 if learned and config.prediction_type == "epsilon" else None  # channels, as diffusers has it
        self._thresholds = getattr(config, "thresholding", False) and by_x0
        self._keeps_output = config.prediction_type == (
            "sample" if by_x0 else "epsilon"
        )  # its dtype is then the state's

    def dpm_step(
        self, f: Tensor, timestep: Timestep, x: Tensor, generator: Generators, noise_dtype: torch.dtype | None,
        return_dict: bool, seeds: SeedsLike | None, **more: Any,
    ) -> Result:  # fmt: skip
        """`step` of the classes here. noise_dtype: in which diffusers draws, None for f's; more: what else its own step takes."""
        row = self._enter(f, timestep, x)
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict, **more)
        if self._leading is not None:
            f = f[:, : self._leading]
        noise, seeds = self._noise(row, f, generator, seeds, more.get("variance_noise"), noise_dtype)
        x, m0 = self._step(row, f, x, noise, seeds, *self._history(row), like_f=self._keeps_output)
        self._keep(m0)
        self._step_index += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


class DPMSolverMultistepScheduler(DPMSolver, theirs.scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler):
    """DPMSolver on alphas_cumprod or a flow."""

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self.dpm_step(
            model_output, timestep, sample, generator, torch.float32, return_dict, seeds, variance_noise=variance_noise
        )


class DPMSolverMultistepInverseScheduler(
    FromCleanest, DPMSolver, theirs.scheduling_dpmsolver_multistep_inverse.DPMSolverMultistepInverseScheduler
):
    """From an image towards noise: steps are negative in log SNR. diffusers does not widen states to float32 here."""

    _third_order_sde = False  # diffusers has none here

    def _read_config(self) -> None:
        super()._read_config()
        self._keeps_output = False

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        more = {"variance_noise": variance_noise}
        return self.dpm_step(model_output, timestep, sample, generator, None, return_dict, seeds, **more)


class PreconditionedDPMSolver(Preconditioned, DPMSolver):
    """On EDM's denoiser, x = x_0 + sigma*eps."""

    _third_order_sde = False  # diffusers has none here

    def _sigmas(self) -> tuple[Array, Array]:
        return (sigmas := as_float64(self.sigmas))[:-1], sigmas[1:]

    _input_scale = OnSigmas._input_scale

    def _alpha_sigma(self, sigmas: Array) -> tuple[Array, Array]:
        return np.ones_like(sigmas), sigmas

    def _denoiser(self) -> tuple[Array, Array]:
        return self._output(self._sigmas()[0])

    scale_model_input = OnSigmas.scale_model_input


class EDMDPMSolverMultistepScheduler(
    PreconditionedDPMSolver, theirs.scheduling_edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler
):
    """DPM-Solver++ and its SDE on EDM's denoiser."""

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self.dpm_step(model_output, timestep, sample, generator, None, return_dict, seeds)


class PredictorCorrector(Multistep):
    """x is what the predictor made; y carries the part of the corrected state that was known before the model's call."""

    _mixes = False
    last_sample: Tensor | None

    def _most_steps(self) -> int:
        """By lower_order_final the order of a step is at most the number of timesteps that are left: none where they were cut."""
        return min(self._length(), len(self.timesteps)) if self.config.lower_order_final else self._length()

    def _corrected(
        self, A: Array, predictors: dict[int, Array], correctors: dict[int, tuple[Array, Array]],
        orders: list[tuple[NDArray[Any], NDArray[Any]]], corrects: NDArray[np.bool_],
    ) -> Columns:  # fmt: skip
        """The columns of each step, for each number of calls before it.

        orders: by that number, those of the predictor and of the corrector that the next call completes, (N,) each. A,
        predictors, correctors, corrects: as `solvers` has them.
        """
        completed = {order: weights for order, (weights, _) in correctors.items()}
        of_next = {order: np.roll(weight, 1) for order, (_, weight) in correctors.items()}
        corrects_next, levels = np.append(corrects[1:], False), []
        for before, (order, order_of_corrector) in enumerate(orders):
            P = solvers.of_order(order, predictors)
            Q = np.where(corrects_next, solvers.of_order(order_of_corrector, completed), 0.0)  # nobody reads the others
            of_before = solvers.of_order(np.roll(orders[max(before - 1, 0)][1], 1), of_next)
            levels.append(solvers.predictor_corrector(A, P, Q, of_before, corrects & (before > 0), corrects_next))
        return {name: np.concatenate([level[name] for level in levels]) for name in levels[0]}

    def corrected_step(self, row: Row, f: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x', once the row is known. noise: as a tensor, since the state that the next call corrects has it too."""
        m1, m2 = self._history(row)
        y = self.last_sample if self.lower_order_nums else None
        next_x, m0, y = self._step(row, f, x, noise, m1=m1, m2=m2, y=y, results=3)
        self.last_sample = y if noise is None else torch.add(y, noise, alpha=row.c_noise)
        self._keep(m0)
        self._step_index += 1
        return as_dtype_of(next_x, x)

    def _restart(self) -> None:
        super()._restart()
        self.last_sample = None


class UniPC(PredictorCorrector):
    """UniPC's rows (arXiv 2302.04867), of whichever class of diffusers."""

    _reads = "predict_x0", "disable_corrector", "solver_p"
    predict_x0: bool
    disable_corrector: list[int]
    solver_p: Any  # a scheduler, or None

    def _read_config(self) -> None:
        self._thresholds = self.config.thresholding and self.predict_x0

    def _formula(self, options: Options) -> Formula:
        config, n = self.config, self._length()
        alpha, sigma, h = self._levels()
        ends = (alpha, sigma) if self.predict_x0 else (sigma, alpha)  # of what is predicted, and of the other
        A, first = solvers.first_order(ends[0][:-1], ends[1][:-1], ends[0][1:], ends[1][1:])
        predictors, correctors = solvers.bh_updates(
            h, first, ends[0][1:], config.solver_order, config.solver_type, self.predict_x0
        )
        i = np.arange(n)
        left = len(self.timesteps) - i  # fewer where timesteps were cut: diffusers has no order 0
        most = np.minimum(config.solver_order, left) if config.lower_order_final else np.full(n, config.solver_order)
        corrects, levels = ~np.isin(i - 1, list(self.disable_corrector)) & (i > 0), config.solver_order + 1
        orders = [(order, order) for order in (np.minimum(most, before + 1) for before in range(levels))]
        columns = self._corrected(A, predictors, correctors, orders, corrects)
        columns |= {
            name: np.tile(c, levels) for name, c in zip(("d_x", "d_f"), self._kept(not self.predict_x0), strict=True)
        }
        return columns, False

    def _check_last_steps(self, plan: Plan) -> None:
        n = self._length()
        row = min(n - 1, self.config.solver_order) * n + n - 1
        if plan.rows[row].why is not None and self.solver_p is None:
            raise ValueError(
                f"set_timesteps: expected a last step that has a limit, and one to sigma {float(self.sigmas[-1]):g} with "
                f"lower_order_final={self.config.lower_order_final} of solver_order {self.config.solver_order} has none: set "
                "lower_order_final=True"
            )

    def _refuses(self) -> str | None:
        if self.solver_p is not None:
            return "solver_p is another scheduler's step"
        return None


class UniPCMultistepScheduler(UniPC, theirs.scheduling_unipc_multistep.UniPCMultistepScheduler):
    """UniPC (arXiv 2302.04867): bh1 and bh2, orders one to three."""

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x = self.corrected_step(row, model_output, sample)
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)
