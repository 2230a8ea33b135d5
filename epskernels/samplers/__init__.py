"""Samplers as tables: (schedule, steps, scaling) -> Table. No tensor math; a new sampler is a new function here.

Each works out, in float64, the row of every model call: the step's ends (alpha, sigma) -> (alpha_next, sigma_next), the
denoised estimate m0 from the model's output with lambda_t folded in, and x' as a linear combination of x, m0 and friends, whose
weights are those of `solvers`.
"""

from collections.abc import Callable

from ..solvers import PREDICTIONS, model_output
from ..table import Table
from .adams import deis, gradient_estimation, ipndm, ipndm_v, lms, plms
from .common import denoiser
from .consistency import consistency, lcm, tcd
from .first_order import ddim, ddim_inverse, ddpm, dit, euler, euler_ancestral, flow_euler
from .multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, er_sde, res_multistep, sa_solver, unipc
from .singlestep import dpm_solver, dpmpp_2s, dpmpp_3s, seeds_2, seeds_3
from .two_calls import dpm_2, dpm_2_ancestral, dpmpp_sde, edm_euler, edm_heun, heun, pfgmpp

# Each sampler by its name, except for `dit`, which takes no schedule.
SAMPLERS: dict[str, Callable[..., Table]] = {
    sampler.__name__: sampler
    for sampler in (
        ddpm, ddim, ddim_inverse, edm_euler, edm_heun, euler, euler_ancestral, heun, dpm_2, dpm_2_ancestral, dpmpp_2s, dpmpp_sde,
        dpmpp_3s, dpm_solver, seeds_2, seeds_3, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, res_multistep, er_sde, unipc,
        sa_solver, plms, lms, ipndm, ipndm_v, deis, gradient_estimation, consistency, lcm, tcd, flow_euler, pfgmpp,
    )
}  # fmt: skip

__all__ = ["PREDICTIONS", "SAMPLERS", "denoiser", "dit", "model_output", *SAMPLERS]
