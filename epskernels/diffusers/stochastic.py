"""Noise at every step, a tau or a churn: SASolver, KarrasVe."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import schedulers as theirs
from diffusers.schedulers.deprecated import scheduling_karras_ve
from torch import Tensor

from .. import solvers
from ..ops import as_seeds, normal
from ..spec import STREAM_STEP
from ..typing import Array, SeedsLike
from .common import Ends, Formula, Generators, Levels, Options, Result, Timestep, as_float64
from .multistep import PredictorCorrector
from .plan import Plan
from .scheduler import Fused


def noise_between_200_and_800(t: Tensor) -> int:
    """diffusers' own tau by default, which can be pickled."""
    return 1 if 200 <= t <= 800 else 0


class SASolverScheduler(PredictorCorrector, theirs.scheduling_sasolver.SASolverScheduler):
    """SA-Solver (arXiv 2309.05019), x_0 or eps integrated. y has the step's noise too, of which the corrector keeps as much."""

    _reads = "tau_func", "predict_x0"
    tau_func: Callable[[Tensor], float]
    _channels: int | None = None

    def _read_config(self) -> None:
        config = self.config
        self._thresholds = config.thresholding and config.algorithm_type == "data_prediction"
        learned = config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon"
        self._channels = 3 if learned else None  # as diffusers has it
        if getattr(self.tau_func, "__module__", None) == theirs.scheduling_sasolver.__name__:
            self.tau_func = noise_between_200_and_800

    def _refuses(self) -> str | None:
        config = self.config
        if not (1 <= config.predictor_order <= 3 and 1 <= config.corrector_order <= 4):
            return f"orders {config.predictor_order} and {config.corrector_order} are not within 3 and 4"
        return (
            "dynamic thresholding of a solver that integrates eps"
            if config.thresholding and not self._thresholds
            else None
        )

    def _formula(self, options: Options) -> Formula:
        config, n, by_x0 = self.config, self._length(), self.predict_x0
        alpha, sigma, h = self._levels()
        i, steps = np.arange(n), len(self.timesteps)  # which may have been cut
        tau = np.array([float(self.tau_func(t)) for t in self.timesteps])[np.minimum(i, steps - 1)]
        if by_x0:
            A = sigma[1:] / sigma[:-1] * solvers.decay(tau**2 * h, 1.0)
            noise = solvers.sde_noise(sigma[1:], tau**2 * h, 1.0)
        else:
            A, noise = alpha[1:] / alpha[:-1], tau * solvers.sde_noise(sigma[1:], h, 1.0, by_x0=False)
        updates = solvers.stochastic_adams(h, (alpha if by_x0 else sigma)[1:], tau, by_x0, simplified=True)
        left = steps - i if config.lower_order_final else np.full(n, 4)
        most = np.minimum(config.predictor_order, left), np.minimum(config.corrector_order, left + 1)
        levels = range(max(config.predictor_order, config.corrector_order - 1) + 1)
        orders = [(np.minimum(most[0], before + 1), np.minimum(most[1], before + 2)) for before in levels]
        d_x, d_f = self._kept(config.algorithm_type == "noise_prediction")
        once = {"d_x": d_x, "d_f": d_f, "c_noise": noise}
        columns = {name: np.tile(column, len(levels)) for name, column in once.items()}
        return columns | self._corrected(A, *updates, orders, i > 0), True

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True, *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        f, x = model_output, sample
        row = self._enter(f, timestep, x)
        place, t = self._place(timestep), self._host()
        if row.why is None and (place is None or t[place : place + 1] != t[row.step : row.step + 1]):
            row = row.refused(f"timestep {timestep}, which tau is of, is not that of step {row.step}")
        if row.why is not None:
            return self._own(row, f, timestep, x, seeds, generator=generator, return_dict=return_dict)
        f = f if self._channels is None else f[:, : self._channels]
        noise = self._drawn(*self._noise(row, f, generator, seeds), x, row.step)
        x = self.corrected_step(row, f, x, noise)
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


class Call(NamedTuple):
    """What KarrasVe knows a call by: the sigma of the state, where the step ends, and whether the step is corrected."""

    sigma_hat: float | Tensor
    sigma_prev: float | Tensor
    corrects: bool = False


class KarrasVeScheduler(Fused, scheduling_karras_ve.KarrasVeScheduler):
    """A row for each step, then one for each correction. The model's output is -eps; m0 is eps, the slope, and y' x_0.

    `correction` is of step_correct's prev_sample, where a step ends.
    """

    _tensors = "timesteps", "schedule"
    _steps: dict[tuple[float, float], int] = {}

    def _length(self) -> int:
        return len(self.timesteps)

    def _levels(self) -> tuple[Array, Array, Array]:
        """sigma of each step, by how much of it churn raises it, and where the step ends."""
        t, levels, c = np.asarray(self.timesteps.cpu()), as_float64(self.schedule), self.config
        sigma, end = levels[t], np.where(t > 0, levels[t - 1], 0.0)
        churns = (c.s_min <= sigma) & (sigma <= c.s_max)
        return sigma, churns * min(c.s_churn / self.num_inference_steps, 2**0.5 - 1), end

    def _ends(self) -> tuple[Array, Array]:
        sigma, gamma, end = self._levels()
        return sigma + gamma * sigma, end

    def _read_config(self) -> None:
        super()._read_config()
        if self.schedule is not None:
            sigma, gamma, end = self._levels()
            self._steps = {}
            for kind in (np.float64, np.float32):  # of numbers, and of the schedule's tensors
                hat = sigma.astype(kind) + gamma.astype(kind) * sigma.astype(kind)
                self._steps |= {ends: i for i, ends in enumerate(zip(hat.tolist(), end.tolist(), strict=True))}

    def _model(self, options: Options) -> Levels:
        level = np.concatenate(self._ends())  # of the states that the calls are asked at
        return np.ones(len(level)), level, np.ones(len(level)), level

    def _ends_of(self, options: Options) -> Ends:
        i, end = np.arange(2 * self._length()), np.tile(self._ends()[1], 2)
        return Ends(np.ones(len(end)), end, i >= self._length(), i % self._length())

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        return values[: self._length()]

    def _per_call(self, values: np.ndarray) -> np.ndarray:
        return np.tile(values, 2)

    def _formula(self, options: Options) -> Formula:
        hat, end = self._ends()
        zero, one, half = np.zeros(len(hat)), np.ones(len(hat)), (end - hat) / 2
        rows = {
            "c_x": (one, zero), "c_m0": (end - hat, half), "c_y": (zero, one), "c_m1": (zero, half), "d_f": (-one, -one),
            "k_x": (one, one), "k_m0": (-hat, -end),
        }  # fmt: skip
        return {name: np.concatenate(both) for name, both in rows.items()}, False

    def _row(self, plan: Plan, timestep: Any) -> int | None:
        i = self._steps.get((float(timestep.sigma_hat), float(timestep.sigma_prev)))
        return i if i is None else i + timestep.corrects * self._seen.length

    def _call_theirs(self, method: str, f: Tensor, timestep: Any, x: Tensor, **arguments: Any) -> Result:
        state = {"sample_prev" if timestep.corrects else "sample_hat": x}
        return getattr(self._theirs, method)(self, f, *timestep[:2], **state, **arguments)

    def add_noise_to_input(
        self, sample: Tensor, sigma: float | Tensor, generator: Generators = None, *, seeds: SeedsLike | None = None
    ) -> Any:
        """diffusers' own; seeds: (B,), for noise made by the package's generator."""
        seeds = self._seeds if seeds is None and generator is None else seeds
        if seeds is None:
            return super().add_noise_to_input(sample, sigma, generator)
        (levels, _, _), (raised, _) = self._levels(), self._ends()
        if not len(step := np.flatnonzero(levels == float(sigma))):
            raise ValueError(f"sigma: expected one of scheduler.schedule, since seeds are given, got {sigma}")
        level, hat = levels[step].item(), raised[step].item()
        eps = normal(as_seeds(seeds, sample.device), list(sample.shape[1:]), draw=step.item(), stream=STREAM_STEP)
        return torch.add(sample, eps, alpha=self.config.s_noise * (hat**2 - level**2) ** 0.5), hat

    def step(
        self, model_output: Tensor, sigma_hat: float | Tensor, sigma_prev: float | Tensor, sample_hat: Tensor,
        return_dict: bool = True,
    ) -> Result:  # fmt: skip
        """diffusers' step, which draws no noise."""
        call: Any = Call(sigma_hat, sigma_prev)  # where others have a timestep
        row = self._enter(model_output, call, sample_hat)
        if row.why is not None:
            return self._own(row, model_output, call, sample_hat, return_dict=return_dict)
        x, derivative, x0 = self._step(row, model_output, sample_hat, results=3)
        return scheduling_karras_ve.KarrasVeOutput(x, derivative, x0) if return_dict else (x, derivative)

    def step_correct(
        self, model_output: Tensor, sigma_hat: float | Tensor, sigma_prev: float | Tensor, sample_hat: Tensor,
        sample_prev: Tensor, derivative: Tensor, return_dict: bool = True,
    ) -> Result:  # fmt: skip
        """diffusers' correction of what step made, which draws no noise."""
        f, x = model_output, sample_prev
        call: Any = Call(sigma_hat, sigma_prev, corrects=True)
        row = self._enter(f, call, x)
        if row.why is not None:
            return self._own(
                row, f, call, x, method="step_correct", sample_hat=sample_hat, derivative=derivative, return_dict=return_dict
            )  # fmt: skip
        x, _, x0 = self._step(row, f, x, m1=derivative, y=sample_hat, results=3)
        return scheduling_karras_ve.KarrasVeOutput(x, derivative, x0) if return_dict else (x, derivative)
