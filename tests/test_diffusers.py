"""The drop-in schedulers against diffusers' own, over whole trajectories.

Each case runs three loops on the same network: diffusers' scheduler in float64, diffusers' own, and ours. Claims, lambda = 1: our
error against the float64 run is no larger than diffusers' own, but for a few ulp; that of x_0, and of what a multistep solver
makes of its history of x_0, at most about twice as large: diffusers rounds sigma*f at the size of x/alpha, we both terms.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import sys

import diffusers
import numpy as np
import pytest
import torch

import epskernels
from epskernels import diffusers as fused

SHAPE = (2, 3, 5, 7)
FEW_ULP = 2e-7  # three units in the last place


# ---- diffusers in float64 ----


class Doubled:
    """torch, whose float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler, drawn):
    """Within, the scheduler's own step computes in float64 from the arrays that it has; `drawn` is the dtype of its noise."""
    module = sys.modules[type(scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Doubled())
        if hasattr(module, "randn_tensor"):
            draw = module.randn_tensor
            patch.setattr(module, "randn_tensor", lambda *a, dtype, **k: draw(*a, dtype=drawn, **k).double())
        for name, value in list(vars(scheduler).items()):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
                setattr(scheduler, name, value.double())
        yield


# ---- the loop ----


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """name: of the class. config, steps (of set_timesteps), call (of step): what a user passes."""

    name: str
    config: dict = dataclasses.field(default_factory=dict)
    steps: dict = dataclasses.field(default_factory=lambda: {"num_inference_steps": 12})
    call: dict = dataclasses.field(default_factory=dict)
    shape: tuple = SHAPE
    learned: bool = False
    generators: int = 0  # how many; 0: one for the batch
    own: str = ""  # why diffusers' own step runs
    begin: int = 0

    def theirs(self):
        return self._set(getattr(diffusers, self.name)(**self.config))

    def ours(self, eps_scaling=1.0):
        return self._set(getattr(fused, self.name)(**self.config, eps_scaling=eps_scaling))

    def _set(self, scheduler):
        if self.steps:
            scheduler.set_timesteps(**self.steps)
        if self.begin:
            scheduler.set_begin_index(self.begin)
        return scheduler


def network(case):
    """(x, i) -> f: a bounded, smooth denoiser of the state at step i, in what the scheduler takes for its prediction."""
    scheduler = case.ours()
    scheduler._plan(scheduler._options, torch.device("cpu"))
    alpha, d_x, d_f = np.broadcast_arrays(*scheduler._model(scheduler._options))
    sigma = -d_f * alpha
    phases = scheduler.timesteps.double().numpy() / max(1.0, float(scheduler.timesteps.abs().max()))

    def f(x, i):
        x0 = 1.2 * torch.tanh(0.8 * x / np.hypot(1, sigma[i] * (alpha[i] == 1)) + 0.3 * torch.sin(x.roll(1, -1)) + phases[i])
        out = (x0 - d_x[i] * x) / d_f[i] if d_f[i] and np.isfinite([d_x[i], d_f[i]]).all() else x0
        return torch.cat([out, 1.1 * torch.sin(1.7 * x + phases[i])], dim=1) if case.learned else out

    return f


def start(case, scheduler):
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (x * float(scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1)).float()


def generator(case):
    made = [torch.Generator().manual_seed(11 + k) for k in range(max(1, case.generators))]
    return made if case.generators else made[0]


def trajectory(case, scheduler, dtype, f, x=None, scale=lambda f, x, i: f):
    """[(x', the other result)] of every step, in float64."""
    call = dict(case.call)
    if "generator" in fused.inspect.signature(scheduler.step).parameters and not {"seeds", "variance_noise"} & set(call):
        call["generator"] = generator(case)
    call = {key: value(dtype) if callable(value) else value for key, value in call.items()}
    x, results = (start(case, scheduler) if x is None else x).to(dtype), []
    with torch.no_grad():
        for i, t in list(enumerate(scheduler.timesteps))[case.begin :]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            output = scale(f(x.double(), i), x.double(), i).to(dtype)
            x, *second = scheduler.step(output, t, x, return_dict=False, **call)
            results.append([x.double(), *[s.double() for s in second]])
    return results


def drawn_in(case):
    """The dtype of diffusers' noise in a float32 run."""
    return torch.float32


def errors(results, expected):
    """The largest relative error of the states, and of the other result."""
    pairs = zip(results, expected, strict=True)
    return np.array([[float((a - b).norm() / b.norm()) for a, b in zip(r, e, strict=True)] for r, e in pairs]).max(axis=0)


@functools.cache
def exact(case):
    f, scheduler = network(case), case.theirs()
    with in_float64(scheduler, drawn_in(case)):
        return trajectory(case, scheduler, torch.float64, f)


# ---- cases ----

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = {}


def add(name, **variants):
    for label, given in variants.items():
        CASES[f"{name}-{label}"] = Case(f"{name}Scheduler", **given)


def configs(**configs):
    return {label: {"config": config} for label, config in configs.items()}


PREDICTIONS = {kind: {"prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction")}
SPACINGS = {spacing: {"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")}
BETAS = {kind: {"beta_schedule": kind} for kind in ("linear", "scaled_linear", "squaredcos_cap_v2")}
SIGMAS = {kind: {f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")}

add("DDPM", **configs(**PREDICTIONS, **SPACINGS, **BETAS, sigmoid={"beta_schedule": "sigmoid"}))
add(
    "DDPM",
    **configs(
        unclipped={"clip_sample": False}, clip_2={"clip_sample_range": 2.0}, fixed_large={"variance_type": "fixed_large"},
        fixed_small_log={"variance_type": "fixed_small_log"},
        trained={"trained_betas": np.linspace(1e-3, 0.05, 50), "num_train_timesteps": 50},
        zero_snr={"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        offset={"steps_offset": 1},
    ),
    custom={"steps": {"timesteps": [900, 700, 300, 80, 10]}},
    not_set={"config": {"num_train_timesteps": 20}, "steps": {}},
    learned_range={"config": {"variance_type": "learned_range"}, "learned": True},
    generators={"generators": 2},
    one_dimension={"shape": (3, 4, 33)},
    video={"shape": (1, 2, 3, 4, 5)},
)  # fmt: skip
add("DDIM", **configs(**PREDICTIONS, **SPACINGS, **BETAS))
add(
    "DDIM",
    **configs(
        unclipped={"clip_sample": False}, clip_2={"clip_sample_range": 2.0}, first={"set_alpha_to_one": False},
        zero_snr={"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        stable={**VP, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    eta={"call": {"eta": 0.7}},
    eta_1_generators={"call": {"eta": 1.0}, "generators": 2},
    clipped_output={"call": {"use_clipped_model_output": True}},
    clipped_output_eta={"call": {"use_clipped_model_output": True, "eta": 0.5}, "config": {"prediction_type": "sample"}},
    clipped_output_v={"call": {"use_clipped_model_output": True}, "config": {"prediction_type": "v_prediction"}},
    variance_noise={"call": {"eta": 1.0, "variance_noise": lambda dtype: torch.ones(SHAPE, dtype=dtype)}},
)  # fmt: skip

V = {"prediction_type": "v_prediction"}
EULER = {
    **configs(**PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS),
    **configs(
        log_linear={"interpolation_type": "log_linear"}, sigma_min={"final_sigmas_type": "sigma_min"},
        continuous={**V, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True},
        zero_snr={**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, stable={**VP, "steps_offset": 1},
    ),
    "timesteps": {"steps": {"timesteps": [999, 700, 300, 80, 10]}},
    "sigmas": {"steps": {"sigmas": [14.0, 5.0, 1.0, 0.3, 0.0]}},
    "churn": {"call": {"s_churn": 3.0}},
    "churn_window": {"call": {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.003}, "generators": 2},
    "churn_v": {"config": V, "call": {"s_churn": 3.0}},
    "image_to_image": {"begin": 4},
}  # fmt: skip
add("EulerDiscrete", **EULER)
ANCESTRAL = {kind: config for kind, config in PREDICTIONS.items() if kind != "sample"} | SPACINGS | BETAS
add("EulerAncestralDiscrete", **configs(**ANCESTRAL))
add(
    "EulerAncestralDiscrete",
    zero_snr={"config": {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}},
    generators={"generators": 2},
)

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS = {
    f"{algorithm}-{solver}-{order}": {
        "algorithm_type": algorithm, "solver_type": solver, "solver_order": order,
        "final_sigmas_type": "zero" if algorithm.endswith("++") else "sigma_min",
    }
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    for solver in ("midpoint", "heun")
    for order in (1, 2, 3)
    if (algorithm, order) != ("sde-dpmsolver", 3)
}  # fmt: skip
add("DPMSolverMultistep", **configs(**SOLVERS, **PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "DPMSolverMultistep",
    **configs(
        lu={"use_lu_lambdas": True}, euler_at_final={"euler_at_final": True, "solver_order": 3},
        flow={**FLOW, "flow_shift": 3.0}, not_lower={"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        zero_snr={**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, stable={**VP, "steps_offset": 1},
        clipped_lambda={"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        sample_noise={"prediction_type": "sample", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        v_noise={**V, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    twenty={"steps": {"num_inference_steps": 20}, "config": {"solver_order": 3}},
    timesteps={"steps": {"timesteps": [999, 700, 300, 80, 10]}},
    dynamic={"config": {**FLOW, "use_dynamic_shifting": True}, "steps": {"num_inference_steps": 12, "mu": 0.8}},
    learned={"config": {"variance_type": "learned_range"}, "learned": True},
    variance_noise={
        "config": {"algorithm_type": "sde-dpmsolver++"},
        "call": {"variance_noise": lambda dtype: torch.ones(SHAPE, dtype=dtype)},
    },
    image_to_image={"begin": 5, "config": {"solver_order": 3}},
    generators={"generators": 2, "config": {"algorithm_type": "sde-dpmsolver++"}},
)  # fmt: skip
EDM_SOLVERS = {
    name: config
    for name, config in SOLVERS.items()
    if config["algorithm_type"].endswith("++") and (name[0], config["solver_order"]) != ("s", 3)
}
add("EDMDPMSolverMultistep", **configs(**EDM_SOLVERS, v=V, exponential={"sigma_schedule": "exponential"}))
add("EDMDPMSolverMultistep", sigma_min={"config": {"final_sigmas_type": "sigma_min", "solver_order": 3}}, begin={"begin": 3})
add("EDMEuler", **configs(epsilon={}, v=V, exponential={"sigma_schedule": "exponential"}))
add("EDMEuler", sigma_min={"config": {"final_sigmas_type": "sigma_min"}})
add("EDMEuler", churn={"call": {"s_churn": 5.0, "s_noise": 1.003}}, sigmas={"steps": {"sigmas": torch.linspace(0, 1, 7)}})

add("FlowMatchEulerDiscrete", **configs(plain={}, shift={"shift": 3.0}, **SIGMAS, terminal={"shift_terminal": 0.1}))
add(
    "FlowMatchEulerDiscrete",
    stochastic={"config": {"stochastic_sampling": True, "shift": 3.0}, "generators": 2},
    dynamic={"config": {"use_dynamic_shifting": True}, "steps": {"num_inference_steps": 12, "mu": 0.8}},
    linear={
        "config": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        "steps": {"num_inference_steps": 12, "mu": 0.8},
    },
    inverted={"config": {"invert_sigmas": True}},
    sigmas={"steps": {"sigmas": [1.0, 0.7, 0.2]}},
    begin={"begin": 3},
)


# ---- lambda = 1: diffusers' numbers ----


def allowed(case, theirs):
    """Of the states and of the other result, given diffusers' own errors."""
    factors = [2.0 if "Multistep" in case.name else 1.0, 2.5][: len(theirs)]
    return np.array(factors) * theirs + FEW_ULP


def as_said(case):
    return f"diffusers: {case.own}" if case.own else "fused"


every = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@every
def test_float32_is_as_close_as_diffusers(case):
    f, ours, expected = network(case), case.ours(), exact(case)
    theirs = errors(trajectory(case, case.theirs(), torch.float32, f), expected)
    found = errors(trajectory(case, ours, torch.float32, f), expected)
    assert ours.path == as_said(case)
    assert (found <= allowed(case, theirs)).all(), (found, theirs)


# ---- Epsilon Scaling ----


def textbook(case, scheduler, lam):
    """(f, x, i) -> the network's output once its eps is divided by lambda[i]: eps, x_0 and the output again, by definition."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or case.name in ("LCMScheduler", "TCDScheduler"):
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas.double()[:-1])
        alpha = alpha * torch.ones_like(sigma)
    else:
        sigma = sigmas.double()[:-1]
        alpha = 1 - sigma if "Flow" in case.name else torch.ones_like(sigma)
    data = getattr(scheduler.config, "sigma_data", None)
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    second = case.name == "HeunDiscreteScheduler"

    def scale(f, x, i):
        a, s = float(alpha[i]), float(sigma[i])
        lambda_t = lam[i // 2] if second else lam[i]
        if lambda_t == 1:
            return f
        f, v = (f[:, : x.shape[1]], f[:, x.shape[1] :]) if case.learned else (f, None)
        if data is not None:  # x = x_0 + sigma*eps, preconditioned
            skip, out = data**2 / (s**2 + data**2), s * data / np.hypot(s, data) * (1 if kind == "epsilon" else -1)
            denoised = skip * x + out * f
            denoised = x - s * ((x - denoised) / s / lambda_t)
            return (denoised - skip * x) / out
        if kind == "epsilon":
            new = f / lambda_t
        elif kind == "sample":
            new = (x - s * ((x - a * f) / s / lambda_t)) / a
        elif kind == "v_prediction":
            c = 1 / np.hypot(a, s)  # the network sees a unit path
            eps = (s * c * c * x + a * c * f) / (c * c * (a * a + s * s)) / lambda_t
            x0 = (x - s * eps) / a
            new = a * c * eps - s * c * x0
        else:
            eps = (x + (1 - s) * f) / lambda_t
            new = eps - (x - s * eps) / (1 - s)
        return new if v is None else torch.cat([new, v], dim=1)

    return scale


SCALINGS = {
    "constant": lambda n: (1.017, np.full(n, 1.017)),
    "linear": lambda n: ({"k": 0.0025, "b": 1.0}, 1.0 + 0.0025 * np.arange(n)[::-1]),
    "noisiest": lambda n: ({"k": 0.002, "b": 0.985, "origin": "noisiest"}, 0.985 + 0.002 * np.arange(n)),
    "array": lambda n: ((1 + 0.001 * np.arange(n)).tolist(), 1 + 0.001 * np.arange(n)),
}
SCALED = [
    name
    for name in CASES
    if name.split("-", 1)[1] in (
        "epsilon", "sample", "v_prediction", "v", "learned_range", "eta", "clipped_output_eta", "karras",
        "flow", "stochastic", "shift", "dpmsolver-midpoint-2", "dpmsolver++-midpoint-3", "sde-dpmsolver++-heun-2", "unclipped",
        "image_to_image", "own", "clipped", "plain", "bh1-3", "bh2-2", "eps-bh2-3",
    )
]  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("kind", SCALINGS)
def test_lambda_is_the_textbook(name, kind):
    case = CASES[name]
    f, scheduler = network(case), case.theirs()
    steps = (len(scheduler.timesteps) + 1) // 2 if "Heun" in case.name else len(scheduler.timesteps)
    chosen, lam = SCALINGS[kind](steps)
    if "Flow" in case.name:
        lam[0] = 1.0  # alpha is 0
        chosen = lam.tolist() if kind == "array" else chosen
    scale = textbook(case, scheduler, lam)
    with in_float64(scheduler, drawn_in(case)):
        expected = trajectory(case, scheduler, torch.float64, f, scale=scale)
    theirs = errors(trajectory(case, case.theirs(), torch.float32, f, scale=scale), expected)
    ours = case.ours(chosen)
    found = errors(trajectory(case, ours, torch.float32, f), expected)
    assert (found <= allowed(case, theirs)).all(), (found, theirs)
    unscaled = errors(trajectory(case, case.ours(), torch.float32, f), expected)
    assert (unscaled > 100 * found).all(), "lambda changed nothing"


@pytest.mark.parametrize("name", ["EDMEuler-churn", "EDMEuler-v", "EulerDiscrete-churn"])
def test_lambda_under_churn(name):
    """eps is that of the state that churn raised: denoised' = x - (x - denoised)/lambda there."""
    case = CASES[name]
    f, lam = network(case), 1.017

    def scaled(scheduler):
        if case.name == "EDMEulerScheduler":
            plain = scheduler.precondition_outputs
            scheduler.precondition_outputs = lambda x, f, sigma: x - (x - plain(x, f, sigma)) / lam
        return scheduler

    scale = (lambda f, x, i: f / lam) if case.name == "EulerDiscreteScheduler" else (lambda f, x, i: f)
    scheduler = scaled(case.theirs())
    with in_float64(scheduler, torch.float32):
        expected = trajectory(case, scheduler, torch.float64, f, scale=scale)
    theirs = errors(trajectory(case, scaled(case.theirs()), torch.float32, f, scale=scale), expected)
    found = errors(trajectory(case, case.ours(lam), torch.float32, f), expected)
    assert (found <= allowed(case, theirs)).all(), (found, theirs)
