"""What dpm_adaptive needs besides: a pair of solutions, the error between them, and the controller of its step size."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from .. import samplers, scaling
from ..corrections import Correction, CorrectionLike, as_correction, check_bands, folded
from ..ops import step
from ..spec import BAND_COLUMNS, COLUMNS
from ..trajectory import Trajectory
from .flows import Flow
from .sampling import (
    Denoiser,
    check_output,
    number,
    table_of,
)


def check_ends(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless sigma falls from sigma_max to a sigma_min above 0."""
    low, high = number("sigma_min", sigma_min, above_0=True), number("sigma_max", sigma_max, above_0=True)
    if not low < high:
        raise ValueError(f"sigma_min, sigma_max: expected sigma_min < sigma_max, got {sigma_min}, {sigma_max}")


def of_any_step(correction: CorrectionLike | None, x: Tensor) -> Correction | None:
    """The correction of steps that are not known. Raises ValueError for a list of weights, and for an x without its bands."""
    made = as_correction(correction)
    if made is None:
        return None
    if isinstance(made.low, list) or isinstance(made.high, list):
        raise ValueError(
            "correction: expected numbers, or weights by noise level, since the steps are not known, got a list of weights"
        )
    made.warn_of_transfer(None, "sample_dpm_adaptive", "dpm_adaptive")
    check_bands("x", x, 0 if made.kind == "dc" else made.dims)
    return made


class Pair:
    """One step from sigma to sigma_next by two methods of neighbouring orders, which share the calls of the lower one.

    noise: what follows the step, its standard deviation.
    """

    def __init__(
        self,
        order: int,
        sigma: Tensor,
        sigma_next: Tensor,
        least: float,
        lambda_t: scaling.EpsilonScaling,
        options: dict[str, float],
        x: Tensor,
        flow: Flow | None,
    ):
        levels = np.array([float(sigma), float(sigma_next)])
        alpha = np.ones(1) if flow is None else 1 - levels[:1]
        self.levels, self.alphas = levels, np.ones(2) if flow is None else 1 - levels
        alone = scaling.noise_alone(alpha, levels[:1], 1.0)
        lambdas = scaling.lambdas(lambda_t, alone, "eps_scaling", levels=scaling.log_snr(alpha, levels[:1]))
        # order two then has its second call where order three has it
        made = [
            table_of(
                samplers.dpm_solver, levels, lambda_t, lambdas, np.array([each]),
                {"order": each, "r": 1 / 3 if order == 3 else 1 / 2, "least": least} | options, flow,
            ).to(x.device)
            for each in (order - 1, order)
        ]  # fmt: skip
        self.order, self.table, self.noise = order, made[1], float(made[1]["c_noise"][order - 1])
        self.low, self.high = (table.rows.clone() for table in made)
        for rows in (self.low, self.high):
            rows[:, COLUMNS.index("c_noise")] = 0.0

    def run(self, model: Denoiser, x: Tensor, extra_args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the state by the lower order, by the higher, the estimate of x_0 at the step's start, that of its last call)."""
        trajectory, low, denoised, last = Trajectory(self.table, x, rows=self.high), x, x, x
        for row in range(self.order):
            at, index = trajectory.x, self.table.row_index[row]
            f = check_output(model(at, at.new_full((len(at),), self.table["t"][row]), **extra_args), at)
            if row == self.order - 2:
                low = step(at, f, self.low, index, m1=trajectory.m[0] if row else None)
            m0 = trajectory.step(index, f)
            if m0 is not None:
                denoised, last = m0 if row == 0 else denoised, m0
        return low, trajectory.x, denoised, last

    def after(self, correction: Correction | None, sigma_max: float) -> dict[str, float]:
        """The columns of the row that ends the step: its noise, and the correction by m0, the estimate of x_0."""
        sigma, (alpha, alpha_next) = self.levels[0], self.alphas
        columns = {"c_x": 1.0, "c_noise": self.noise, "d_f": 1.0, "clip": np.inf}
        if correction is None:
            return columns
        low, high = correction.weights(scaling.log_snr([alpha], [sigma]), np.array([sigma]), sigma_max)
        made = folded(columns | {"alpha_in": alpha, "sigma_in": sigma, "alpha_out": alpha_next}, correction, low, high)
        return {name: float(np.reshape(made[name], -1)[0]) for name in made if name in COLUMNS + BAND_COLUMNS}


class StepSize:
    """The length h of the next step in log sigma, by a PID controller of the error (k-diffusion's)."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, accept_safety: float):
        self.h, self.accept_safety = abs(number("h_init", h, above_0=True)), accept_safety
        self.powers = (p + i + d) / order, -(p + 2 * d) / order, d / order
        self.errors: list[float] = []  # inverse: of this step, and of the last two that were accepted

    def accepts(self, error: float) -> bool:
        """Whether a step with this error counts; h is then, and otherwise, that of the next try."""
        inverse = 1 / (error + 1e-8)
        self.errors = [inverse, *self.errors[1:]] if self.errors else [inverse] * 3
        factor = math.prod(each**power for each, power in zip(self.errors, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.errors = [self.errors[0], self.errors[0], self.errors[1]]
        self.h *= factor
        return accepted
