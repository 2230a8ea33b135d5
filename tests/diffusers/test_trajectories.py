"""The drop-in schedulers against diffusers' own, over whole trajectories.

Each case runs three loops on the same network: diffusers' scheduler in float64, diffusers' own, and ours. Claims, lambda = 1: our
error against the float64 run is no larger than diffusers' own, but for a few ulp; that of x_0, and of what a multistep solver
makes of its history of x_0, at most about twice as large: diffusers rounds sigma*f at the size of x/alpha, we both terms.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import inspect
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import is_torchsde_available

import epskernels
from epskernels import diffusers as fused
from epskernels.diffusers import common

from ..support import markdown_examples
from ..support.schedulers import ALIKE, CONFIGS, OF_MOTIONS, times

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers of itself: its deprecated solvers, its numpy arrays of tensors
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]
SHAPE = (2, 3, 5, 7)
FEW_ULP = 3e-7  # five units in the last place


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
            patch.setattr(module, "randn_tensor", lambda *a, dtype=None, **k: draw(*a, dtype=drawn, **k).double())
        if hasattr(module, "BrownianTreeNoiseSampler"):
            sampler = module.BrownianTreeNoiseSampler

            def motion(x, *args, **kwargs):
                made = sampler(x.to(drawn), *args, **kwargs)
                return lambda *at: made(*at).double()

            patch.setattr(module, "BrownianTreeNoiseSampler", motion)
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
    each: object = None  # (scheduler, i) -> arguments of step i
    begin: int = 0
    calls: int | None = None  # of the model, where there are more timesteps

    def theirs(self):
        return self._set(getattr(diffusers.schedulers, self.name)(**self.config))

    def ours(self, eps_scaling=1.0):
        return self._set(getattr(fused, self.name)(**self.config, eps_scaling=eps_scaling))

    def _set(self, scheduler):
        if self.steps:
            scheduler.set_timesteps(**self.steps)
        if self.begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        return scheduler


def network(case):
    """(x, i) -> f: a bounded, smooth denoiser of the state at step i, in what the scheduler takes for its prediction."""
    scheduler = case.ours()
    scheduler._plan(scheduler._options, torch.device("cpu"))
    with np.errstate(divide="ignore"):
        alpha, _, d_x, d_f = np.broadcast_arrays(*scheduler._model(scheduler._options))
    sigma = -d_f * alpha
    phases = scheduler.timesteps.double().numpy() / max(1.0, float(scheduler.timesteps.abs().max()))

    def f(x, i):
        x0 = 1.2 * torch.tanh(
            0.8 * x / np.hypot(1, sigma[i] * (alpha[i] == 1)) + 0.3 * torch.sin(x.roll(1, -1)) + phases[i]
        )
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
    if "generator" in inspect.signature(scheduler.step).parameters and not {"seeds", "variance_noise"} & set(call):
        call["generator"] = generator(case)
    call = {key: value(dtype) if callable(value) else value for key, value in call.items()}
    x, results = (start(case, scheduler) if x is None else x).to(dtype), []
    with torch.no_grad():
        for i, t in list(enumerate(scheduler.timesteps))[case.begin : case.calls]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            output = scale(f(x.double(), i), x.double(), i).to(dtype)
            more = case.each(scheduler, i) if case.each else {}
            x, *second = scheduler.step(output, t, x, return_dict=False, **call, **more)
            if case.name == "HeliosScheduler":  # whose last_sample is another
                second = []
            results.append([x.double(), *[s.double() for s in second]])
    return results


def drawn_in(case):
    """The dtype of diffusers' noise in a float32 run."""
    return torch.float32


def errors(results, expected):
    """The largest relative error of the states, and of the other result."""
    pairs = zip(results, expected, strict=True)
    return np.array([[float((a - b).norm() / b.norm()) for a, b in zip(r, e, strict=True)] for r, e in pairs]).max(
        axis=0
    )


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
TRAILING_ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
for name in ("DDPMParallel", "DDIMParallel"):
    add(
        name,
        **configs(
            **PREDICTIONS, trailing=SPACINGS["trailing"], unclipped={"clip_sample": False}, zero_snr=TRAILING_ZERO_SNR
        ),
    )
add(
    "DDPMParallel",
    learned_range={"config": {"variance_type": "learned_range"}, "learned": True},
    custom={"steps": {"timesteps": [900, 700, 300, 80, 10]}},
)
add(
    "DDIMParallel",
    eta={"call": {"eta": 0.7}},
    clipped_output_eta={"call": {"use_clipped_model_output": True, "eta": 0.5}},
)
add("DDIMInverse", **configs(epsilon={}, v_prediction=V, trailing=SPACINGS["trailing"], **BETAS))
add(
    "DDIMInverse",
    **configs(
        sample={"prediction_type": "sample", "set_alpha_to_one": False}, unclipped={"clip_sample": False},
        stable={**VP, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, zero_snr=TRAILING_ZERO_SNR,
    ),
)  # fmt: skip


def next_timestep(scheduler, i):
    return {"prev_timestep": scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else None}


add("UnCLIP", **configs(epsilon={}, sample=PREDICTIONS["sample"], clip_2={"clip_sample_range": 2.0}))
add(
    "UnCLIP",
    next={"each": next_timestep, "generators": 2},
    image_to_image={"config": {"clip_sample": False}, "each": next_timestep, "begin": 3},
    learned_range={"config": {"variance_type": "learned_range"}, "learned": True, "each": next_timestep, "begin": 3},
)
add(
    "CogVideoXDDIM",
    **configs(**PREDICTIONS, **SPACINGS, **BETAS, zero_snr=TRAILING_ZERO_SNR, first={"set_alpha_to_one": False}),
)

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
add(
    "EDMDPMSolverMultistep",
    sigma_min={"config": {"final_sigmas_type": "sigma_min", "solver_order": 3}},
    begin={"begin": 3},
)
add("EDMEuler", **configs(epsilon={}, v=V, exponential={"sigma_schedule": "exponential"}))
add("EDMEuler", sigma_min={"config": {"final_sigmas_type": "sigma_min"}})
add(
    "EDMEuler",
    churn={"call": {"s_churn": 5.0, "s_noise": 1.003}},
    sigmas={"steps": {"sigmas": torch.linspace(0, 1, 7)}},
)

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


add("HeunDiscrete", **configs(**PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "HeunDiscrete",
    clipped={"config": {"clip_sample": True, "use_karras_sigmas": True}},
    exp={"config": {"beta_schedule": "exp"}},
    timesteps={"steps": {"timesteps": [999, 700, 300, 80, 10]}},
    begin={"begin": 4},
)

for name in ("KDPM2Discrete", "KDPM2AncestralDiscrete"):
    quick = CONFIGS[f"{name}Scheduler"]
    kinds = {**ANCESTRAL, **SIGMAS, "offset": {"timestep_spacing": "leading", "steps_offset": 1}}
    add(name, **configs(**{kind: {**quick, **config} for kind, config in kinds.items()}))
    add(
        name,
        generators={"config": quick, "generators": 2 * int("Ancestral" in name)},
        begin={"config": quick, "begin": 4},
    )
    add(name, one={"config": quick, "steps": {"num_inference_steps": 1}})

UNIPC = {
    f"{'' if predict_x0 else 'eps-'}{solver}-{order}": {
        "solver_type": solver, "solver_order": order, "predict_x0": predict_x0,
        # diffusers' bh1 is NaN where a step ends at sigma = 0
        "final_sigmas_type": "zero" if (solver, predict_x0) == ("bh2", True) else "sigma_min",
    }
    for predict_x0 in (True, False)
    for solver in ("bh1", "bh2")
    for order in (1, 2, 3)
}  # fmt: skip
add("UniPCMultistep", **configs(**UNIPC, **PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "UniPCMultistep",
    **configs(
        disable_corrector={"disable_corrector": [0, 3, 4], "solver_order": 3}, flow={**FLOW, "flow_shift": 3.0},
        not_lower={"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3},
        zero_snr={**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, stable={**VP, "steps_offset": 1},
        v_eps={**V, "predict_x0": False, "final_sigmas_type": "sigma_min"},
        sample_eps={"prediction_type": "sample", "predict_x0": False, "final_sigmas_type": "sigma_min"},
    ),
    dynamic={"config": {**FLOW, "use_dynamic_shifting": True}, "steps": {"num_inference_steps": 12, "mu": 0.8}},
    terminal={"config": {**FLOW, "shift_terminal": 0.02}},
    sigmas={"config": FLOW, "steps": {"sigmas": np.array([0.9, 0.6, 0.3, 0.1])}},
    twenty={"steps": {"num_inference_steps": 20}, "config": {"solver_order": 3}},
    image_to_image={"begin": 5, "config": {"solver_order": 3}},
    solver_p={"config": {"solver_p": diffusers.DDIMScheduler()}, "own": "solver_p is another scheduler's step"},
)  # fmt: skip

FOUR = {"num_inference_steps": 4}
for consistency in ("LCM", "TCD"):
    add(
        consistency,
        **{kind: {"config": config, "steps": FOUR} for kind, config in PREDICTIONS.items()},
        clipped={"config": {"clip_sample": True}, "steps": FOUR},
        custom={"steps": {"timesteps": [999, 759, 499, 259]}},
        zero_snr={"config": {**V, "rescale_betas_zero_snr": True}, "steps": FOUR},
        generators={"generators": 2, "steps": FOUR},
        strength={"steps": {"num_inference_steps": 4, "strength": 0.6}},
        one={"steps": {"num_inference_steps": 1}},
    )
add("TCD", deterministic={"call": {"eta": 0.0}, "steps": FOUR}, all_noise={"call": {"eta": 1.0}, "steps": FOUR})
add("LCM", timestep_scaling={"config": {"timestep_scaling": 1.0}, "steps": FOUR})

PNDM = {"skip_prk_steps": True}
add(
    "PNDM",
    **configs(
        epsilon=PNDM, v_prediction={**PNDM, **V}, prk={}, prk_v=V, **{k: {**PNDM, **v} for k, v in SPACINGS.items()}
    ),
)
add(
    "PNDM",
    **configs(**{k: {**PNDM, **v} for k, v in BETAS.items()}, stable_diffusion={**PNDM, **VP, "steps_offset": 1}),
    alpha_to_one={"config": {**PNDM, "set_alpha_to_one": True}}, one={"config": PNDM, "steps": {"num_inference_steps": 1}},
    two={"config": PNDM, "steps": {"num_inference_steps": 2}}, prk_trailing={"config": {"timestep_spacing": "trailing"}},
    begun_later={"config": PNDM, "begin": 5}, odd={"config": {}, "steps": {"num_inference_steps": 7}},
)  # fmt: skip
add("LMSDiscrete", **configs(**PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "LMSDiscrete",
    order_1={"call": {"order": 1}}, order_2={"call": {"order": 2}}, order_3={"call": {"order": 3}}, image_to_image={"begin": 4},
    order_5={"call": {"order": 5}, "own": "order 5 is not one of 1 to 4"},
)  # fmt: skip
add("IPNDM", plain={}, few={"steps": {"num_inference_steps": 3}}, many={"steps": {"num_inference_steps": 40}})
add(
    "IPNDM",
    trained={"config": {"trained_betas": np.cos(np.linspace(0.1, 1.5, 13)).tolist()}},
    image_to_image={"begin": 4},
)
add("DEISMultistep", **configs(**PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "DEISMultistep",
    **configs(
        order_1={"solver_order": 1}, order_3={"solver_order": 3}, unfinished={"solver_order": 3, "lower_order_final": False},
        flow={**FLOW, "use_flow_sigmas": True}, stable_diffusion={**VP, "steps_offset": 1},
    ),
    many={"config": {"solver_order": 3}, "steps": {"num_inference_steps": 20}}, image_to_image={"begin": 4},
)  # fmt: skip

SINGLE = {
    f"{algorithm}-{solver}-{order}": {
        "algorithm_type": algorithm, "solver_type": solver, "solver_order": order,
        "final_sigmas_type": "sigma_min" if algorithm == "dpmsolver" else "zero",
    }
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")
    for solver in ("midpoint", "heun") for order in (1, 2, 3)
    if (algorithm, solver, order) != ("sde-dpmsolver++", "heun", 3)
}  # fmt: skip
add("DPMSolverSinglestep", **configs(**SINGLE, **PREDICTIONS, **BETAS, **SIGMAS))
add(
    "DPMSolverSinglestep",
    **configs(flow={**FLOW, "use_flow_sigmas": True}, unfinished={"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    many={"config": {"solver_order": 3}, "steps": {"num_inference_steps": 20}}, image_to_image={"begin": 4},
    custom={"steps": {"timesteps": [900, 700, 300, 80, 10]}},
    third_order_sde={
        "config": SINGLE["sde-dpmsolver++-midpoint-3"] | {"solver_type": "heun"},
        "own": "diffusers' third order of sde-dpmsolver++ with heun",
    },
)  # fmt: skip
SA = {
    f"{algorithm}-{predictor}-{corrector}": {
        "algorithm_type": f"{algorithm}_prediction", "predictor_order": predictor, "corrector_order": corrector
    }
    for algorithm in ("data", "noise") for predictor, corrector in ((1, 1), (2, 2), (1, 4), (2, 3), (3, 4))
}  # fmt: skip
add("SASolver", **configs(**SA, **PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add(
    "SASolver",
    **configs(
        half={"tau_func": lambda t: 0.5}, silent={"tau_func": lambda t: 0},
        loud={"tau_func": lambda t: t / 500, **SA["noise-3-4"]},
        flow={**FLOW, "flow_shift": 3.0}, unfinished={**SA["data-3-4"], "lower_order_final": False},
        v_noise={**V, **SA["noise-2-2"]}, sample_noise={**PREDICTIONS["sample"], **SA["noise-2-2"]},
    ),
    many={"config": SA["data-3-4"], "steps": {"num_inference_steps": 20}}, image_to_image={"begin": 4},
    generators={"generators": 2},
    fourth={"config": {"predictor_order": 4}, "own": "orders 4 and 2 are not within 3 and 4"},
)  # fmt: skip
INVERSE = {
    name: {key: value for key, value in config.items() if key != "final_sigmas_type"}
    for name, config in SINGLE.items()
    if not name.startswith("sde")  # whose noise would have a negative variance
}
add("DPMSolverMultistepInverse", **configs(**INVERSE, **PREDICTIONS, **SPACINGS, **BETAS, **SIGMAS))
add("DPMSolverMultistepInverse", many={"config": {"solver_order": 3}, "steps": {"num_inference_steps": 20}})
add("FlowMatchHeunDiscrete", **configs(plain={}, shift={"shift": 3.0}))
add(
    "FlowMatchHeunDiscrete",
    churn={"call": {"s_churn": 3.0}}, one={"steps": {"num_inference_steps": 1}},
    churn_window={"call": {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 0.9, "s_noise": 1.003}, "generators": 2}, begin={"begin": 4},
)  # fmt: skip
DYNAMIC = {"config": {"use_dynamic_shifting": True}, "steps": {"num_inference_steps": 12, "mu": 0.8}}
add("FlowMatchLCM", **configs(plain={}, shift={"shift": 3.0}, **SIGMAS, terminal={"shift_terminal": 0.1}))
add(
    "FlowMatchLCM",
    inverted={"config": {"invert_sigmas": True}},
    dynamic=DYNAMIC,
    begin={"begin": 3},
    generators={"generators": 2},
)
add(
    "FlowMatchLCM",
    timesteps={"steps": {"timesteps": [1000.0, 700.0, 300.0]}},
    sigmas={"steps": {"sigmas": [1.0, 0.7, 0.2]}},
)
add("FlowMapEulerDiscrete", **configs(plain={}, shift={"shift": 5.0}))
add("FlowMapEulerDiscrete", timesteps={"steps": {"timesteps": [1000.0, 700.0, 300.0]}}, begin={"begin": 3})
add(
    "LTXEulerAncestralRF",
    **configs(plain={}, eta={"eta": 0.5}, euler={"eta": 0.0}, silent={"s_noise": 0.0}, loud={"s_noise": 1.1}),
)
add(
    "LTXEulerAncestralRF",
    sigmas={"steps": {"sigmas": [1.0, 0.9, 0.5, 0.2, 0.0]}, "calls": 4}, begin={"begin": 3}, generators={"generators": 2},
    unfinished={"steps": {"sigmas": [0.9, 0.5, 0.2]}, "calls": 2},
)  # fmt: skip
add("MiniMaxH3", **configs(plain={}, shift={"shift": 3.0}))
add("MiniMaxH3", sigmas={"steps": {"sigmas": [0.99, 0.5, 0.1, 0.0]}}, begin={"begin": 3})
ANGLES = {"num_inference_steps": 6, "intermediate_timesteps": None}
add("SCM", plain={"steps": ANGLES, "calls": 6}, two={"steps": {"num_inference_steps": 2}, "calls": 2})
add("SCM", data={"config": {"sigma_data": 0.8}, "steps": ANGLES, "calls": 6, "generators": 2})
add(
    "SCM",
    timesteps={"steps": {"num_inference_steps": 2, "timesteps": [1.5, 0.7, 0.1], "max_timesteps": None}, "calls": 2},
)
add("SCM", begin={"steps": ANGLES, "calls": 6, "begin": 3})
add("CMStochasticIterative", **configs(plain={}, unclipped={"clip_denoised": False}, loud={"s_noise": 1.1, "rho": 5.0}))
add(
    "CMStochasticIterative",
    timesteps={"steps": {"timesteps": [22, 10, 0]}}, one={"steps": {"num_inference_steps": 1}}, generators={"generators": 2},
    all={"steps": {"num_inference_steps": 40}}, begin={"begin": 3},
)  # fmt: skip
add("ConsistencyDecoder", plain={"steps": {"num_inference_steps": 2}})
add("ConsistencyDecoder", data={"steps": {"num_inference_steps": 2}, "config": {"sigma_data": 1.0}, "generators": 2})

STAGE = {"num_inference_steps": 12, "stage_index": 1}
for kind, config in {
    "plain": {},
    "three": {"solver_order": 3},
    "one": {"solver_order": 1},
    "bh1": {"solver_type": "bh1"},
}.items():
    add("Helios", **{kind: {"config": config, "steps": STAGE}})
add(
    "Helios",
    euler={"config": {"scheduler_type": "euler"}, "steps": STAGE},
    whole={"config": {"stages": 1, "stage_range": [0, 1]}, "steps": {"num_inference_steps": 12}},
    shift={"config": {"stages": 1, "stage_range": [0, 1], "shift": 3.0}, "steps": {"num_inference_steps": 12}},
    dynamic={"config": {"use_dynamic_shifting": True}, "steps": {**STAGE, "mu": 0.8}},
    disable_corrector={"config": {"disable_corrector": [0, 3]}, "steps": STAGE},
    v_prediction={"config": {**V, "use_flow_sigmas": False}, "steps": STAGE},
    not_lower={"config": {"lower_order_final": False}, "steps": STAGE},
)

if is_torchsde_available():
    add(
        "CosineDPMSolverMultistep", **configs(v=V, epsilon={"prediction_type": "epsilon"}, heun={"solver_type": "heun"})
    )
    add("CosineDPMSolverMultistep", **configs(order_1={"solver_order": 1}, karras={"sigma_schedule": "karras"}))
    add(
        "CosineDPMSolverMultistep",
        generators={"generators": 2},
        begin={"begin": 3},
        many={"steps": {"num_inference_steps": 20}},
    )

THRESHOLD = {"thresholding": True, "sample_max_value": 1.1, "dynamic_thresholding_ratio": 0.9}
for name in (
    "DDPM",
    "DDIM",
    "DDPMParallel",
    "DDIMParallel",
    "DPMSolverMultistep",
    "EDMDPMSolverMultistep",
    "LCM",
    "UniPCMultistep",
    "DEISMultistep",
    "DPMSolverSinglestep",
    "SASolver",
):
    add(name, thresholding={"config": THRESHOLD, "steps": FOUR if name == "LCM" else {"num_inference_steps": 12}})
add(
    "DPMSolverMultistep",
    threshold_eps={
        "config": {**THRESHOLD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "own": "dynamic thresholding of a solver that integrates eps",
    },
)


def one_of_each_class(names, values, always):
    """(value, name) of all, marked deep unless the value is among `always`, or the case the first of its class."""
    first = {CASES[name].name: name for name in reversed(names)}.values()
    return [
        pytest.param(value, name, marks=[] if value in always or name in first else pytest.mark.deep, id=f"{key}-{name}")
        for key, value in values.items() for name in names
    ]  # fmt: skip


# ---- lambda = 1: diffusers' numbers ----


def allowed(case, theirs):
    """Of the states and of the other result, given diffusers' own errors: both are draws, and other ones on another processor,
    whose tanh and sin differ."""
    several = any(kind in case.name for kind in ("Multistep", "PNDM", "Helios", "SASolver"))
    states = 2.5 if case.name == "UnCLIPScheduler" else 2.0 if several else 1.25  # UnCLIP: alpha 5e-5 at its start
    factors = [states, 2.5][: len(theirs)]
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

TWO_CALLS = "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"


def step_of(case, i):
    """Of which step call i is."""
    if "HeunDiscrete" in case.name or case.name.startswith("KDPM2"):
        return i // 2
    if case.name == "PNDMScheduler":
        if case.config.get("skip_prk_steps"):
            return i if i < 2 else i - 1
        return (i + 1) // 4 if i < 12 else i - 9
    return i


FLOWS = ("Flow", "LTX", "MiniMax")


def textbook(case, scheduler, lam):
    """(f, x, i) -> the network's output once its eps is divided by lambda[i]: eps, x_0 and the output again, by definition."""
    sigmas = getattr(scheduler, "sigmas", None)
    if case.name == "DPMSolverMultistepInverseScheduler":
        lam = lam[::-1]  # its last step is the noisiest
    if case.name == "IPNDMScheduler":
        alpha, sigma = scheduler.alphas.double(), scheduler.betas.double()
    elif case.name == "SCMScheduler":
        alpha, sigma = scheduler.timesteps.double().cos(), scheduler.timesteps.double().sin()
    elif case.name == "ConsistencyDecoderScheduler":
        alpha = scheduler.sqrt_alphas_cumprod.double()[scheduler.timesteps]
        sigma = (1 - alpha**2).sqrt()
    elif sigmas is None or case.name in ("LCMScheduler", "TCDScheduler"):
        t = scheduler.timesteps
        if case.name == "DDIMInverseScheduler":  # the level below, and the last number of lambda first
            t, lam = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps, lam[::-1]
        abar = scheduler.alphas_cumprod.double()[t.clamp(0, scheduler.config.num_train_timesteps - 1)]
        abar = torch.where(t < 0, float(getattr(scheduler, "initial_alpha_cumprod", 1)), abar)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas.double()[:-1])
        alpha = alpha * torch.ones_like(sigma)
    elif case.name.startswith("KDPM2"):
        i = torch.arange(len(scheduler.timesteps))
        second = scheduler.sigmas_interpol[i - int("Ancestral" in case.name)]
        sigma = torch.where(i % 2 == 1, second, sigmas[i]).double()
        alpha = torch.ones_like(sigma)
    else:
        sigma = sigmas.double()[:-1]
        alpha = 1 - sigma if case.name.startswith(FLOWS) else torch.ones_like(sigma)
    data = getattr(scheduler.config, "sigma_data", None)
    default = "v_prediction" if case.name == "IPNDMScheduler" else "flow_prediction"
    kind = getattr(scheduler.config, "prediction_type", default)
    as_x0 = {  # (c_skip, c_out) of x_0 = c_skip*x + c_out*f
        "SCMScheduler": lambda a, s, i: (a, -s), "MiniMaxH3Scheduler": lambda a, s, i: (1.0, s),
        "CMStochasticIterativeScheduler": lambda a, s, i: [
            float(c) for c in scheduler.get_scalings_for_boundary_condition(scheduler.sigmas.double()[i])
        ],
        "ConsistencyDecoderScheduler": lambda a, s, i: [
            float(c.double()[scheduler.timesteps[i]]) for c in (scheduler.c_skip, scheduler.c_out)
        ],
    }  # fmt: skip

    def scale(f, x, i):
        a, s = float(alpha[i]), float(sigma[i])
        lambda_t = lam[step_of(case, i)]
        if lambda_t == 1:
            return f
        f, v = (f[:, : x.shape[1]], f[:, x.shape[1] :]) if case.learned else (f, None)
        if case.name in as_x0:
            skip, out = as_x0[case.name](a, s, i)
            eps = (x - a * (skip * x + out * f)) / s / lambda_t
            return ((x - s * eps) / a - skip * x) / out
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
        "image_to_image", "own", "clipped", "plain", "prk", "prk_v", "order_3", "bh1-3", "bh2-2", "eps-bh2-3",
    )
    and name != "UnCLIP-epsilon"  # its start hides lambda
]  # fmt: skip


@pytest.mark.parametrize("kind, name", one_of_each_class(SCALED, {kind: kind for kind in SCALINGS}, ("linear",)))
def test_lambda_is_the_textbook(name, kind):
    case = CASES[name]
    f, scheduler = network(case), case.theirs()
    chosen, lam = SCALINGS[kind](step_of(case, len(times(scheduler)) - 1) + 1)
    flow = case.config.get("use_flow_sigmas", "Helios" in case.name)
    if flow or name == "UnCLIP-sample" or case.name.startswith((*FLOWS, "SCM", "IPNDM")):
        lam[0] = 1.0  # x is noise alone
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


# ---- half precision ----


DRAWN_IN_FLOAT32 = (
    "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler",
    "SCMScheduler",
)  # fmt: skip


def in_step(case, dtype):
    """Errors of the float64 step rounded once, of diffusers' step, and of ours, all given the same rounded states and outputs."""
    f, exact, theirs, ours = network(case), case.theirs(), case.theirs(), case.ours()
    x, runs = start(case, exact).to(dtype), (exact, theirs, ours)
    taken = inspect.signature(ours.step).parameters
    calls = [dict(case.call, **({"generator": generator(case)} if "generator" in taken else {})) for _ in runs]
    for call, kind in zip(calls, (torch.float64, dtype, dtype), strict=True):
        if "variance_noise" in call:
            call["variance_noise"], call["generator"] = call["variance_noise"](kind), None
    drawn = torch.float32 if case.name in DRAWN_IN_FLOAT32 else dtype
    squares = np.zeros(3)
    for i, t in list(enumerate(ours.timesteps))[case.begin : case.calls]:
        output = f(x.double(), i).to(dtype)
        for scheduler in runs:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
        more = [case.each(scheduler, i) if case.each else {} for scheduler in runs]
        with in_float64(exact, drawn):
            expected = exact.step(output.double(), t, x.double(), return_dict=False, **calls[0], **more[0])[0]
        for k in (1, 2):
            result = runs[k].step(output, t, x, return_dict=False, **calls[k], **more[k])[0]
            assert result.dtype == (torch.float32 if case.name == "SCMScheduler" else dtype)  # as its noise
            squares[k] += float((result.double() - expected).square().sum() / expected.square().sum())
        x = expected.to(dtype)
        squares[0] += float((x.double() - expected).square().sum() / expected.square().sum())
    assert ours.path == as_said(case)
    return np.sqrt(squares)


ROUNDS_MIDWAY = (
    "DDPM",
    "DDIM",
    "UnCLIP",
    "Heun",
    "EDMDPM",
    "LCM",
    "TCD",
    "UniPC",
)  # the others of diffusers compute in float32
# m1, m2 and y, rounded where the state is
STORES_HISTORY = (
    "DPMSolver",
    "EDMDPM",
    "UniPC",
    "Heun",
    "Helios",
    "Cosine",
    "PNDM",
    "LMS",
    "IPNDM",
    "DEIS",
    "SASolver",
)


@pytest.mark.parametrize(
    "dtype, name",
    one_of_each_class(list(CASES), {"bfloat16": torch.bfloat16, "float16": torch.float16}, ()),
)
def test_half_precision_rounds_once(name, dtype):
    case = CASES[name]
    once, theirs, ours = in_step(case, dtype)
    if case.own:
        assert ours == theirs
        return
    if not case.name.startswith(STORES_HISTORY):
        assert ours <= 1.02 * once, (ours, once)
    if np.isnan(theirs):  # of consistency models in float16, where a step begins at sigma_min
        return
    assert ours <= theirs * (0.8 if case.name.startswith(ROUNDS_MIDWAY) and dtype == torch.bfloat16 else 1.02), (
        ours,
        theirs,
    )


# ---- what a user does with a scheduler ----

CLASSES = {name: twin for name, twin in ALIKE.items() if name != "DPMSolverSDEScheduler"}  # test_other_calls.py has it
EXAMPLES = {name: next(case for case in CASES.values() if case.name == name) for name in CLASSES}
classes = pytest.mark.parametrize("name", EXAMPLES)


def one_step(scheduler, i=0, dtype=torch.float32, **call):
    """(x', ...) of step i on random tensors."""
    x, f = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    with torch.no_grad():
        for t in times(scheduler)[: i + 1]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            result = scheduler.step(f, t, x, return_dict=False, **call)
    return result


@classes
def test_configurations_go_both_ways(name, tmp_path, caplog):
    theirs = EXAMPLES[name].theirs()
    ours = CLASSES[name].from_config(theirs.config, eps_scaling=1.01)
    assert ours.config.eps_scaling == 1.01
    plain = {key: value for key, value in ours.config.items() if key not in (*common.OURS, "_use_default_values")}
    again = type(theirs).from_config(theirs.config).config  # diffusers leaves out what was a default before it changed
    assert plain == {key: value for key, value in again.items() if key != "_use_default_values"}
    assert type(theirs).from_config(ours.config).config.items() >= plain.items()
    assert ours.compatibles == theirs.compatibles
    for scaling in (1.01, {"k": 0.001, "b": 1.0}, [1.01] * 12, "ADM/CIFAR-10/20"):
        saved = CLASSES[name].from_config(theirs.config, eps_scaling=scaling)
        saved.save_pretrained(tmp_path)
        assert CLASSES[name].from_pretrained(tmp_path).config.eps_scaling == scaling
        assert type(theirs).from_pretrained(tmp_path).config.items() >= plain.items()
    caplog.clear()
    type(theirs).from_config(CLASSES[name]().config)
    assert not caplog.records, "a default eps_scaling or correction makes diffusers warn"


def test_compatible_classes_exchange_configurations():
    ours = fused.EulerDiscreteScheduler(**VP, eps_scaling=1.01)
    other = fused.DPMSolverMultistepScheduler.from_config(ours.config)
    assert other.config.eps_scaling == 1.01 and other.config.beta_end == 0.012
    assert diffusers.DDIMScheduler.from_config(other.config).config.beta_end == 0.012


@classes
def test_results_are_diffusers_own_objects(name):
    case = EXAMPLES[name]
    runs = []
    for scheduler in (case.theirs(), case.ours()):
        x, t = torch.ones(SHAPE), scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            torch.testing.assert_close(scheduler.scale_model_input(x, t), case.theirs().scale_model_input(x, t))
        runs.append(scheduler.step(torch.ones(SHAPE), t, x))
    assert type(runs[0]) is type(runs[1]) and list(runs[0]) == list(runs[1])
    assert all(value is not None for value in runs[1].values())


@classes
def test_signatures_are_diffusers_own(name):
    """Pipelines look at them: nothing is missing, nothing has moved, and what is new has a name and a default."""
    classes = getattr(diffusers.schedulers, name), CLASSES[name]
    for functions in (classes, [of.step for of in classes], [of.set_timesteps for of in classes]):
        theirs, ours = (dict(inspect.signature(function).parameters) for function in functions)
        if (last := list(theirs)[-1]) == "kwargs":
            assert theirs.pop(last).kind is ours.pop(last).kind
        assert list(ours)[: len(theirs)] == list(theirs)
        assert {key: p.default for key, p in ours.items() if key in theirs} == {
            key: p.default for key, p in theirs.items()
        }
        new = [ours[key] for key in list(ours)[len(theirs) :]]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in new)


@classes
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided batch"])
def test_layouts(name, layout):
    case, results = EXAMPLES[name], []
    for change in (False, True):
        torch.manual_seed(4)
        scheduler, x = case.ours(), torch.randn(2, 4, 6, 6)
        for t in scheduler.timesteps[:3]:
            f = torch.randn(2, 4, 6, 6)
            if change:
                x, f = (
                    {
                        "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
                        "transposed": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
                        "strided batch": lambda y: torch.stack([y, y], 1)[:, 0],
                    }[layout](y)
                    for y in (x, f)
                )
            x = scheduler.step(f, t, x, return_dict=False)[0]
        assert scheduler.path == "fused"
        results.append(x)
    assert torch.equal(*results)


INTEGERS = {
    name
    for name in EXAMPLES
    if name.startswith(
        ("DDPM", "DDIM", "UnCLIP", "CogVideoX", "DPMSolver", "LCM", "TCD", "UniPC", "Heun", "EDMDPM", "Helios")
    )
}


@classes
@pytest.mark.parametrize("begin", [0, 3])
def test_timesteps_of_any_kind_find_the_same_step(name, begin):
    case, results = EXAMPLES[name], []
    begin += begin % 2 if name.startswith("KDPM2") else 0  # a first half
    kinds = {
        "view": lambda t: t, "copy": lambda t: t.clone(), "slice": lambda t: t[None],
        "number": lambda t: t.item() if name in INTEGERS else t, "0-d array": lambda t: t.numpy() if name in INTEGERS else t,
        "numpy number": lambda t: t.numpy()[()] if name in INTEGERS else t,
    }  # fmt: skip
    for kind in kinds.values():
        torch.manual_seed(4)
        scheduler, x = case.ours(), torch.randn(SHAPE)
        for t in times(scheduler)[min(begin, len(times(scheduler)) - 1) : begin + 4]:
            x = scheduler.step(torch.randn(SHAPE), kind(t), x, return_dict=False)[0]
        assert scheduler.path == "fused"
        results.append(x)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@classes
@pytest.mark.parametrize("by", ["enumeration", "begin index", "slice"])
def test_the_loop_reads_no_tensor_back(name, by, monkeypatch):
    """As on a device, where .item() and its like wait: nothing between set_timesteps and the result calls them."""
    if name in OF_MOTIONS:
        pytest.skip("torchsde reads sigmas")
    scheduler = EXAMPLES[name].ours()
    x, f, timesteps = torch.randn(SHAPE), torch.randn(SHAPE), times(scheduler)
    if by == "begin index" and hasattr(scheduler, "begin_index"):
        scheduler.set_begin_index(0)
    timesteps = timesteps[min(2, len(timesteps) - 1) :] if by == "slice" else timesteps

    def refuse(*_):
        raise AssertionError("a tensor was read back")

    for method in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    for t in timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(f, t, x, return_dict=False)[0]
    monkeypatch.undo()
    assert scheduler.path == "fused" and x.isfinite().all()


CHURN, SDE = {"s_churn": 5.0}, {"algorithm_type": "sde-dpmsolver++"}
STOCHASTIC = {  # (configuration, arguments of step)
    "DDPMScheduler": ({}, {}), "DDIMScheduler": ({}, {"eta": 1.0}), "DDPMParallelScheduler": ({}, {}),
    "DDIMParallelScheduler": ({}, {"eta": 1.0}), "UnCLIPScheduler": ({}, {}), "EulerDiscreteScheduler": ({}, CHURN),
    "EDMEulerScheduler": ({}, CHURN), "EulerAncestralDiscreteScheduler": ({}, {}), "KDPM2AncestralDiscreteScheduler": ({}, {}),
    "LCMScheduler": ({}, {}),
    "TCDScheduler": ({}, {}), "DPMSolverMultistepScheduler": (SDE, {}), "EDMDPMSolverMultistepScheduler": (SDE, {}),
    "FlowMatchEulerDiscreteScheduler": ({"stochastic_sampling": True}, {}),
    "FlowMatchHeunDiscreteScheduler": ({}, CHURN), "FlowMatchLCMScheduler": ({}, {}), "LTXEulerAncestralRFScheduler": ({}, {}),
    "SCMScheduler": ({}, {}), "CMStochasticIterativeScheduler": ({}, {}), "ConsistencyDecoderScheduler": ({}, {}),
    "SASolverScheduler": ({"algorithm_type": "noise_prediction"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_make_the_noise_of_the_step(name):
    """A sample's noise is the package's, draw i of its seed: diffusers' step given that noise; the same alone or in a batch."""

    def scheduler(kind=fused):
        made = getattr(kind, name)(**config)
        made.set_timesteps(
            **(EXAMPLES[name].steps if name.startswith(("SCM", "ConsistencyDecoder")) else {"num_inference_steps": 6})
        )
        return made

    (config, call), seeds, i = STOCHASTIC[name], [5, 2**63 + 1], 0 if name == "ConsistencyDecoderScheduler" else 2
    x, f = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def go(ours, rows=slice(None), **more):
        state = x[rows]
        for k, t in enumerate(ours.timesteps[: i + 1]):
            noise = {key: value(k) if callable(value) else value for key, value in more.items()}
            state = ours.step(f[rows], t, state, return_dict=False, **call, **noise)[0]
        return state

    together = go(scheduler(), seeds=seeds)
    alone = torch.cat([go(scheduler(), slice(k, k + 1), seeds=seeds[k : k + 1]) for k in (0, 1)])
    assert torch.equal(together, alone)
    kept = scheduler()
    kept.seeds = seeds
    assert torch.equal(go(kept), together)
    module = sys.modules[getattr(diffusers.schedulers, name).__module__]
    with pytest.MonkeyPatch.context() as patch:
        draws = iter(range(1, i + 1, 2) if name in TWO_CALLS else range(i + 1))  # the second calls draw there
        patch.setattr(
            module,
            "randn_tensor",
            lambda shape, **_: epskernels.normal(seeds, list(shape[1:]), draw=next(draws), stream=0),
        )
        torch.testing.assert_close(
            go(scheduler(diffusers.schedulers)), together, rtol=1e-5, atol=1e-4 if "Euler" in name else 1e-5
        )
    with pytest.raises(ValueError, match="generator, seeds: expected one of them, got both"):
        go(scheduler(), seeds=seeds, generator=torch.Generator())
    with pytest.raises(ValueError, match="seeds: diffusers' own step takes a generator, and it runs here: of dtypes"):
        t = scheduler().timesteps[int(name in TWO_CALLS)]
        scheduler().step(f.double(), t, x.double(), **call, seeds=seeds)


def test_generators_draw_on_in_step_with_diffusers():
    """Also where the last step's coefficient is 0, so that what is drawn after it is the same."""
    for name in ("EulerAncestralDiscreteScheduler", "DDPMScheduler"):
        after = []
        for kind in (diffusers, fused):
            scheduler, generator = getattr(kind, name)(), torch.Generator().manual_seed(1)
            scheduler.set_timesteps(4)
            one_step(scheduler, 3, generator=generator)
            after.append(torch.randn(3, generator=generator))
        assert torch.equal(*after)


# ---- what runs diffusers' own step, and says so ----

OWN = {
    "float64": (lambda s, x, t: s.step(x.double(), t, x.double()), "of dtypes torch.float64 and torch.float64"),
    "gradients": (lambda s, x, t: s.step(x.clone().requires_grad_(), t, x), "gradients are asked for"),
}


@classes
@pytest.mark.parametrize("why", OWN)
@pytest.mark.parametrize("eps_scaling", [1.0, 1.02])
def test_own_step_is_visible_and_scaled(name, why, eps_scaling, caplog):
    common.say_of.cache_clear()
    run, said = OWN[why]
    case = EXAMPLES[name]
    ours, theirs = case.ours(eps_scaling), case.theirs()
    x, t, i = torch.randn(SHAPE), ours.timesteps[1], 1
    for scheduler in (ours, theirs):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
    torch.manual_seed(3)
    if name == "HeliosScheduler":  # which counts, whatever the timestep
        ours._step_index = theirs._step_index = i
    found = run(ours, x, t)
    assert ours.path.startswith(f"diffusers: {said}")
    (record,) = (record for record in caplog.records if said in record.message)
    assert record.message.startswith(f"epskernels.diffusers.{name} runs diffusers' own step: {said}")
    steps = step_of(EXAMPLES[name], len(times(theirs)) - 1) + 1
    scale = textbook(case, theirs, np.full(steps, eps_scaling))
    torch.manual_seed(3)
    if eps_scaling == 1:
        expected = run(theirs, x, t)
    else:
        dtype = found.prev_sample.dtype
        output = scale(x.double(), x.double(), i).to(dtype)
        expected = theirs.step(output, t, x.to(dtype))
    torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-5)


def test_a_timestep_off_the_schedule():
    theirs, ours = diffusers.DDIMScheduler(), fused.DDIMScheduler()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    assert torch.equal(ours.step(f, 777, x).prev_sample, theirs.step(f, 777, x).prev_sample)
    assert ours.path == "diffusers: timestep 777 is not one of the schedule's"
    scaled = fused.DDIMScheduler(eps_scaling=1.01)
    scaled.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep: 777 is not one of the schedule's, so that it has no lambda"):
        scaled.step(f, 777, x)


def test_numbers_that_diffusers_does_not_have_either():
    for kind in (diffusers, fused):
        scheduler = kind.DDPMScheduler(variance_type="fixed_large_log")
        scheduler.set_timesteps(4)
        x = scheduler.step(torch.ones(SHAPE), scheduler.timesteps[0], torch.ones(SHAPE)).prev_sample
        assert x.isnan().all()
    assert scheduler.path == "diffusers: the coefficients of step 0 are not finite"


def test_no_change_of_path_where_the_histories_differ():
    scheduler = EXAMPLES["HeunDiscreteScheduler"].ours()
    x = torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(RuntimeError, match="cannot go on with diffusers' own step within a trajectory: of dtypes"):
        scheduler.step(x.double(), scheduler.timesteps[1], x.double())


# ---- eps_scaling ----


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ADM", ValueError, "eps_scaling: expected 'SYSTEM/DATASET/STEPS'"),
        (" 1.005", ValueError, "^eps_scaling: expected a number, got the text ' 1.005': pass 1.005$"),
        ("ADM/CIFAR-10/21", ValueError, "eps_scaling: no published setting"),
        ({"k": 1.0}, ValueError, r"eps_scaling: expected the keys k, b and perhaps origin, .*, got \['k'\]"),
        ({"k": 0.1, "b": 1.0, "origin": "middle"}, ValueError, "origin: expected 'cleanest' or 'noisiest'"),
        (0.0, ValueError, "eps_scaling: expected a value above 0, got 0"),
        ([1.0, -1.0], ValueError, "eps_scaling: expected finite values above 0"),
        (None, TypeError, "eps_scaling: expected a number, .* got NoneType"),
    ],
    ids=str,
)
def test_bad_eps_scaling(value, error, message):
    with pytest.raises(error, match=message):
        fused.DDIMScheduler(eps_scaling=value)


def test_eps_scaling_of_another_length():
    with pytest.raises(ValueError, match="^eps_scaling: expected one value for each of 10 steps, got 3"):
        fused.DDIMScheduler(eps_scaling=[1.0, 1.01, 1.02]).set_timesteps(10)


def test_published_eps_scaling():
    scheduler = fused.DDPMScheduler(eps_scaling="ADM/CIFAR-10/20/linear")
    scheduler.set_timesteps(20)
    plan = scheduler._plan((), torch.device("cpu"))
    assert plan.lambda_t == pytest.approx((1.0 + 0.0025 * np.arange(20)[::-1]).tolist())


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
NOISE_ALONE = {
    "FlowMatchEulerDiscreteScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "EulerDiscreteScheduler": ZERO_SNR, "EulerAncestralDiscreteScheduler": ZERO_SNR, "DDIMScheduler": ZERO_SNR,
    "DPMSolverMultistepScheduler ": ZERO_SNR, "UniPCMultistepScheduler ": ZERO_SNR,
}  # fmt: skip


@pytest.mark.parametrize("name", NOISE_ALONE)
def test_lambda_where_x_is_noise_alone(name, caplog):
    """A zero SNR, or what a scheduler writes for it: x_0 is what the model says, whatever lambda, and lambda is 1."""
    common.say_of.cache_clear()
    kind, config = getattr(fused, name.strip()), NOISE_ALONE[name]
    scheduler, plain = kind(**config, eps_scaling=1.02), kind(**config)
    for each in (scheduler, plain):
        each.set_timesteps(5)
    assert scheduler._plan(scheduler._options, torch.device("cpu")).lambda_t[:5] == (1.0, 1.02, 1.02, 1.02, 1.02)
    assert "lambda is 1 in step 0: x is noise alone there" in caplog.text
    with pytest.raises(ValueError, match=r"eps_scaling: expected 1 where x is noise alone \(step 0\), got 1.02"):
        kind(**config, eps_scaling=[1.02] * 5).set_timesteps(5)
    kind(**config, eps_scaling=[1.0, *[1.02] * 4]).set_timesteps(5)
    runs = []
    for each in (scheduler, plain):
        torch.manual_seed(6)
        x, f, results = float(getattr(each, "init_noise_sigma", 1)) * torch.randn(SHAPE), torch.randn(2, *SHAPE), []
        for i in range(2):
            x = each.step(f[i], each.timesteps[i], x, return_dict=False)[0]
            results.append(x)
        runs.append(results)
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][1], runs[1][1])


def test_lambda_of_a_predicted_eps_is_the_papers_at_any_level():
    """The cosine schedule ends at alpha = sigma/20000; where the model predicts eps, the first step is scaled as all others."""
    cosine = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}
    for value in (1.02, [1.02] * 5):
        scheduler = fused.DDPMScheduler(**cosine, eps_scaling=value)
        scheduler.set_timesteps(5)
        assert scheduler._plan((), torch.device("cpu")).lambda_t == (1.02,) * 5
    theirs = diffusers.DDPMScheduler(**cosine)
    theirs.set_timesteps(5)
    f, x, t = torch.randn(SHAPE), torch.randn(SHAPE), theirs.timesteps[0]
    expected = theirs.step(f / 1.02, t, x, torch.Generator().manual_seed(1)).prev_sample
    found = scheduler.step(f, scheduler.timesteps[0], x, torch.Generator().manual_seed(1)).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="expected 1 where x is noise alone"):
        fused.DDPMScheduler(**cosine, prediction_type="v_prediction", eps_scaling=[1.02] * 5).set_timesteps(5)


def test_lambda_where_x_is_x_0_alone():
    """Without noise there is nothing to divide: the step is as without lambda, not NaN."""
    scheduler = fused.FlowMatchEulerDiscreteScheduler(eps_scaling=1.02)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.0])
    assert scheduler._plan((), torch.device("cpu")).lambda_t == (1.02, 1.02, 1.0)
    x = torch.randn(SHAPE)
    assert torch.equal(scheduler.step(torch.randn(SHAPE), scheduler.timesteps[2], x).prev_sample, x)


@pytest.mark.parametrize("stochastic", [False, True])
def test_lambda_of_inverted_sigmas(stochastic):
    """Mochi's: the schedule's numbers are the share of x_0, and the output is x_0 - eps."""
    made = {"invert_sigmas": True, "stochastic_sampling": stochastic}
    theirs, ours = (
        diffusers.FlowMatchEulerDiscreteScheduler(**made),
        fused.FlowMatchEulerDiscreteScheduler(**made, eps_scaling=1.02),
    )
    for i in (1, 4):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(6)
            scheduler.set_begin_index(i)
        x, f, alpha = torch.randn(SHAPE), torch.randn(SHAPE), float(theirs.sigmas[i])
        eps = (x - alpha * f) / 1.02  # x = alpha*x_0 + (1 - alpha)*eps
        scaled = (x - eps) / alpha
        noise = [torch.Generator().manual_seed(2) for _ in range(2)]
        expected = theirs.step(scaled, theirs.timesteps[i], x, generator=noise[0]).prev_sample
        found = ours.step(f, ours.timesteps[i], x, generator=noise[1]).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert ours.path == "fused"


def test_lambda_of_flow_steps_above_1():
    """Sigmas of x = x_0 + sigma*eps, whose velocity is eps."""
    sigmas, made = [14.0, 5.0, 1.0, 0.3], {"eps_scaling": 1.02}
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(), fused.FlowMatchEulerDiscreteScheduler(**made)
    x, f = 14 * torch.randn(SHAPE), torch.randn(SHAPE)
    y = x
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas)
    for i in range(4):
        x = theirs.step(f / 1.02, theirs.timesteps[i], x).prev_sample
        y = ours.step(f, ours.timesteps[i], y).prev_sample
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_numpy_numbers_are_saved(tmp_path):
    scheduler = fused.DDIMScheduler(eps_scaling=np.float64(1.01))
    scheduler.save_pretrained(tmp_path)
    assert fused.DDIMScheduler.from_pretrained(tmp_path).config.eps_scaling == 1.01


# ---- plans ----


def test_plans_are_immutable_and_made_once():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(10)
    plan = scheduler._plan((0.0, False), torch.device("cpu"))
    one_step(scheduler, 4)
    assert scheduler._plan((0.0, False), torch.device("cpu")) is plan
    assert one_step(scheduler, 0, eta=0.5) and scheduler._plan((0.0, False), torch.device("cpu")) is plan
    with pytest.raises(AttributeError, match="a Plan is immutable"):
        plan.rows = None
    with pytest.raises(ValueError, match="read-only"):
        plan.columns["c_x"][0] = 1.0
    scheduler.set_timesteps(10)
    assert scheduler._plan((0.0, False), torch.device("cpu")) is plan
    scheduler.set_timesteps(11)
    assert scheduler._plan((0.0, False), torch.device("cpu")) is not plan


def test_sigmas_set_by_hand_are_seen():
    theirs, ours = diffusers.EulerDiscreteScheduler(), fused.EulerDiscreteScheduler()
    f, x = torch.randn(SHAPE), torch.randn(SHAPE)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        scheduler.sigmas = scheduler.sigmas * 0.9
    torch.testing.assert_close(
        ours.step(f, ours.timesteps[0], x).prev_sample, theirs.step(f, theirs.timesteps[0], x).prev_sample
    )


def in_place(scheduler):
    scheduler.sigmas.mul_(0.9)


def other_final_sigma(scheduler):
    scheduler.sigmas = torch.cat([scheduler.sigmas[:-1], torch.tensor([0.02])])


def other_prediction(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")


def other_alphas(scheduler):
    scheduler.alphas_cumprod.mul_(0.98)


def other_count(scheduler):
    scheduler.num_inference_steps = 8


def thresholding(scheduler):
    scheduler.register_to_config(thresholding=True, sample_max_value=2.0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "name, change",
    [
        ("EulerDiscreteScheduler", in_place), ("EulerDiscreteScheduler", other_final_sigma),
        ("EulerDiscreteScheduler", other_prediction), ("FlowMatchEulerDiscreteScheduler", in_place),
        ("DDIMScheduler", other_alphas), ("DDIMScheduler", other_count), ("DDIMScheduler", other_prediction),
        ("DDPMScheduler", other_alphas), ("DDPMScheduler", other_prediction), ("DDPMScheduler", thresholding),
        ("DPMSolverMultistepScheduler", in_place), ("DPMSolverMultistepScheduler", thresholding),
    ],
)  # fmt: skip
def test_changes_after_set_timesteps_are_seen(name, change, inference):
    """Of the schedule and of the configuration: each step is diffusers' own of what the scheduler is by then."""
    f, x, found = torch.randn(3, *SHAPE), 3 * torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        with torch.inference_mode(inference):
            scheduler, y = getattr(kind, name)(), x
            scheduler.set_timesteps(4)
            for i in range(3):
                if i == 1:
                    change(scheduler)
                noise = {"generator": torch.Generator().manual_seed(i)}
                y = scheduler.step(f[i], scheduler.timesteps[i], y, return_dict=False, **noise)[0]
            found.append(y)
    assert scheduler.path == "fused"
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_compiled_step_after_add_noise(name):
    """add_noise moves alphas_cumprod to the samples' device: to compiled code that is the same schedule."""
    whole = torch.__version__ >= (2, 13)  # before, the graph breaks where a timestep is looked up by its address
    f, x, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for compiled in (False, True):
        scheduler = CLASSES[name](eps_scaling=1.01)
        scheduler.set_timesteps(4)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
        step = torch.compile(scheduler.step, backend="eager", fullgraph=whole) if compiled else scheduler.step
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(step(f, scheduler.timesteps[0], x, return_dict=False)[0])
    assert torch.equal(*found)


def test_another_variance_than_the_configured_is_diffusers_own():
    """Its step looks at both, the attribute and the configuration."""
    f, x, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        scheduler = kind.DDPMScheduler()
        scheduler.set_timesteps(4)
        scheduler.variance_type = "fixed_small_log"
        noise = torch.Generator().manual_seed(1)
        found.append(scheduler.step(f, scheduler.timesteps[1], x, generator=noise).prev_sample)
    assert torch.equal(*found)
    assert scheduler.path == "diffusers: variance_type is not its configuration's"


@classes
def test_forks_do_not_disturb_each_other(name):
    """Requests in threads, each with a fork: each as if it were alone."""
    case = EXAMPLES[name]
    shared = case.ours()

    def request(scheduler, seed):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        noise = torch.Generator().manual_seed(seed)
        call = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in times(shared):
            x = scheduler.step(torch.tanh(x), t, x, return_dict=False, **call)[0]
        return x

    alone = [request(case.ours(), seed) for seed in range(6)]
    one_step(shared)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        forks = [shared.fork() for _ in range(6)]
        together = list(pool.map(request, forks, range(6)))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    plans = {id(fork._plan(fork._options, torch.device("cpu"))) for fork in forks}
    assert len(plans) == 1


# ---- fuse ----


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


@classes
def test_fuse_keeps_what_the_scheduler_carries(name):
    case = EXAMPLES[name]
    theirs = case.theirs()
    pipe = fused.fuse(Pipe(case.theirs()), eps_scaling=1.01, seeds=[3, 4])
    ours = pipe.scheduler
    assert type(ours) is CLASSES[name] and ours.config.eps_scaling == 1.01 and ours.seeds.tolist() == [3, 4]
    assert torch.equal(ours.timesteps, theirs.timesteps)
    again = fused.fuse(pipe).scheduler
    assert again.config.eps_scaling == 1.01 and again.seeds.tolist() == [3, 4]
    if hasattr(theirs, "set_shift"):
        theirs.set_shift(4.0)
        assert fused.fused(theirs).shift == 4.0


def test_fuse_refuses_what_is_no_scheduler():
    with pytest.raises(TypeError, match="pipe: expected a pipeline with a scheduler, or a scheduler, got int"):
        fused.fuse(3)


def test_the_core_does_not_import_diffusers():
    code = "import sys, epskernels; assert not any(name.split('.')[0] == 'diffusers' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- single features ----


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("lam", [1.0, 1.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_token_timesteps(stochastic, lam, dtype):
    """Tokens at levels of their own, some at the ends; the step's lambda scales each at its own level."""
    x, f = torch.randn(2, 6, 4).to(dtype), torch.randn(2, 6, 4).to(dtype)
    levels = torch.tensor([[1000.0, 900, 640, 500, 333, 1], [750, 1000, 60, 20, 999, 400]])
    results = []
    for kind in (diffusers, fused):
        made = {} if kind is diffusers else {"eps_scaling": lam}
        scheduler = kind.FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic, shift=2.0, **made)
        scheduler.set_timesteps(8)
        output, sigma = f, (levels / 1000)[..., None].double()
        if kind is diffusers and lam != 1:
            eps = (x.double() + (1 - sigma) * f.double()) / lam
            scaled = eps - (x.double() - sigma * eps) / (1 - sigma)
            output = torch.where(1 - sigma < sigma / 900, f.double(), scaled)
            output = output.float()
        call = {"generator": torch.Generator().manual_seed(2), "per_token_timesteps": levels}
        scheduler.set_begin_index(3)  # not at the level where lambda is held to 1
        result = scheduler.step(output, scheduler.timesteps[3], x, **call).prev_sample
        assert result.dtype == torch.float32
        results.append(result)
    assert scheduler.path == "fused" and scheduler.step_index == 4
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
    with pytest.raises(
        ValueError,
        match=r"per_token_timesteps: expected \(B, N\), .*, for a sample \(B, N, C\) \(2, 6, 4\), got \(2, 3\)",
    ):
        scheduler.step(f, scheduler.timesteps[4], x, per_token_timesteps=levels[:, :3])


@pytest.mark.parametrize("seeds", [None, [4, 5]])
def test_per_token_noise_in_the_last_step(seeds):
    """Tokens that have further to go get noise where the schedule's own step has none."""
    x, f = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    levels = torch.tensor([[1000.0, 900, 640, 500, 333, 1], [750, 1000, 60, 20, 999, 400]])
    results = []
    for kind in (diffusers, fused):
        scheduler = kind.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(3)
        call = {"generator": torch.Generator().manual_seed(2)}
        if seeds is not None and kind is fused:
            call = {"seeds": seeds}
        results.append(scheduler.step(f, scheduler.timesteps[3], x, per_token_timesteps=levels, **call).prev_sample)
    if seeds is None:
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
    below = (scheduler.sigmas[:, None, None] * (scheduler.sigmas[:, None, None] < levels / 1000 - 1e-6)).amax(0)[
        ..., None
    ]
    z = results[1] - (1 - below) * (x - levels[..., None] / 1000 * f)
    assert (z[(below == 0).expand_as(z)].abs() < 1e-5).all() and (below > 0).sum() > 6
    assert 0.7 < (z / below)[(below > 0).expand_as(z)].std() < 1.3


@pytest.mark.parametrize("made", [{"invert_sigmas": True}, {}], ids=["inverted", "above 1"])
def test_per_token_lambda_needs_a_flow(made):
    scheduler = fused.FlowMatchEulerDiscreteScheduler(**made, eps_scaling=1.02)
    scheduler.set_timesteps(sigmas=[0.9, 0.5] if made else [3.0, 0.5])
    with pytest.raises(
        ValueError, match="eps_scaling: expected 1 with per_token_timesteps and sigmas inverted or above 1"
    ):
        scheduler.step(
            torch.zeros(1, 2, 4), scheduler.timesteps[0], torch.zeros(1, 2, 4), per_token_timesteps=torch.ones(1, 2)
        )


@pytest.mark.parametrize("name", ["DDPM", "Euler", "DPMSolverMultistep", "UniPC"])
def test_an_output_of_another_shape(name):
    """In the words of step's arguments; twice the channels are a variance, which few schedulers take."""
    scheduler = getattr(fused, {"Euler": "EulerDiscrete", "UniPC": "UniPCMultistep"}.get(name, name) + "Scheduler")()
    scheduler.set_timesteps(4)
    x, t = torch.ones(2, 1, 4, 4), scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    with pytest.raises(
        ValueError, match=r"^model_output: expected shape \(2, 1, 4, 4\) as sample has, got \(2, 3, 4, 4\)$"
    ):
        scheduler.step(torch.ones(2, 3, 4, 4), t, x)
    with pytest.raises(
        ValueError, match=r"^model_output: .*; twice its channels: the model predicts a variance too, as DDPM"
    ):
        scheduler.step(torch.ones(2, 2, 4, 4), t, x)


def test_learned_variance_as_it_is():
    """variance_type "learned": the variance itself, whose root scales the noise in an operation of its own."""
    x, f = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output, results = torch.cat([f, torch.rand(2, 3, 4, 4)], dim=1), []
    for kind in (diffusers, fused):
        scheduler = kind.DDPMScheduler(variance_type="learned")
        scheduler.set_timesteps(6)
        results.append(
            scheduler.step(output, scheduler.timesteps[2], x, generator=torch.Generator().manual_seed(2)).prev_sample
        )
    torch.testing.assert_close(*results)
    assert scheduler.path == "fused"
    assert scheduler.step(output, scheduler.timesteps[2], x, seeds=[1, 2]).prev_sample.isfinite().all()


def test_bh1_to_sigma_0_has_a_number():
    """diffusers' bh1 multiplies an infinite B(h) by 0 in the last step; its limit is what bh2 gives."""
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    last = {}
    for kind in (diffusers, fused):
        scheduler = kind.UniPCMultistepScheduler(solver_type="bh1")
        scheduler.set_timesteps(5)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(f, t, y, return_dict=False)[0]
        last[kind] = y
    assert last[diffusers].isnan().all() and last[fused].isfinite().all()


@dataclasses.dataclass(frozen=True)
class Tau:
    """Of a step. Its text does not say which: as two functions, the second at the address of the first, which is gone."""

    tau: float = dataclasses.field(repr=False)

    def __call__(self, t):
        return self.tau


def test_sa_solver_sees_another_tau_and_another_state():
    """What is made of a state between two steps counts for the model alone, as in diffusers."""
    x, f, runs = torch.randn(SHAPE), 0.5 * torch.randn(9, *SHAPE), {diffusers: [], fused: []}
    for kind, found in runs.items():
        for tau in (0.0, 0.4, 0.8, 1.2):
            scheduler = kind.SASolverScheduler(predictor_order=3)
            scheduler.set_timesteps(9)
            scheduler.tau_func = Tau(tau)
            state, draw = x, torch.Generator().manual_seed(4)
            for i, t in enumerate(scheduler.timesteps):
                state = scheduler.step(f[i], t, state, generator=draw).prev_sample
                state[:, :, :2] = 0.1 * i
            found.append(state)
    assert scheduler.path == "fused" and len({float(state[0, 0, 3, 3]) for state in runs[fused]}) == 4
    for ours, theirs in zip(runs[fused], runs[diffusers], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_sa_solver_with_a_learned_variance():
    """diffusers draws noise of the variance's shape too, and cannot add it; here it is cut off before."""
    x, f, found = torch.randn(SHAPE), torch.randn(2, 6, *SHAPE[2:]), []
    for output, config in ((f, {"variance_type": "learned_range"}), (f[:, :3], {})):
        scheduler = fused.SASolverScheduler(**config)
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(3)
        draw = torch.Generator().manual_seed(4)
        found.append(scheduler.step(output, scheduler.timesteps[3], x, generator=draw).prev_sample)
        assert scheduler.path == "fused"
    assert torch.equal(*found)


def test_sa_solver_at_a_timestep_of_another_step():
    """tau is the timestep's that is given: here of a schedule that was cut, and counted from a begin index."""
    x, f, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        scheduler = kind.SASolverScheduler()
        scheduler.set_timesteps(9)
        scheduler.timesteps = scheduler.timesteps[2:]
        scheduler.set_begin_index(2)
        draw = torch.Generator().manual_seed(4)
        found.append(scheduler.step(f, scheduler.timesteps[0], x, generator=draw).prev_sample)
    assert torch.equal(*found)
    assert scheduler.path.endswith("which tau is of, is not that of step 2")


def test_mixed_dtypes_end_where_diffusers_ends():
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    for name in EXAMPLES:
        for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            if name in ("UniPCMultistepScheduler", "HeliosScheduler") and dtypes[0] == torch.bfloat16:
                continue  # diffusers refuses
            ends = []
            for scheduler in (EXAMPLES[name].theirs(), EXAMPLES[name].ours()):
                y = x.to(dtypes[0])
                for t in scheduler.timesteps[:3]:
                    y = scheduler.step(f.to(dtypes[1]), t, y, return_dict=False)[0]
                ends.append(y)
            assert ends[0].dtype == ends[1].dtype, (name, dtypes)


def test_share_gives_a_pipeline_its_own_scheduler():
    pipe = fused.fuse(Pipe(EXAMPLES["EulerDiscreteScheduler"].theirs()))
    twin = fused.share(pipe)
    assert twin.scheduler is not pipe.scheduler and twin.scheduler._seen is pipe.scheduler._seen
    twin.scheduler.step(torch.ones(SHAPE), twin.scheduler.timesteps[0], torch.ones(SHAPE))
    assert twin.scheduler.step_index == 1 and pipe.scheduler.step_index is None


def test_the_page(tmp_path):
    names = markdown_examples.run("docs/diffusers.md", tmp_path)
    pipe = names["pipe"]
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert type(pipe.scheduler) is fused.DDPMParallelScheduler and pipe.scheduler.path == "fused"
    assert pipe.scheduler.config.eps_scaling == {"k": 0.0002, "b": 1.004} and len(pipe.scheduler.timesteps) == 3
    assert images.shape == (2, 28, 28, 1) and 0.1 < images.std() and names["x"].isfinite().all()


@classes
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))], ids=["deepcopy", "pickle"]
)
def test_copies_in_the_middle_of_a_trajectory_go_on(name, copied):
    ours = EXAMPLES[name].ours()
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    takes_generator = "generator" in inspect.signature(ours.step).parameters

    def step(scheduler, i, x):
        seed = 0 if name in OF_MOTIONS else i  # a motion's is that of its first draw
        call = {"generator": torch.Generator().manual_seed(seed)} if takes_generator else {}
        return scheduler.step(f, scheduler.timesteps[i], x, return_dict=False, **call)[0]

    calls = min(4, len(times(ours)))
    for i in range(calls // 2):
        x = step(ours, i, x)
    twin, y = copied(ours), x
    for i in range(calls // 2, calls):
        x, y = step(ours, i, x), step(twin, i, y)
    assert torch.equal(x, y) and twin.path == "fused"


def test_a_fused_scheduler_may_be_fused_again():
    ours = EXAMPLES["DDIMScheduler"].ours()
    ours.step(torch.ones(SHAPE), ours.timesteps[0], torch.ones(SHAPE))
    again = fused.fused(ours, eps_scaling=1.01)
    assert again.config.eps_scaling == 1.01 and again is not ours


def test_timesteps_that_are_apart_in_memory():
    """Each is found by its own address."""
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    plain, apart = (EXAMPLES["DDIMScheduler"].ours() for _ in range(2))
    apart.timesteps = torch.stack([apart.timesteps, apart.timesteps.flip(0)], dim=1)[:, 0]
    assert apart.timesteps.stride(0) == 2
    for t, other in zip(plain.timesteps, apart.timesteps, strict=True):
        assert torch.equal(plain.step(f, t, x).prev_sample, apart.step(f, other, x).prev_sample)
