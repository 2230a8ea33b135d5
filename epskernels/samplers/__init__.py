"""Samplers as tables: (schedule, steps, scaling) -> Table. No tensor math; a new sampler is a new function here.

Each works out, in float64, the row of every model call: the step's ends (alpha, sigma) -> (alpha_next, sigma_next), the denoised
estimate m0 from the model's output with lambda_t folded in, and x' as a linear combination of x, m0 and friends, whose weights
are `solvers.py`'s.
"""

from ..solvers import PREDICTIONS, model_output
from .common import denoiser
from .consistency import lcm, tcd
from .first_order import ddim, ddpm, dit, euler, euler_ancestral, flow_euler
from .multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, unipc
from .two_calls import dpmpp_2s, edm_euler, edm_heun, heun, pfgmpp

SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (
        ddpm, ddim, edm_euler, edm_heun, euler, euler_ancestral, heun, dpmpp_2s, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde,
        unipc, lcm, tcd, flow_euler, pfgmpp,
    )
}  # fmt: skip

__all__ = ["PREDICTIONS", "SAMPLERS", "denoiser", "dit", "model_output", *SAMPLERS]
