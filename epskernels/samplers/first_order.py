"""One model call in a step, no history: ddpm, dit, ddim, ddim_inverse, euler, euler_ancestral, flow_euler."""

from typing import Any

import numpy as np

from .. import solvers
from ..schedule import DiscreteSchedule, FlowSchedule, Grid, linear
from ..table import VALUES, Table
from ..typing import Steps
from .common import (
    EVERY,
    ON_A_PATH,
    Correction,
    Scaling,
    Schedule,
    call,
    grid_of,
    lambdas_of,
    make_table,
    noise_columns,
    number,
    one_call,
    sampler,
)

_TRAINED = (DiscreteSchedule, FlowSchedule)


@sampler(EVERY)
def ddpm(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = 1.0,
    guidance: float = 1.0,
    **grid_options: Any,
) -> Table:
    """Ancestral sampling (DDPM, arXiv 2006.11239, eq. 6-7), and ADM's p_sample with learned variance; ADM-ES.

    A classifier's gradient, where it is given to the step, shifts the mean by the variance times it (ADM's condition_mean).

    schedule: a DiscreteSchedule, whose betas are respaced to `steps` as ADM does it; a FlowSchedule; or a Grid.
    variance: "fixed_small" (the posterior's), "fixed_large" (beta) or "learned_range" (the model's second half of channels, v,
        between the two; arXiv 2102.09672, eq. 15).
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, allowed=_TRAINED)
    alpha_ts, variance_ts = solvers.chain(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
    columns["c_x"], columns["c_m0"], small = solvers.posterior(
        alpha_ts, variance_ts, grid.sigma, grid.alpha_next, grid.sigma_next
    )
    inside = np.append(np.ones(len(grid) - 1), 0.0)  # the last step adds no noise
    # The last posterior variance is 0 where sigma_s is; its neighbour's stands in for its logarithm, as in ADM.
    stand_in = small.copy()
    if len(grid) > 1 and small[-1] == 0:
        stand_in[-1] = small[-2]
    if variance == "fixed_small":
        columns["c_noise"], columns["c_grad"] = np.sqrt(small) * inside, small
        columns["excess"] = small * (inside - 1)
    elif variance == "fixed_large":
        large = np.append(variance_ts[:-1], stand_in[-1])
        columns["c_noise"], columns["c_grad"] = np.sqrt(large) * inside, large
        columns["excess"] = large * inside - small
    elif variance == "learned_range":
        if not (stand_in > 0).all():
            raise ValueError("variance: 'learned_range' needs at least two steps")
        columns["c_noise"], columns["c_grad"] = inside, np.ones(len(grid))
        columns["logvar_min"], columns["logvar_max"] = np.log(stand_in), np.log(variance_ts)
        columns["excess"] = small * (inside - 1)
    else:
        raise ValueError(f"variance: expected 'fixed_small', 'fixed_large' or 'learned_range', got {variance!r}")
    return make_table("ddpm", grid, columns, correction=correction)


@sampler(EVERY, options_of=ddpm)
def dit(
    steps: Steps = 250,
    *,
    scaling: Scaling = 1.0,
    guidance: float = 4.0,
    guided_channels: int = 3,
    T: int = 1000,
    **options: Any,
) -> Table:
    """DiT's own sampling (arXiv 2212.09748): ddpm on linear betas, respaced as ADM's, learned variance, latents not clamped.

    steps: how many; or ADM's section counts as a string.
    guidance: the scale of classifier-free guidance.
    guided_channels: how many leading channels are guided; 0 for all. DiT's code guides three of the four.
    T: how many timesteps the network was trained on.
    options: of `ddpm`, such as `correction`, `clip` and `variance`.
    Raises ValueError naming the argument.
    """
    steps = str(steps) if isinstance(steps, (int, np.integer)) else steps
    options = {"variance": "learned_range", "clip": None} | options
    table = ddpm(linear(T), steps, scaling=scaling, guidance=guidance, **options)
    values = {key: table[key] for key in VALUES} | {"guided_channels": guided_channels}
    return Table(values, name=f"dit[{len(table)}]", initial_sigma=table.initial_sigma, discrete=True)


@sampler(EVERY)
def ddim(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    eta: float = 0.0,
    direction: str = "scaled",
    clip: float | None = None,
    guidance: float = 1.0,
    **grid_options: Any,
) -> Table:
    """DDIM (arXiv 2010.02502, eq. 12), with Epsilon Scaling in either of its two published forms; on a FlowSchedule, Euler.

    A step ends at the next timestep. (diffusers' ends T//n below its own, which is another with "linspace", and with "trailing"
    where n does not divide T.) A classifier's gradient shifts eps by -sigma_t times it after clamping (ADM's condition_score);
    not where alpha is 0, and not in the unscaled form.

    schedule: a DiscreteSchedule, a FlowSchedule, or a Grid.
    eta: 0 is deterministic, 1 has the posterior's variance.
    direction: "scaled": the noise direction is derived again from the scaled and clamped x_0 (ADM-ES, DDIM-ES). "unscaled": it is
        the model's own eps (LDM-ES). lambda does not transfer between the two.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, allowed=_TRAINED)
    at, after = (grid.alpha, grid.sigma), (grid.alpha_next, grid.sigma_next)
    _, _, variance = solvers.posterior(*solvers.chain(*at, *after), grid.sigma, *after)
    eta = number("eta", eta, 0)
    noise_variance = eta**2 * variance
    if (noise_variance > grid.sigma_next**2 * (1 + 1e-12)).any():
        raise ValueError(f"eta: expected no more noise than sigma_s^2, got {eta}")
    columns["c_noise"] = np.sqrt(noise_variance)
    towards = solvers.rest(grid.sigma_next, columns["c_noise"])
    if direction == "scaled":  # eps = (x - alpha*m0)/sigma
        columns["c_x"], columns["c_m0"] = solvers.first_order(*at, grid.alpha_next, towards)
        safe_alpha = np.where(grid.alpha == 0, 1.0, grid.alpha)
        shift = grid.alpha_next * grid.sigma**2 / safe_alpha - towards * grid.sigma
        columns["c_grad"] = np.where(grid.alpha == 0, 0.0, shift)  # there eps says nothing of x_0
    elif direction == "unscaled":  # eps = e_x*x + e_f*f, what the model said
        e_x, e_f = solvers.eps_of(columns["f_x0"], columns["f_eps"], *at)
        columns["c_x"], columns["c_f"], columns["c_m0"] = towards * e_x, towards * e_f, grid.alpha_next
    else:
        raise ValueError(f"direction: expected 'scaled' or 'unscaled', got {direction!r}")
    return make_table("ddim", grid, columns, correction=correction)


@sampler(EVERY)
def ddim_inverse(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    **grid_options: Any,
) -> Table:
    """DDIM from the clean end up (arXiv 2010.02502, section 4.3): the latent from which ddim leads to a given image.

    The state to start from is the image: pass it to `sample` as start=; its noise level, initial_sigma, is 0 unless the grid
    ends elsewhere. Each call is asked at the state that it finds, and told the t of the state that it leads to, as diffusers'
    DDIMInverseScheduler does it: nothing was trained at sigma = 0. x_0 is not held: its m0 is eps.

    schedule: a DiscreteSchedule, a FlowSchedule or a Grid, the noisiest first. It is walked backwards.
    scaling: lambda_t of eps/lambda_t, in any form that `scaling.as_scaling` takes: that of ddim's step between the same points.
    prediction: "epsilon", "v_prediction" or "flow"; not "sample", which says nothing of eps at sigma = 0.
    Raises ValueError or TypeError naming the argument.
    """
    grid = grid_of(schedule, steps, _TRAINED, grid_options)
    ends = Grid(
        grid.t[::-1], grid.alpha_next[::-1], grid.sigma_next[::-1], grid.c_in[::-1], float(grid.sigma_end),
        float(grid.alpha[0]), float(grid.sigma[0]), grid.discrete,
    )  # fmt: skip
    columns = call(prediction, ends, lambdas_of(scaling, grid, prediction)[::-1], keeps="eps")
    columns |= {"alpha_out": ends.alpha_next, "sigma_out": ends.sigma_next, "g": number("guidance", guidance)}
    columns["c_x"] = ends.alpha_next / ends.alpha
    columns["c_m0"] = ends.sigma_next - columns["c_x"] * ends.sigma
    return make_table("ddim_inverse", ends, columns)


@sampler(ON_A_PATH)
def euler(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    space: str = "sigma",
    **grid_options: Any,
) -> Table:
    """Euler's method for the probability flow: ddim's update (eta = 0), in either state.

    space: "sigma", the state x_0 + (sigma/alpha)*eps of k-diffusion, of which the network is fed alpha times; or "vp", the state
        that the network was trained on. The trajectory is the same, up to that factor. "sigma" needs alpha > 0 at every step.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    columns["c_x"], columns["c_m0"] = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
    return make_table("euler", grid, columns, correction=correction)


@sampler(ON_A_PATH)
def euler_ancestral(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    eta: float = 1.0,
    S_noise: float = 1.0,
    space: str = "sigma",
    **grid_options: Any,
) -> Table:
    """Euler down to sigma_down, then noise up to sigma_s (k-diffusion's euler_ancestral); eta = 1 is the posterior's variance.

    With r = sigma/alpha: up = min(r_s, eta*sqrt(r_s^2*(r_t^2 - r_s^2)/r_t^2)), down^2 = r_s^2 - up^2.

    eta: how much of the noise is fresh; 0 is euler.
    Raises ValueError naming the argument.
    """
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    down, up = solvers.ancestral(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next, eta)
    columns["c_x"], columns["c_m0"] = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, down)
    return make_table("euler_ancestral", grid, columns | noise_columns(up, S_noise), correction=correction)


@sampler(EVERY)
def flow_euler(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "flow",
    clip: float | None = None,
    guidance: float = 1.0,
    stochastic: bool = False,
    eta: float = 0.0,
    S_noise: float = 1.0,
) -> Table:
    """Rectified flow's sampler: Euler on x_t = (1 - sigma)*x_0 + sigma*eps, or, stochastic, m0 with fresh noise in each step.

    schedule: a FlowSchedule; or a Grid, of a flow where eta is above 0.
    stochastic: each step leads to m0 with fresh noise, instead of along the flow.
    eta: in [0, 1]; above 0 a step leads down to sigma_down, then noise up, which is ComfyUI's euler_ancestral for flows.
    Raises ValueError naming the argument.
    """
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    if eta > 1 or (eta and stochastic):
        raise ValueError(f"eta: expected a value in [0, 1], and 0 where stochastic, got {eta:g}")
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, {}, allowed=(FlowSchedule,))
    if eta:
        columns["c_x"], columns["c_m0"], noise = solvers.flow_ancestral(grid.sigma, grid.sigma_next, eta, True)
    else:
        keep = np.zeros(len(grid)) if stochastic else grid.sigma_next
        columns["c_x"], columns["c_m0"] = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, keep)
        noise = solvers.rest(grid.sigma_next, keep)
    return make_table("flow_euler", grid, columns | noise_columns(noise, S_noise), correction=correction)
