"""Flows, x = (1 - sigma)*x_0 + sigma*eps: their tables, made of those of x_0 + sigma*eps, and ComfyUI's ancestral steps.

A step that follows the slope (x - x_0)/sigma has the same weights in both states: `along_velocity`. One that counts in log SNR
is taken in x/alpha = x_0 + r*eps, r = sigma/(1 - sigma): `along_ratio`. Ancestral steps have forms of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import solvers
from ..samplers.common import Calls, noise_columns, points, several_calls
from ..scaling import ScalingLike, scale
from ..schedule import Grid
from ..table import VALUES, Table
from ..typing import Array

_LOOKED_THROUGH = 4  # ComfyUI's samplers are given a wrapper of a wrapper of the model
_OF_X0, _OF_EPS = (
    ("alpha_in", "alpha_out", "y_x0", "y_out_x0", "m_x0"),
    ("sigma_in", "sigma_out", "y_eps", "y_out_eps", "m_eps"),
)


class Flow(NamedTuple):
    """What a sampler is on a flow.

    form: "velocity" or "ratio", as the module says, or "own", by the table function `sampler`. calls: as Sampling's, of "own".
    refusal: what is said where there is no such form.
    """

    form: str = "velocity"
    sampler: Callable[..., Table] | None = None
    calls: Callable[[Array], Any] | None = None
    refusal: str = ""


BY_VELOCITY, BY_RATIO = Flow("velocity"), Flow("ratio")


def without_noise(eta: float) -> Flow:
    """A sampler that ComfyUI gives no ancestral form for flows."""
    refusal = f"eta: expected 0 for a flow, got {eta}; take euler_ancestral, dpmpp_2s_ancestral or an SDE sampler"
    return Flow(refusal=refusal if eta else "")


def ancestral(sampler: Callable[..., Table], eta: float, calls: Callable[[Array], Any] | None = None) -> Flow:
    """A sampler whose ancestral steps on flows are made by the table function `sampler`."""
    refusal = f"eta: expected a value in [0, 1] for a flow, got {eta}" if eta > 1 else ""
    return Flow("own", sampler, calls, refusal)


def is_flow(model_sampling: object) -> bool:
    """Whether ComfyUI's `model_sampling` is a flow's: one of its classes is named CONST."""
    return any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)


def sampling_of(model: Any) -> Any:
    """The model_sampling of ComfyUI's model, inside its wrappers; None for any other model."""
    for _ in range(_LOOKED_THROUGH):
        found = getattr(model, "model_sampling", None)
        if found is not None:
            return found
        model = getattr(model, "inner_model", None)
    return None


def flow_grid(levels: Array) -> Grid:
    """The grid of a flow's levels, (N + 1,)."""
    sigma = levels[:-1]
    return Grid(
        sigma, 1 - sigma, sigma, np.ones_like(sigma), float(sigma[0]), float(1 - levels[-1]), float(levels[-1]), False
    )


# ---- tables of x_0 + sigma*eps, for flows ----


def _values(table: Table) -> dict[str, Array]:
    return {key: table[key] for key in VALUES}


def _scaled(values: dict[str, Array], table: Table, lambda_t: Array) -> Table:
    """The table with lambda_t, (R,), in d_x and d_f; `values` are those of lambda 1, where the model's output is x_0."""
    alpha, zero = np.where(lambda_t == 1, 1.0, values["alpha_in"]), np.zeros_like(lambda_t)
    by_x, by_f = scale(zero, zero + 1, alpha, lambda_t)
    values |= {"d_x": values["d_x"] + values["d_f"] * by_x, "d_f": values["d_f"] * by_f, "lambda_t": lambda_t}
    return Table(values, name=table.name, initial_sigma=table.initial_sigma)


def along_velocity(table: Table, lambda_t: Array) -> Table:
    """The same weights on a flow's x, for a table of x_0 + sigma*eps with lambda 1. lambda_t: (R,)."""
    values = _values(table)
    for of_x0, of_eps in zip(_OF_X0, _OF_EPS, strict=True):  # (1, sigma) is (1 - sigma, sigma), and x_0 itself
        values[of_x0] = values[of_x0] - values[of_eps]
    # without noise, excess is by how much the weights of ipndm_v miss sigma: they miss alpha by the same
    values["alpha_out"] += values["sigma_out"] - np.sqrt(values["sigma_out"] ** 2 + values["excess"])
    return _scaled(values, table, lambda_t)


def along_ratio(table: Table, lambda_t: Array) -> Table:
    """A table of x_0 + r*eps with lambda 1, on a flow's x = (x_0 + r*eps)/(1 + r). lambda_t: (R,)."""
    values = _values(table)
    alpha, alpha_next = 1 / (1 + values["sigma_in"]), 1 / (1 + values["sigma_out"])
    for key in ("d_x", "c_x", "k_x"):
        values[key] = values[key] / alpha
    for key in ("c_x", "c_m0", "c_m1", "c_m2", "c_y", "c_noise"):
        values[key] = values[key] * alpha_next
    for key, by in (("alpha_in", alpha), ("sigma_in", alpha), ("alpha_out", alpha_next), ("sigma_out", alpha_next)):
        values[key] = values[key] * by
    values["excess"] = values["excess"] * alpha_next**2
    values["t"] = values["sigma_in"]
    return _scaled(values, table, lambda_t)


# ---- ComfyUI's ancestral steps of two calls ----


def _ancestral(
    name: str,
    grid: Grid,
    scaling: ScalingLike,
    prediction: str,
    eta: float,
    S_noise: float,
    middle: Callable[[Array, Array], Array],
    states: Callable[[Array, Array, Array], Sequence[Array]],
) -> Table:
    """Two calls down to sigma_down, the second at the level `middle`, then noise up; one call to 0. states: of solvers."""
    twice, once = np.flatnonzero(grid.sigma_next > 0), np.flatnonzero(grid.sigma_next == 0)
    sigma, end = grid.sigma[twice], grid.sigma_next[twice]
    down, kept, noise = solvers.flow_down(sigma, end, eta, eta > 0)
    at = middle(sigma, down)
    first, second = solvers.from_before(states(sigma, at, down))
    second = {key: kept * column for key, column in second.items()} | noise_columns(noise, S_noise)
    calls: list[Calls] = [(points(grid, twice), twice, first), (points(grid, once), once, {"c_m0": np.ones(len(once))})]
    if len(twice):
        calls.append((flow_grid(np.append(at, 0.0)), twice, second))
    return several_calls(name, grid, calls, scaling, prediction, None, 1.0)


def dpm_2_ancestral(
    grid: Grid, steps: int, *, scaling: ScalingLike, prediction: str, eta: float, S_noise: float
) -> Table:
    """dpm_2 down to a flow's sigma_down, then noise up."""
    return _ancestral(
        "dpm_2_ancestral", grid, scaling, prediction, eta, S_noise, lambda s, down: np.sqrt(s * down), solvers.probed
    )


def dpmpp_2s_ancestral(
    grid: Grid, steps: int, *, scaling: ScalingLike, prediction: str, eta: float, S_noise: float
) -> Table:
    """Euler to the middle in log SNR, and to a flow's sigma_down by the estimate from there, then noise up."""
    return _ancestral("dpmpp_2s_ancestral", grid, scaling, prediction, eta, S_noise, solvers.flow_middle, solvers.leapt)
