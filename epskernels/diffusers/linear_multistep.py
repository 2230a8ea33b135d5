"""With the last four outputs, by Adams and Bashforth's weights and their like: PNDM, LMS, IPNDM, DEIS.

The state over alpha has slope eps in r = sigma/alpha (`solvers.adams`). diffusers keeps the earlier outputs in a list; the newest
are m1 and m2, the one before y.
"""

from typing import Any

import numpy as np
from diffusers import schedulers as theirs
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array
from .common import (
    Columns,
    Ends,
    Formula,
    Levels,
    Options,
    Result,
    Timestep,
    as_float64,
    ends_of,
    eps_of,
    refuse_integers,
)
from .multistep import Multistep
from .plan import Plan
from .scheduler import Fused
from .sigmas import OnSigmas, warn_of_unscaled_input
from .timesteps import OnAlphas

_STEPS = np.arange(9.0)
# Adams and Bashforth's weights by order, (4,) the newest output's first: arXiv 2202.09778, eq. 12.
ADAMS_BASHFORTH = {k: solvers.adams(_STEPS, _STEPS, np.full(8, k))[:, -1] for k in (1, 2, 3, 4)}
_OF_OUTPUTS = ("c_m0", "c_m1", "c_m2", "c_y")


class _LinearMultistep(Fused):
    """The rows of a step at position i with L outputs before it: row L*N + i."""

    _history_of = "ets"  # the attribute that keeps them, the newest last
    _most_kept = 3

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        return min(len(getattr(self, self._history_of)), self._most_kept) * self._seen.length + super()._row(
            plan, timestep
        )

    def _earlier(self) -> dict[str, Any]:
        """m1, m2 and y by name: None where there are fewer outputs."""
        kept = [None, None, None, *getattr(self, self._history_of)]
        return {"m1": kept[-1], "m2": kept[-2], "y": kept[-3]}

    def _restart(self) -> None:
        super()._restart()
        setattr(self, self._history_of, [])


class LMSDiscreteScheduler(_LinearMultistep, OnSigmas, theirs.scheduling_lms_discrete.LMSDiscreteScheduler):
    """Keeps d = (x - x_0)/sigma, which is eps; m0 is x_0, as returned, and y' is d."""

    _output_class = theirs.scheduling_lms_discrete.LMSDiscreteSchedulerOutput
    _options = (4,)
    _history_of = "derivatives"
    derivatives: list[Tensor]

    def _formula(self, options: Options) -> Formula:
        (order,) = options
        sigma, ends = self._sigmas()
        d_x, d_f = self._output(sigma)
        r, i = np.append(sigma, ends[-1]), np.arange(len(sigma))
        weights = solvers.adams(r, r, np.minimum(i + 1, min(order, 4)))
        levels = [weights * (np.arange(4) <= kept)[:, None] for kept in range(4)]  # begun later, there are fewer
        now, *earlier = np.concatenate(levels, axis=1)
        at = np.tile(sigma, 4)
        columns = dict(zip(_OF_OUTPUTS[1:], earlier, strict=True))
        columns |= {"d_x": np.tile(d_x, 4), "d_f": np.tile(d_f, 4), "t": at, "c_x": 1 + now / at, "c_m0": -now / at}
        return columns | {"k_x": 1 / at, "k_m0": -1 / at}, False

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Result:
        """diffusers' step, which draws no noise; order: 1 to 4, how many outputs count."""
        refuse_integers(self, timestep)
        if not self.is_scale_input_called:
            warn_of_unscaled_input(self)
        row = self._enter(model_output, timestep, sample, (int(order),))
        if not 1 <= order <= 4:
            row = row.refused(f"order {order} is not one of 1 to 4")
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, order=order, return_dict=return_dict)
        x, m0, derivative = self._step(row, model_output, sample, **self._earlier(), results=3)
        self.derivatives = [*self.derivatives, derivative][-order:]
        return self._result(x, m0, return_dict)


class IPNDMScheduler(_LinearMultistep, theirs.scheduling_ipndm.IPNDMScheduler):
    """On alpha = cos, sigma = sin of the time; the model's output is the velocity, and eps is kept."""

    _tensors = "timesteps", "alphas", "betas"
    _needs_steps = True
    ets: list[Tensor]

    def _length(self) -> int:
        return len(self.betas) - 1

    def _levels(self) -> tuple[Array, ...]:
        """alpha and sigma of the calls and of the end, (N + 1,)."""
        return as_float64(self.alphas), as_float64(self.betas)

    def _model(self, options: Options) -> Levels:
        alpha, sigma = (level[:-1] for level in self._levels())
        return alpha, sigma, alpha, -sigma

    def _ends_of(self, options: Options) -> Ends:
        alpha, sigma = (level[1:] for level in self._levels())
        return ends_of(alpha, sigma)

    def _formula(self, options: Options) -> Formula:
        alphas, sigmas = self._levels()
        alpha, sigma = alphas[:-1], sigmas[:-1]
        kept = alphas[1:] / np.maximum(alpha, 1e-8)
        of_eps = sigmas[1:] - kept * sigma
        columns = {
            name: np.concatenate([w[j] * of_eps for w in ADAMS_BASHFORTH.values()])
            for j, name in enumerate(_OF_OUTPUTS)
        }
        return columns | {"d_x": np.tile(sigma, 4), "d_f": np.tile(alpha, 4), "c_x": np.tile(kept, 4)}, False

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        x, m0 = self._step(row, model_output, sample, **self._earlier())
        self.ets = [*self.ets[-3:], m0]  # diffusers keeps all, and reads four
        self._step_index += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


class DEISMultistepScheduler(Multistep, theirs.scheduling_deis_multistep.DEISMultistepScheduler):
    """Log-rho: polynomials in log(r) (arXiv 2204.13902). eps is kept, of x_0 as thresholded."""

    def _formula(self, options: Options) -> Formula:
        config, n = self.config, self._length()
        alpha, sigma, _ = self._levels()
        r, i, steps = sigma / alpha, np.arange(n), len(self.timesteps)
        few = config.lower_order_final and steps < 15
        weights = []
        for before in range(config.solver_order + 1):
            order = np.full(n, min(before + 1, config.solver_order, 3))
            order = np.where(few & (i == steps - 1), 1, np.where(few & (i == steps - 2), np.minimum(order, 2), order))
            weights.append(alpha[1:] * solvers.adams(r, np.log(r), order, np.log))
        levels = len(weights)
        columns = dict(zip(_OF_OUTPUTS[:3], np.concatenate(weights, axis=1), strict=False))
        c_x, at_alpha, at_sigma = (
            np.tile(values, levels) for values in (alpha[1:] / alpha[:-1], alpha[:-1], sigma[:-1])
        )
        kept = self._denoiser() if self._thresholds else self._kept(by_noise=True)
        columns |= {name: np.tile(column, levels) for name, column in zip(("d_x", "d_f"), kept, strict=True)}
        if self._thresholds:  # m0 is x_0, and y' is eps
            now = columns.pop("c_m0")
            columns |= {"c_m0": -now * at_alpha / at_sigma, "k_x": 1 / at_sigma, "k_m0": -at_alpha / at_sigma}
            c_x = c_x + now / at_sigma
        return columns | {"c_x": c_x}, False

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step, which draws no noise."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, return_dict=return_dict)
        m1, m2 = self._history(row)
        x, *_, eps = self._step(row, model_output, sample, m1=m1, m2=m2, results=3 if self._thresholds else 2)
        self._keep(eps)
        self._step_index += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


class PNDMScheduler(OnAlphas, theirs.scheduling_pndm.PNDMScheduler):
    """Six rows for each timestep, by what is kept; diffusers chooses among them by the number of calls, not by the timestep.

    PLMS (arXiv 2202.09778): the first call, the second (which repeats the first step), those with one, two and three outputs.
    PRK, four calls a step: the state that the step began with is m1 then, and what the calls add up to is y.
    """

    _tensors = "timesteps", "alphas_cumprod", "final_alpha_cumprod"
    _needs_steps = True
    ets: list[Tensor]
    counter: int
    cur_sample: Tensor | None
    cur_model_output: Any  # a tensor, or diffusers' 0

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        """A call has the lambda of the last step that begins at its timestep or above."""
        starts = np.asarray(self._timesteps)  # of the steps, ascending
        after = len(starts) - np.searchsorted(starts, self._t())
        return np.maximum(after - 1, 0), len(starts)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """lambda of each step of the schedule, the noisiest first: a tuple of numbers."""
        lambda_t = self._plan(self._options, self.timesteps.device).lambda_t
        return tuple(dict(zip(self._lambda_steps(len(lambda_t))[0].tolist(), lambda_t, strict=True)).values())

    def _ends_of(self, options: Options) -> Ends:
        """The first call of PLMS is done again by the second, and a step of PRK ends with its fourth."""
        t = self._t()
        i, n, below = np.arange(len(t)), len(t), t - self.config.num_train_timesteps // self.num_inference_steps
        abar = self._abar(np.concatenate([below, t, below, below, below, t]), self.final_alpha_cumprod)
        last = np.concatenate([i == n - 1, np.ones(4 * n, dtype=bool), i % 4 == 3])
        first = np.concatenate([i, np.maximum(i - 1, 0), i, i, i, i - i % 4])
        return Ends(np.sqrt(abar), np.sqrt(1 - abar), last, first)

    def _formula(self, options: Options) -> Formula:
        config, t = self.config, self._t()
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', got {config.prediction_type!r}")
        stride, n = config.num_train_timesteps // self.num_inference_steps, np.arange(len(t))

        def towards(begin: NDArray[np.integer], end: NDArray[np.integer]) -> tuple[Array, Array]:
            """The shares of the state and of the outputs' combination in the state at `end`."""
            abar, abar_next = self._abar(begin, np.nan), self._abar(end, self.final_alpha_cumprod)
            alpha, sigma, alpha_next = np.sqrt(abar), np.sqrt(1 - abar), np.sqrt(abar_next)
            e_x, e_f = eps_of(config.prediction_type, alpha, sigma)
            of_eps = np.sqrt(1 - abar_next) - alpha_next / alpha * sigma
            return alpha_next / alpha + of_eps * e_x, of_eps * e_f

        state, output = towards(t, t - stride)
        rows: list[Columns] = [{"c_x": state, "c_m0": output}]
        again, of_both = towards(t + stride, t)
        rows.append({"c_y": again, "c_m0": of_both / 2, "c_m1": of_both / 2})
        for order in (2, 3, 4):
            weights = ADAMS_BASHFORTH[order][:, None] * output
            rows.append({"c_x": state} | dict(zip(_OF_OUTPUTS, weights, strict=True)))
        phase, prk = n % 4, np.asarray(self.prk_timesteps if len(self.prk_timesteps) else t).astype(np.int64)
        given = prk[np.minimum(n, len(prk) - 1)]
        state, output = towards(prk[np.minimum(n - phase, len(prk) - 1)], np.where(n % 2, given, given - stride // 2))
        rows.append({
            "c_x": np.where(phase == 0, state, 0.0), "c_m1": np.where(phase == 0, 0.0, state),
            "c_m0": np.where(phase == 3, output / 6, output), "c_y": np.where(phase == 3, output, 0.0),
            "k_m0": np.choose(phase, (1 / 6, 1 / 3, 1 / 3, 0.0)), "k_y": np.isin(phase, (1, 2)) * 1.0,
        })  # fmt: skip
        names, zero = ("c_x", *_OF_OUTPUTS, "k_m0", "k_y"), np.zeros(len(t))
        columns = {name: np.concatenate([of.get(name, zero) for of in rows]) for name in names}
        return columns | {"d_f": 1.0, "t": np.tile(t, len(rows))}, False

    def _in_prk(self) -> bool:
        return self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        i = self._place(timestep)
        if i is None:
            return None
        n, host = self._seen.length, self._host()
        if self._in_prk():  # whose coefficients are of the step's first timestep too
            due = self.prk_timesteps[self.counter]
            return 5 * n + self.counter if self.counter < n and host[i] == host[self.counter] == due else None
        if self.counter < 2:
            return self.counter * n + i
        return min(len(self.ets) + 1, 4) * n + i

    def step_prk(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step of the first twelve calls, where skip_prk_steps is not set."""
        row = self._enter(model_output, timestep, sample)
        if row.why is not None or not self._in_prk():
            row = row if row.why is not None else row.refused("step_prk is called where step_plms is due")
            return self._own(row, model_output, timestep, sample, method="step_prk", return_dict=return_dict)
        phase, first = self.counter % 4, self.counter % 4 == 0
        m1, y = (None, None) if first else (self.cur_sample, self.cur_model_output)
        x, m0, summed = self._step(row, model_output, sample, m1=m1, y=y, results=3)
        if first:
            self.ets.append(m0)
            self.cur_sample = sample
        self.cur_model_output = 0 if phase == 3 else summed
        return self._stepped(x, return_dict)

    def step_plms(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> Result:
        """diffusers' step by the outputs of earlier calls. Raises ValueError where calls of step_prk are due before it."""
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError(f"step_plms: expected 12 calls of step_prk before it, got {self.counter}")
        row = self._enter(model_output, timestep, sample)
        if row.why is not None:
            return self._own(row, model_output, timestep, sample, method="step_plms", return_dict=return_dict)
        kept = [None, None, None, *self.ets]
        second, first = self.counter == 1, self.counter == 0
        y = self.cur_sample if second else kept[-3]
        x, m0 = self._step(row, model_output, sample, m1=kept[-1], m2=kept[-2], y=y)
        if not second:
            self.ets = [*self.ets[-3:], m0]
        if first or second:
            self.cur_sample = sample if first else None
        return self._stepped(x, return_dict)

    def _stepped(self, x: Tensor, return_dict: bool) -> Result:
        self.counter += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _restart(self) -> None:
        super()._restart()
        self.ets, self.counter, self.cur_sample, self.cur_model_output = [], 0, None, 0
