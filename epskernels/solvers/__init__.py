"""Each solver's step as weights, in float64: from x = alpha*x_0 + sigma*eps to x' = alpha_next*x_0 + sigma_next*eps.

    x' = c_x*x + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_noise*z          m: estimates of x_0 (or of eps), the newest first

Pure functions of arrays (N,): no schedule, no model, no lambda. `samplers` and the diffusers schedulers both call them, so that
a formula stands once. They do not judge their arguments: what is not finite in gives what is not finite out. r = sigma/alpha
throughout, the noise-to-signal ratio; h is a step's rise of log SNR = log(alpha/sigma).
"""

from .adams_unipc import (
    adams,
    bh_updates,
    bh_weights,
    corrected_later,
    delay_line,
    lagrange,
    of_order,
    predictor_corrector,
    published_adams,
    stochastic_adams,
    vp_time,
)
from .exponential import (
    decay,
    differences,
    earlier,
    er_noise_scale,
    er_sde,
    integrals,
    log_snr,
    multistep,
    quadrature,
    sde_noise,
    singlestep,
    stage,
    two_noises,
)
from .one_step import (
    PREDICTIONS,
    ancestral,
    basis,
    boundary,
    chain,
    churned,
    consistency_boundary,
    determinant,
    eps_of,
    first_order,
    flow_ancestral,
    flow_down,
    flow_middle,
    from_before,
    heun_correction,
    heunpp,
    leapt,
    model_output,
    posterior,
    preconditioned,
    probed,
    rest,
    trapezoid,
    trigonometric,
    x0_of,
)

__all__ = [
    "PREDICTIONS", "adams", "ancestral", "basis", "bh_updates", "bh_weights", "boundary", "chain", "churned",
    "consistency_boundary", "corrected_later", "decay", "delay_line", "determinant", "differences", "earlier", "eps_of",
    "er_noise_scale", "er_sde", "first_order", "flow_ancestral", "flow_down", "flow_middle", "from_before",
    "heun_correction", "heunpp", "integrals", "lagrange", "leapt", "log_snr", "model_output", "multistep", "of_order",
    "posterior", "preconditioned", "predictor_corrector", "probed", "published_adams", "quadrature", "rest", "sde_noise",
    "singlestep", "stage", "stochastic_adams", "trapezoid", "trigonometric", "two_noises", "vp_time", "x0_of",
]  # fmt: skip
