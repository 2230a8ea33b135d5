"""Whole trajectories, lambda != 1, against the textbook samplers of oracles.py.

Three claims for every case: the table's float64 columns are the textbook's update; the float32 step stays within 1e-5
of it; with a bfloat16 or float16 state the error is that of the textbook rounded to that type after every model call.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

import epskernels
from epskernels import samplers, scaling, schedule
from epskernels.table import COLUMNS

from ..support import oracles

SHAPE = (3, 5, 7)
SEEDS = [7, 2**63 + 11]
FLOAT64_TOLERANCE = 1e-11
FLOAT32_TOLERANCE = 1e-5
HALF_FACTOR = 1.1  # a rounding decided the other way, here and there


# ---- fake networks: a bounded, smooth denoiser, told to the sampler in any parametrisation ----
# A bounded x_0 of moderate slope keeps the trajectory well conditioned, as a trained network does; an arbitrary smooth
# eps would be blown up by 1/alpha, 157 at the last timestep of the linear betas.


def fake_denoiser(x, t, phase=0.0):
    inside = 0.8 * x + 0.3 * np.sin(np.roll(x, 1, axis=-1)) + 0.4 * np.cos(t / 160 + phase)
    return 1.2 * np.tanh(inside)


def fake_variance(x, t):
    """ADM's v: mostly inside [-1, 1], but networks do leave it."""
    return 1.1 * np.sin(1.7 * x + t / 200)


def fake_gradient(x, t):
    return 0.7 * np.cos(1.3 * x + t / 300)


def express(prediction, x, x0, alpha, sigma):
    """The network's output in another parametrisation, for x = alpha*x0 + sigma*eps."""
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]


def vp_network(betas, prediction="epsilon", phase=0.0, learned=False):
    """Trained, as it were, on the T timesteps of these betas; between them it interpolates log(sigma/alpha)."""
    abar = np.cumprod(1 - betas)
    log_ratios = np.log(np.tan(np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))))  # finite where alpha is 0

    def model(x, t):
        angle = np.arctan(np.exp(np.interp(t, np.arange(len(betas)), log_ratios)))
        out = express(prediction, x, fake_denoiser(x, t, phase), np.cos(angle), np.sin(angle))
        return np.concatenate([out, fake_variance(x, t)], axis=1) if learned else out

    return model


def edm_network(x, sigma):
    return fake_denoiser(x / np.sqrt(1 + sigma**2 / 4), 100 * np.log(sigma))


def flow_network(x, t):
    return express("flow", x, fake_denoiser(x, t), 1 - t / 1000, t / 1000)


# ---- cases ----


@dataclasses.dataclass(frozen=True)
class Case:
    """table(scaling) of `steps` steps, and oracle(x, lam, noise, keep) that calls the same network by itself."""

    table: Callable
    oracle: Callable
    model: Callable
    steps: int
    uncond: Callable = None
    cond_fn: Callable = None
    calls: int = 1  # rows for every step but the last, which has one
    ends: Callable = None  # of a table's length: the rows that end a step; default by `calls`
    each_draws: bool = False  # noise[j] is that of all rows of step j
    churns: bool = False  # the noise comes before a step: step j's is drawn by the row that ends step j - 1
    unscaled_first: bool = False  # the first step starts at alpha = 0, where only lambda = 1 is defined


LINEAR, SCALED_LINEAR, COSINE = oracles.linear_betas(), oracles.scaled_linear_betas(), oracles.cosine_betas()
ZERO_SNR = oracles.zero_snr_betas(SCALED_LINEAR)


def adm_p_sample(variance, guided=False, betas=LINEAR, made=schedule.linear, steps="20", t=None):
    t = oracles.adm_timesteps(1000, 20) if t is None else t
    model = vp_network(betas, learned=variance == "learned_range")
    cond_fn = fake_gradient if guided else None
    return Case(
        lambda s: samplers.ddpm(made(), steps, scaling=s, variance=variance),
        lambda x, lam, noise, keep: oracles.adm_p_sample(
            model, x, betas, t, lam, noise, variance=variance, cond_fn=cond_fn, keep=keep
        ),
        model, len(t), cond_fn=cond_fn,
    )  # fmt: skip


def adm_ddim(eta, guided=False):
    model, cond_fn = vp_network(LINEAR), fake_gradient if guided else None
    return Case(
        lambda s: samplers.ddim(schedule.linear(), "ddim20", scaling=s, eta=eta, clip=1.0),
        lambda x, lam, noise, keep: oracles.adm_ddim_sample(
            model, x, LINEAR, np.arange(0, 1000, 50), lam, noise, eta=eta, cond_fn=cond_fn, keep=keep
        ),
        model, 20, cond_fn=cond_fn,
    )  # fmt: skip


def ddim_es(eta, prediction="epsilon"):
    model = vp_network(LINEAR)
    return Case(
        lambda s: samplers.ddim(schedule.linear(), 20, scaling=s, eta=eta, prediction=prediction),
        lambda x, lam, noise, keep: oracles.ddim_es(
            model, x, LINEAR, np.arange(0, 1000, 50), lam, noise, eta=eta, keep=keep
        ),
        vp_network(LINEAR, prediction), 20,
    )  # fmt: skip


def ldm(eta, scale=1.0, prediction="epsilon"):
    model, uncond = vp_network(SCALED_LINEAR), vp_network(SCALED_LINEAR, phase=1.0)
    return Case(
        lambda s: samplers.ddim(
            schedule.scaled_linear(), 20, scaling=s, eta=eta, direction="unscaled", guidance=scale,
            prediction=prediction, steps_offset=1, final="first",
        ),
        lambda x, lam, noise, keep: oracles.ldm_ddim(
            model, uncond, x, SCALED_LINEAR, 20, lam, noise, eta=eta, scale=scale, keep=keep
        ),
        vp_network(SCALED_LINEAR, prediction), 20, uncond=vp_network(SCALED_LINEAR, prediction, phase=1.0),
    )  # fmt: skip


def ddim_zero_snr():
    model = vp_network(ZERO_SNR, "v_prediction")
    return Case(
        lambda s: samplers.ddim(
            schedule.scaled_linear().zero_terminal_snr(), 20, scaling=s, prediction="v_prediction", spacing="trailing"
        ),
        lambda x, lam, noise, keep: oracles.ddim_v(model, x, ZERO_SNR, np.arange(50, 1001, 50) - 1, lam, keep=keep),
        model, 20, unscaled_first=True,
    )  # fmt: skip


def edm(heun, steps, **churn):
    make = samplers.edm_heun if heun else samplers.edm_euler
    return Case(
        lambda s: make(schedule.KarrasSchedule(), steps, scaling=s, **churn),
        lambda x, lam, noise, keep: oracles.edm_sampler(
            edm_network, x, oracles.edm_sigmas(steps), lam, noise, heun=heun, keep=keep, **churn
        ),
        edm_network, steps, calls=1 + heun, churns=True,
    )  # fmt: skip


def vp_sigmas(steps):
    ends = np.cumprod(1 - SCALED_LINEAR)[[0, -1]]
    return oracles.edm_sigmas(steps, *np.sqrt((1 - ends) / ends))


def edm_on_vp(heun, steps, prediction="epsilon", **churn):
    make = samplers.edm_heun if heun else samplers.edm_euler
    denoise = oracles.vp_denoiser(vp_network(SCALED_LINEAR), SCALED_LINEAR)
    return Case(
        lambda s: make(
            schedule.KarrasSchedule(model=schedule.scaled_linear()), steps, scaling=s, prediction=prediction, **churn
        ),
        lambda x, lam, noise, keep: oracles.edm_sampler(
            denoise, x, vp_sigmas(steps), lam, noise, heun=heun, keep=keep, **churn
        ),
        vp_network(SCALED_LINEAR, prediction), steps, calls=1 + heun, churns=True,
    )  # fmt: skip


def dpmpp_vp(final, lower_order_final, prediction="epsilon"):
    model, abar = vp_network(LINEAR), np.cumprod(1 - LINEAR)
    t = np.round(1000 - np.arange(15) * (1000 / 15)).astype(int) - 1
    end = 1.0 if final == "clean" else abar[0]
    alpha, sigma = np.sqrt(np.append(abar[t], end)), np.sqrt(1 - np.append(abar[t], end))

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            return (x - sigma[j] * (model(x, t[j]) / lam[j])) / alpha[j]

        return oracles.dpmpp_2m(denoise, x, alpha, sigma, lower_order_final=lower_order_final, keep=keep)

    return Case(
        lambda s: samplers.dpmpp_2m(
            schedule.linear(), 15, scaling=s, spacing="trailing", final=final, lower_order_final=lower_order_final,
            prediction=prediction,
        ),
        oracle, vp_network(LINEAR, prediction), 15,
    )  # fmt: skip


def unipc(order, variant="bh2", corrector=True, prediction="epsilon"):
    model, abar = vp_network(LINEAR), np.cumprod(1 - LINEAR)
    t = np.round(1000 - np.arange(15) * (1000 / 15)).astype(int) - 1
    alpha, sigma = np.sqrt(np.append(abar[t], abar[0])), np.sqrt(1 - np.append(abar[t], abar[0]))

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            return (x - sigma[j] * (model(x, t[j]) / lam[j])) / alpha[j]

        return oracles.unipc(denoise, x, alpha, sigma, order=order, variant=variant, corrector=corrector, keep=keep)

    return Case(
        lambda s: samplers.unipc(
            schedule.linear(), 15, scaling=s, spacing="trailing", final="first", order=order, solver=variant,
            corrector=corrector, prediction=prediction,
        ),
        oracle, vp_network(LINEAR, prediction), 15,
    )  # fmt: skip


def unipc_karras(order):
    """To sigma = 0: with bh2, since bh1's formula has no number there."""
    sigma = oracles.edm_sigmas(12)

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            return x - sigma[j] * ((x - edm_network(x, sigma[j])) / sigma[j] / lam[j])

        return oracles.unipc(denoise, x, np.ones(13), sigma, order=order, variant="bh2", keep=keep)

    return Case(
        lambda s: samplers.unipc(schedule.KarrasSchedule(), 12, scaling=s, prediction="sample", order=order),
        oracle, edm_network, 12,
    )  # fmt: skip


def dpmpp_karras(on_vp, prediction="sample"):
    sigma = vp_sigmas(15) if on_vp else oracles.edm_sigmas(15)
    network = oracles.vp_denoiser(vp_network(SCALED_LINEAR), SCALED_LINEAR) if on_vp else edm_network
    made = schedule.KarrasSchedule(model=schedule.scaled_linear()) if on_vp else schedule.KarrasSchedule()

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            return x - sigma[j] * ((x - network(x, sigma[j])) / sigma[j] / lam[j])

        return oracles.dpmpp_2m(denoise, x, np.ones(16), sigma, lower_order_final=False, keep=keep)

    return Case(
        lambda s: samplers.dpmpp_2m(made, 15, scaling=s, prediction=prediction),
        oracle, vp_network(SCALED_LINEAR, prediction) if on_vp else edm_network, 15,
    )  # fmt: skip


def flow(name, shift=3.0):
    s = np.linspace(1, 0, 17)
    sigma = shift * s / (1 + (shift - 1) * s)

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            x0 = fake_denoiser(x, 1000 * sigma[j])
            return x0 if lam[j] == 1 else (1 - 1 / lam[j]) * x / (1 - sigma[j]) + x0 / lam[j]

        if name == "ddim":
            return oracles.flow_euler(lambda x, s: flow_network(x, 1000 * s), x, sigma, lam, keep=keep)
        return oracles.bayes_ancestral(denoise, x, 1 - sigma, sigma, noise, keep=keep)

    options = {"ddim": {}, "ddpm": {"clip": None}}[name]
    return Case(
        lambda s: samplers.SAMPLERS[name](schedule.FlowSchedule(shift), 16, scaling=s, prediction="flow", **options),
        oracle, flow_network, 16, unscaled_first=True,
    )  # fmt: skip


def adm_predicting(prediction):
    return dataclasses.replace(
        adm_p_sample("fixed_small"),
        table=lambda s: samplers.ddpm(schedule.linear(), "20", scaling=s, prediction=prediction),
        model=vp_network(LINEAR, prediction),
    )


def in_sigma(
    name, on_vp=False, prediction=None, calls=1, steps=12, theirs=None, churns=False, each_draws=False, **options
):
    """k-diffusion's samplers on EDM's levels, for an EDM denoiser or a VP network."""
    sampler = {"dpmpp_3m": "dpmpp_3m_sde", "heun": "heun"}.get(name, name)
    extra = {"eta": 0.0} if name == "dpmpp_3m" else options if theirs is None else theirs
    prediction = prediction or ("epsilon" if on_vp else "sample")
    sigma = vp_sigmas(steps) if on_vp else oracles.edm_sigmas(steps)
    network = oracles.vp_denoiser(vp_network(SCALED_LINEAR), SCALED_LINEAR) if on_vp else edm_network
    made = schedule.KarrasSchedule(model=schedule.scaled_linear()) if on_vp else schedule.KarrasSchedule()
    own = {"lower_order_final": False} if name.startswith(("dpmpp_2m", "dpmpp_3m")) else {}
    return Case(
        lambda s: samplers.SAMPLERS[name](
            made, steps, scaling=s, prediction=prediction, **own,
            **{{"s_noise": "S_noise"}.get(key, key): value for key, value in options.items()},
        ),
        lambda x, lam, noise, keep: getattr(oracles, f"sigma_{sampler}")(
            network, x, sigma, lam, noise, keep=keep, **extra
        ),
        vp_network(SCALED_LINEAR, prediction) if on_vp else edm_network, steps, calls=calls, churns=churns, each_draws=each_draws,
    )  # fmt: skip


def on_timesteps(name, steps=12, space="sigma", prediction="epsilon", **options):
    """The same on a VP schedule's own timesteps; the oracle's state is x/alpha, the table's x/alpha or x."""
    abar, model = np.cumprod(1 - LINEAR), vp_network(LINEAR)
    t = np.round(np.linspace(0, 999, steps))[::-1].astype(int)
    ratios = np.append(np.sqrt((1 - abar[t]) / abar[t]), 0.0)
    alpha = np.append(np.sqrt(abar[t]), 1.0) if space == "vp" else np.ones(steps + 1)

    def denoise(y, ratio):
        j = np.argmin(np.abs(ratios - ratio))
        return y - ratio * model(np.sqrt(abar[t[j]]) * y, t[j])

    def oracle(x, lam, noise, keep):
        stored = np.append(np.repeat(alpha[1:-1], 2), 1.0) if name == "heun" else alpha[1:]
        scales = iter(stored)

        def kept(y):  # what is stored is alpha*y
            a = next(scales)
            return keep(a * y) / a

        own = {"keep_m0": keep} if name == "heun" else {}
        y_keep = kept if keep is not oracles.exact else keep
        states = getattr(oracles, f"sigma_{name}")(
            denoise, x / alpha[0], ratios, lam, noise, keep=y_keep, **own, **options
        )
        return [a * y for a, y in zip(alpha[1:], states, strict=True)]

    return Case(
        lambda s: samplers.SAMPLERS[name](
            schedule.linear(), steps, scaling=s, prediction=prediction, space=space, spacing="linspace", **options
        ),
        oracle, vp_network(LINEAR, prediction), steps, calls=1 + (name == "heun"),
    )  # fmt: skip


def linear_multistep(name, spacing="trailing", final="first", prediction="epsilon", steps=12, theirs=None, **options):
    """Of estimates of eps, on a VP schedule's own timesteps; that of latent diffusion, since 1/alpha times eps enters."""
    model, grid = vp_network(SCALED_LINEAR), schedule.scaled_linear().grid(steps, spacing, final=final)
    alpha, sigma = np.append(grid.alpha, grid.alpha_end), np.append(grid.sigma, grid.sigma_end)

    def oracle(x, lam, noise, keep):
        def eps(x, j):
            return model(x, grid.t[int(j + 0.5)]) / lam[int(j)]

        return getattr(oracles, name)(eps, x, alpha, sigma, keep=keep, **(options if theirs is None else theirs))

    return Case(
        lambda s: samplers.SAMPLERS[name](
            schedule.scaled_linear(), steps, scaling=s, spacing=spacing, final=final, prediction=prediction, **options
        ),
        oracle, vp_network(SCALED_LINEAR, prediction), steps,
        ends=(lambda rows: list(range(1, rows))) if name == "plms" else None,
    )  # fmt: skip


def multistep_vp(name, theirs, final="clean", prediction="epsilon", **options):
    """Of estimates of x_0, on a VP schedule's own timesteps."""
    model, grid = vp_network(LINEAR), schedule.linear().grid(12, "trailing", final=final)
    alpha, sigma = np.append(grid.alpha, grid.alpha_end), np.append(grid.sigma, grid.sigma_end)

    def oracle(x, lam, noise, keep):
        def denoise(x, j):
            return (x - sigma[j] * (model(x, grid.t[j]) / lam[j])) / alpha[j]

        return getattr(oracles, name)(denoise, x, alpha, sigma, noise, keep=keep, **theirs)

    return Case(
        lambda s: samplers.SAMPLERS[name](
            schedule.linear(), 12, scaling=s, spacing="trailing", final=final, prediction=prediction, **options
        ),
        oracle, vp_network(LINEAR, prediction), 12,
    )  # fmt: skip


def ddim_inverse(prediction="epsilon"):
    """The network is told the time of the step's end, and asked at its start."""
    grid = schedule.linear().grid(12)
    alpha, sigma = np.append(grid.alpha, 1.0)[::-1], np.append(grid.sigma, 0.0)[::-1]
    model, t = vp_network(LINEAR), grid.t[::-1]

    def oracle(x, lam, noise, keep):
        return oracles.ddim_inverse(lambda x, j: model(x, t[j]) / lam[::-1][j], x, alpha, sigma, keep=keep)

    return Case(
        lambda s: samplers.ddim_inverse(schedule.linear(), 12, scaling=s, prediction=prediction), oracle, model, 12
    )


def consistency(name, steps, prediction="epsilon", **options):
    model, t = vp_network(SCALED_LINEAR), oracles.consistency_timesteps(1000, 50, steps)
    return Case(
        lambda s: samplers.SAMPLERS[name](schedule.scaled_linear(), steps, scaling=s, prediction=prediction, **options),
        lambda x, lam, noise, keep: getattr(oracles, name)(model, x, SCALED_LINEAR, t, lam, noise, keep=keep, **options),
        vp_network(SCALED_LINEAR, prediction), steps,
    )  # fmt: skip


def pfgmpp():
    return Case(
        lambda s: samplers.pfgmpp(schedule.KarrasSchedule(), 10, scaling=s),
        lambda x, lam, noise, keep: oracles.pfgmpp_sampler(edm_network, x, 10, lam, 128, keep=keep),
        edm_network, 10, calls=2,
    )  # fmt: skip


def flow_euler(stochastic):
    case = flow("ddim")
    sigma = 3 * (s := np.linspace(1, 0, 17)) / (1 + 2 * s)

    def oracle(x, lam, noise, keep):
        states = []
        for j in range(16):
            x0 = fake_denoiser(x, 1000 * sigma[j])
            if lam[j] != 1:
                x0 = x - sigma[j] * ((x - x0) / sigma[j])  # v, and from it eps
                eps = (x - (1 - sigma[j]) * x0) / sigma[j] / lam[j]
                x0 = (x - sigma[j] * eps) / (1 - sigma[j])
            x = keep((1 - sigma[j + 1]) * x0 + sigma[j + 1] * noise[j])
            states.append(x)
        return states

    return dataclasses.replace(
        case,
        table=lambda s: samplers.flow_euler(schedule.FlowSchedule(3.0), 16, scaling=s, stochastic=stochastic),
        oracle=oracle if stochastic else case.oracle,
    )


CHURN = {"S_churn": 4.0}
EDM_CHURN = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
CASES = {
    **{
        f"adm_p_sample-{variance}{'-classifier' if guided else ''}": adm_p_sample(variance, guided)
        for variance in ("fixed_small", "fixed_large", "learned_range")
        for guided in (False, True)
    },
    # Not from timestep 999 on: alpha is 5e-5 there, and float32's rounding of eps alone moves x_0 by 1e-3.
    "adm_p_sample-learned_range-cosine": adm_p_sample(
        "learned_range", True, COSINE, schedule.cosine, 20, np.arange(0, 1000, 50)
    ),
    "adm_ddim": adm_ddim(0.0),
    "adm_ddim-classifier": adm_ddim(0.0, True),
    "adm_ddim-eta": adm_ddim(0.6),
    "adm_ddim-eta-classifier": adm_ddim(0.6, True),
    "ddim_es": ddim_es(0.0),
    "ddim_es-eta": ddim_es(1.0),
    "ldm": ldm(0.0),
    "ldm-guided": ldm(0.0, 3.0),
    "ldm-guided-eta": ldm(0.7, 3.0),
    "edm_heun": edm(True, 10),
    "edm_heun-churn": edm(True, 10, **CHURN),
    "edm_heun-churn-window": edm(True, 12, **EDM_CHURN),
    "edm_euler": edm(False, 16),
    "edm_euler-churn": edm(False, 16, **CHURN),
    "edm_euler-churn-window": edm(False, 16, **EDM_CHURN),
    "edm_heun-vp": edm_on_vp(True, 10),
    # Below S_max, so that the raised noise levels stay among those that the network knows.
    "edm_heun-vp-churn": edm_on_vp(True, 10, S_churn=4.0, S_max=10.0),
    "edm_heun-vp-v_prediction": edm_on_vp(True, 10, "v_prediction"),
    "dpmpp_2m-clean": dpmpp_vp("clean", True),
    "dpmpp_2m-first": dpmpp_vp("first", True),
    "dpmpp_2m-first-second_order": dpmpp_vp("first", False),
    "dpmpp_2m-karras": dpmpp_karras(False),
    "dpmpp_2m-karras-vp": dpmpp_karras(True, "epsilon"),
    "dpmpp_2m-karras-vp-v_prediction": dpmpp_karras(True, "v_prediction"),
    **{f"ddpm-{kind}": adm_predicting(kind) for kind in samplers.PREDICTIONS[1:]},
    **{f"ddim-{kind}": ddim_es(0.0, kind) for kind in samplers.PREDICTIONS[1:]},
    **{f"ldm-{kind}": ldm(0.7, 3.0, kind) for kind in samplers.PREDICTIONS[1:]},
    **{f"dpmpp_2m-{kind}": dpmpp_vp("first", False, kind) for kind in samplers.PREDICTIONS[1:]},
    "ddim-zero_terminal_snr": ddim_zero_snr(),
    "euler": in_sigma("euler"),
    "euler-vp": in_sigma("euler", True),
    "euler-timesteps": on_timesteps("euler"),
    "euler-timesteps-vp-space": on_timesteps("euler", space="vp"),
    "euler-timesteps-v_prediction": on_timesteps("euler", prediction="v_prediction"),
    "euler_ancestral": in_sigma("euler_ancestral"),
    "euler_ancestral-eta-s_noise": in_sigma("euler_ancestral", eta=0.6, s_noise=1.003),
    "euler_ancestral-timesteps": on_timesteps("euler_ancestral"),
    "euler_ancestral-timesteps-vp-space": on_timesteps("euler_ancestral", space="vp"),
    "heun": in_sigma("heun", calls=2),
    "heun-timesteps": on_timesteps("heun"),
    "heun-timesteps-vp-space": on_timesteps("heun", space="vp"),
    "dpmpp_2s": in_sigma("dpmpp_2s", calls=2),
    "dpmpp_2s-ancestral": in_sigma("dpmpp_2s", calls=2, eta=1.0, s_noise=1.002),
    "dpmpp_2s-vp": in_sigma("dpmpp_2s", True, calls=2),
    "dpmpp_2m_sde": in_sigma("dpmpp_2m_sde"),
    "dpmpp_2m_sde-heun-eta-s_noise": in_sigma("dpmpp_2m_sde", solver="heun", eta=0.5, s_noise=1.003),
    "dpmpp_2m_sde-vp": in_sigma("dpmpp_2m_sde", True),
    "dpmpp_3m": in_sigma("dpmpp_3m"),
    "dpmpp_3m_sde": in_sigma("dpmpp_3m_sde"),
    "dpmpp_3m_sde-vp-v_prediction": in_sigma("dpmpp_3m_sde", True, "v_prediction"),
    **{f"unipc-{order}-{variant}": unipc(order, variant) for order in (1, 2, 3) for variant in ("bh1", "bh2")},
    "unipc-predictor": unipc(3, corrector=False),
    "unipc-v_prediction": unipc(2, prediction="v_prediction"),
    "unipc-karras-2": unipc_karras(2),
    "unipc-karras-3": unipc_karras(3),
    "dpm_2": in_sigma("dpm_2", calls=2, churns=True),
    "dpm_2-churn": in_sigma("dpm_2", calls=2, churns=True, **EDM_CHURN),
    "dpm_2_ancestral": in_sigma("dpm_2_ancestral", calls=2),
    "dpm_2_ancestral-vp-eta": in_sigma("dpm_2_ancestral", True, calls=2, eta=0.5, s_noise=1.003),
    "dpmpp_sde": in_sigma("dpmpp_sde", calls=2, each_draws=True),
    "dpmpp_sde-eta-s_noise-r": in_sigma("dpmpp_sde", calls=2, each_draws=True, eta=0.6, s_noise=1.003, r=0.3),
    "dpmpp_sde-vp": in_sigma("dpmpp_sde", True, calls=2, each_draws=True),
    "dpmpp_3s": in_sigma("dpmpp_3s", calls=3),
    "dpmpp_3s-vp": in_sigma("dpmpp_3s", True, calls=3),
    "dpm_solver-2": in_sigma("dpm_solver", calls=2, order=2),
    "dpm_solver-2-ancestral": in_sigma("dpm_solver", calls=2, order=2, eta=1.0),
    "dpm_solver-2-r": in_sigma("dpm_solver", calls=2, order=2, r=0.3, theirs={"order": 2, "r1": 0.3}),
    "dpm_solver-3-vp": in_sigma("dpm_solver", True, calls=3, order=3),
    "dpm_solver-3-ancestral-least": in_sigma("dpm_solver", calls=3, order=3, eta=0.8, least=0.002),
    "dpm_solver-mixed": dataclasses.replace(
        in_sigma("dpm_solver", steps=5, order=(3, 2, 1, 3, 1)), ends=lambda rows: [2, 4, 5, 8, 9]
    ),
    "seeds_2": in_sigma("seeds_2", calls=2, each_draws=True),
    "seeds_2-heun": in_sigma("seeds_2", calls=2, each_draws=True, solver="heun", r=0.7, theirs={"phi": 2, "r": 0.7}),
    "seeds_2-r-eta": in_sigma("seeds_2", True, calls=2, each_draws=True, r=1.0, eta=0.4),
    "seeds_3": in_sigma("seeds_3", calls=3, each_draws=True),
    "seeds_3-vp-eta-s_noise": in_sigma("seeds_3", True, calls=3, each_draws=True, eta=0.4, s_noise=1.003),
    "res_multistep": in_sigma("res_multistep"),
    "res_multistep-vp-ancestral": in_sigma("res_multistep", True, eta=0.7, s_noise=1.003),
    **{name: linear_multistep(name) for name in ("plms", "lms", "ipndm", "ipndm_v", "deis", "gradient_estimation")},
    **{
        f"{name}-to-0": linear_multistep(name, final="clean")
        for name in ("plms", "lms", "ipndm", "deis", "gradient_estimation")
    },
    **{f"{name}-linspace": linear_multistep(name, "linspace") for name in ("plms", "lms", "ipndm_v")},
    **{f"plms-{steps}": linear_multistep("plms", steps=steps) for steps in (2, 3, 4, 5)},
    **{f"lms-{order}": linear_multistep("lms", order=order) for order in (1, 2, 3)},
    **{f"ipndm_v-{order}": linear_multistep("ipndm_v", order=order) for order in (2, 3)},
    "ipndm_v-exact": dataclasses.replace(
        linear_multistep("lms"), table=linear_multistep("ipndm_v", weights="exact", theirs={}).table
    ),
    "deis-4": linear_multistep("deis", order=4),
    "deis-log_rho": linear_multistep("deis", variable="log_rho"),
    "deis-rho": linear_multistep("deis", variable="rho", final="clean"),
    "plms-v_prediction": linear_multistep("plms", prediction="v_prediction"),
    "lms-sample": linear_multistep("lms", prediction="sample"),
    "deis-flow": linear_multistep("deis", prediction="flow"),
    **{f"er_sde-{order}": multistep_vp("er_sde", {"order": order}, order=order) for order in (1, 2, 3)},
    "er_sde-ode": multistep_vp("er_sde", {"phi": lambda r: r}, "first", scaler=lambda r: r),
    "er_sde-v_prediction": multistep_vp("er_sde", {"s_noise": 1.003}, "first", "v_prediction", S_noise=1.003),
    **{
        f"sa_solver-{p}-{c}": multistep_vp(
            "sa_solver", {"predictor": p, "corrector": c}, predictor_order=p, corrector_order=c
        )
        for p, c in ((3, 4), (2, 2), (1, 1), (3, 0), (1, 4))
    },
    "sa_solver-first": multistep_vp("sa_solver", {"predictor": 3, "corrector": 4}, "first"),
    "sa_solver-ode": multistep_vp("sa_solver", {"predictor": 3, "corrector": 4, "tau": 0.0}, tau=0.0),
    "sa_solver-window": multistep_vp(
        "sa_solver",
        {"predictor": 3, "corrector": 4, "tau": 0.7, "window": (0.3, 10.0), "s_noise": 1.003},
        tau=0.7,
        S_min=0.3,
        S_max=10.0,
        S_noise=1.003,
    ),
    "ddim_inverse": ddim_inverse(),
    "consistency": in_sigma("consistency"),
    "lcm": consistency("lcm", 4),
    "lcm-v_prediction": consistency("lcm", 8, "v_prediction"),
    "tcd": consistency("tcd", 4, gamma=0.3),
    "tcd-deterministic": consistency("tcd", 8, gamma=0.0),
    "tcd-sample": consistency("tcd", 8, "sample", gamma=1.0),
    "pfgmpp": pfgmpp(),
    "flow_euler": flow_euler(False),
    "flow_euler-stochastic": flow_euler(True),
    "ddim-rectified_flow": flow("ddim"),
    "ddpm-rectified_flow": flow("ddpm"),
}

SCALINGS = {  # the package's, and lambda by hand, the noisiest step first
    "constant": lambda n: (1.017, np.full(n, 1.017)),
    "from_cleanest": lambda n: (scaling.linear(0.0025, 1.0, origin="cleanest"), 1.0 + 0.0025 * np.arange(n)[::-1]),
    "from_noisiest": lambda n: (scaling.linear(0.002, 0.985, origin="noisiest"), 0.985 + 0.002 * np.arange(n)),
}


# ---- trajectories ----


def trajectory(table, case, x, step):
    """The states after every row: the network is called on float64, `step` decides what is rounded."""
    states, m1, m2, y = [], None, None, None
    for i in range(len(table)):
        inputs, t = table["c_in"][i] * x, table["t"][i]
        f, v = case.model(inputs, t), None
        if table.learned_variance:
            f, v = np.split(f, 2, axis=1)
        u = None if case.uncond is None else case.uncond(inputs, t)
        grad = None if case.cond_fn is None else case.cond_fn(x, t)
        x, m0, y = step(i, x, f, u=u, v=v, grad=grad, m1=m1, m2=m2, y=y)
        m1, m2 = m0, m1
        states.append(x)
    return states


def package_step(table, dtype):
    """epskernels.step, between float64 arrays. History that no row reads is NaN."""
    seeds = epskernels.as_seeds(SEEDS)

    def step(i, x, f, *, u, v, grad, m1, m2, y):
        outputs = {key: None if a is None else torch.tensor(a).float() for key, a in (("u", u), ("v", v))}
        grad = None if grad is None else torch.tensor(grad).to(dtype)
        state = torch.tensor(x).to(dtype)
        absent = torch.full_like(state, float("nan"))
        m1, m2, y = (absent if m is None else torch.tensor(m).to(dtype) for m in (m1, m2, y))
        f, inputs = torch.tensor(f).float(), {**outputs, "m1": m1, "m2": m2, "y": y, "grad": grad, "seeds": seeds}
        result = epskernels.step(state, f, table, i, **inputs, return_y=True)
        return tuple(tensor.double().numpy() for tensor in result)

    return step


def float64_step(table):
    """The row's formula on the table's float64 columns."""

    def step(i, x, f, *, u, v, grad, m1, m2, y):
        row = {column: table[column][i] for column in COLUMNS}
        fhat = f if row["g"] == 1 else u + row["g"] * (f - u)
        m0 = np.clip(row["d_x"] * x + row["d_f"] * fhat, -row["clip"], row["clip"])
        s = 1.0
        if row["logvar_min"] or row["logvar_max"]:
            s = np.exp(0.5 * ((1 + v) / 2 * row["logvar_max"] + (1 - v) / 2 * row["logvar_min"]))
        terms = {"x": x, "m0": m0, "m1": m1, "m2": m2, "y": y}
        x = row["c_f"] * fhat + sum(row[f"c_{name}"] * value for name, value in terms.items() if row[f"c_{name}"])
        y = sum(row[f"k_{name}"] * value for name, value in terms.items() if row[f"k_{name}"])
        if row["c_grad"] and grad is not None:
            x = x + row["c_grad"] * s**2 * grad
        return x + row["c_noise"] * s * drawn(table, i), m0, y

    return step


def drawn(table, i):
    return epskernels.normal(SEEDS, SHAPE, draw=int(table["draw"][i]), stream=0).double().numpy()


class Trial:
    """One case with one scaling: its table, the rows that end a step, and what the oracle is given."""

    def __init__(self, case, scaling_name):
        chosen, self.lam = SCALINGS[scaling_name](case.steps)
        if case.unscaled_first:
            self.lam[0] = 1.0
            chosen = scaling.array(self.lam, origin="noisiest")
        self.case, self.table = case, case.table(chosen)
        rows = len(self.table)
        self.ends = case.ends(rows) if case.ends else [*range(case.calls - 1, rows - 1, case.calls), rows - 1]
        self.noise = [drawn(self.table, row) for row in self.ends]
        if case.each_draws:
            begins = [0, *(end + 1 for end in self.ends)]
            self.noise = [
                [drawn(self.table, row) for row in range(*part)] for part in zip(begins, begins[1:], strict=False)
            ]
        if case.churns:
            self.noise = [None, *self.noise[:-1]]

    def start(self, dtype=torch.float32):
        latent = epskernels.normal(SEEDS, SHAPE, draw=0, stream=1)
        return (self.table.initial_sigma * latent).to(dtype).double().numpy()

    def oracle(self, x, keep=oracles.exact):
        return self.case.oracle(x, self.lam, self.noise, keep)

    def ran(self, x, step):
        states = trajectory(self.table, self.case, x, step)
        return [states[row] for row in self.ends]


def relative_errors(states, expected):
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(states, expected, strict=True)])


def largest_errors(states, expected):
    return np.array([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(states, expected, strict=True)])


cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
scalings = pytest.mark.parametrize("scaling_name", SCALINGS)


def test_every_sampler_has_a_case():
    assert {case.table(1.0).name.split("[")[0] for case in CASES.values()} == set(samplers.SAMPLERS)


@cases
@scalings
def test_table_is_the_textbook(case, scaling_name):
    trial = Trial(case, scaling_name)
    x = trial.start()
    errors = relative_errors(trial.ran(x, float64_step(trial.table)), trial.oracle(x))
    assert errors.max() <= FLOAT64_TOLERANCE, errors


@cases
@scalings
def test_float32_trajectory(case, scaling_name):
    trial = Trial(case, scaling_name)
    x = trial.start()
    states, expected = trial.ran(x, package_step(trial.table, torch.float32)), trial.oracle(x)
    errors, largest = relative_errors(states, expected), largest_errors(states, expected)
    assert errors.max() <= FLOAT32_TOLERANCE, errors
    assert largest.max() <= FLOAT32_TOLERANCE, largest


@cases
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.deep)], ids=["bfloat16", "float16"]
)
def test_half_trajectory(case, dtype):
    trial = Trial(case, "constant")
    x = trial.start(dtype)

    def keep(values):
        return torch.tensor(values).to(dtype).double().numpy()

    expected = trial.oracle(x)
    allowed = HALF_FACTOR * relative_errors(trial.oracle(x, keep), expected)
    errors = relative_errors(trial.ran(x, package_step(trial.table, dtype)), expected)
    assert (errors <= allowed).all(), np.stack([errors, allowed])


@pytest.mark.parametrize("make", [samplers.edm_euler, samplers.edm_heun], ids=["euler", "heun"])
@pytest.mark.parametrize("churn", [{}, CHURN, {**EDM_CHURN, "S_max": np.inf}, EDM_CHURN], ids=repr)
def test_first_churn_is_in_the_initial_latent(make, churn):
    table = make(schedule.KarrasSchedule(), 12, **churn)
    assert table.initial_sigma == pytest.approx(oracles.edm_initial_std(oracles.edm_sigmas(12), **churn), rel=1e-12)


@pytest.mark.parametrize("count", [20, 21, 23, 31, 50, 100, 250, 1000])
def test_adm_respacing(count):
    assert schedule.linear().timesteps(str(count)).tolist() == oracles.adm_timesteps(1000, count)[::-1].tolist()
