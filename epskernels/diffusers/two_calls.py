"""Two model calls a step, x = x_0 + sigma*eps: KDPM2, KDPM2Ancestral."""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from torch import Tensor

from .. import solvers
from ..typing import Array, SeedsLike
from .common import Columns, Draws, Ends, Formula, Generators, Options, Result, Timestep, as_float64, ends_of, widest
from .plan import Row
from .scheduler import InHalves
from .sigmas import OnSigmas


class TwoCalls(InHalves, OnSigmas):
    """Two rows a step, one for the last. The second goes on from the state that the first was given, `sample`."""

    def _ends(self) -> tuple[Array, ...]:
        """Of each step, (N,): sigma where it begins, sigma of its second call, and what else `_two_rows` takes."""
        raise NotImplementedError

    def _two_rows(self, begin: Array, middle: Array, *more: Any) -> tuple[Columns, Columns]:
        """The columns of the first calls and of the second ones."""
        raise NotImplementedError

    def _ends_of(self, options: Options) -> Ends:
        _, middle, end, *more = self._ends()  # more: the noise that comes to it
        end = np.sqrt(sum((std**2 for std in more), end**2))
        return ends_of(np.ones(self._length()), self._interleaved(middle, end), self._ends_steps())

    def _formula(self, options: Options) -> Formula:
        if self.config.prediction_type == "sample":
            raise NotImplementedError(f"prediction_type: 'sample' is not one of {type(self).__name__}'s")
        first, second = self._two_rows(*self._ends(), *options)
        none = np.zeros(len(self._ends()[0]))
        columns = {name: self._interleaved(first.get(name, none), second.get(name, none)) for name in {*first, *second}}
        level = self._sigmas()[0]
        d_x, d_f = self._output(level)
        return columns | {"d_x": d_x, "d_f": d_f, "t": level}, self._draws()

    def _draws(self) -> Draws:
        return False

    def _interleaved(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.stack([first, second], axis=1).reshape(-1)[:-1]

    def _length(self) -> int:
        return 2 * len(self._ends()[0]) - 1

    def _sigmas(self) -> tuple[Array, None]:
        return self._interleaved(*self._ends()[:2]), None

    def _input_scale(self) -> list[float] | None:
        return (1 / np.sqrt(np.append(self._sigmas()[0], 0.0) ** 2 + 1)).tolist()

    def _two_calls(
        self, row: Row, f: Tensor, x: Tensor, return_dict: bool, noise: Tensor | None = None, seeds: Tensor | None = None,
    ) -> Result:  # fmt: skip
        x, first = widest(f, x), self.state_in_first_order
        if first and row.step % 2:
            raise ValueError(f"step: expected the first half of a step first, got its second, at sigma {row.t:g}")
        next_x, m0 = self._step(row, f, x, noise, seeds, y=None if first else self.sample)
        self.sample = x if first else None
        return self._result(next_x, m0, return_dict)

    def _restart(self) -> None:
        super()._restart()
        self.sample = None


def by_slope_between(begin: Array, middle: Array, end: Array) -> tuple[Columns, Columns]:
    """The rows of Euler to the middle, then of the whole step by the slope there (k-diffusion's dpm_2)."""
    first = dict(zip(("c_x", "c_m0"), solvers.first_order(1.0, begin, 1.0, middle), strict=True))
    c_x, c_m0 = solvers.first_order(1.0, middle, 1.0, middle + end - begin)
    return first, {"c_y": np.ones(len(begin)), "c_x": c_x - 1, "c_m0": c_m0}


class KDPM2DiscreteScheduler(TwoCalls, theirs.scheduling_k_dpm_2_discrete.KDPM2DiscreteScheduler):
    """Euler's step by the slope at its middle (k-diffusion's dpm_2; arXiv 2206.00364, alg. 2, at another point)."""

    _output_class = theirs.scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput
    _tensors = "timesteps", "sigmas", "sigmas_interpol"

    def _ends(self) -> tuple[Array, ...]:
        sigmas, between = as_float64(self.sigmas), as_float64(self.sigmas_interpol)
        return sigmas[:-2:2], between[1:-1:2], sigmas[1:-1:2]

    def _two_rows(self, begin: Array, middle: Array, end: Array) -> tuple[Columns, Columns]:
        return by_slope_between(begin, middle, end)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise. Raises ValueError for a second half of a step whose first half did not run."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        return self._two_calls(row, model_output, sample, return_dict)


class KDPM2AncestralDiscreteScheduler(
    TwoCalls, theirs.scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler
):
    """As KDPM2Discrete to sigma_down, then new noise (k-diffusion's dpm_2_ancestral)."""

    _output_class = theirs.scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput
    _tensors = "timesteps", "sigmas", "sigmas_interpol", "sigmas_down", "sigmas_up"

    def _ends(self) -> tuple[Array, ...]:
        return tuple(as_float64(getattr(self, name))[:-2:2] for name in self._tensors[1:])

    def _two_rows(self, begin: Array, middle: Array, down: Array, up: Array) -> tuple[Columns, Columns]:
        first, second = by_slope_between(begin, middle, down)
        return first, second | {"c_noise": up}

    def _draws(self) -> Draws:
        return np.arange(self._length()) % 2 == 1

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True,
        *, seeds: SeedsLike | None = None,
    ) -> Result:  # fmt: skip
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        noise, seeds = self._noise(row, model_output, generator, seeds)
        return self._two_calls(row, model_output, sample, return_dict, noise, seeds)
