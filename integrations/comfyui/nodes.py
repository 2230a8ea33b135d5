"""The nodes: a sampler, its noise, and Epsilon Scaling. ComfyUI's V3 schema; the arithmetic is epskernels.k_diffusion's."""

import dataclasses
import functools
import inspect

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from comfy_api.latest import ComfyExtension, io

import epskernels
from epskernels import corrections, k_diffusion
from epskernels.k_diffusion import is_flow, scale_denoised
from epskernels.scaling import NOISE_ALONE

SCALING = {"min": 0.5, "max": 1.5, "step": 0.0005, "round": False}
LARGEST_SEED = 2**64 - 1


def schema(node_id, display_name, *, search_aliases, **fields):
    """io.Schema; an older ComfyUI has no search_aliases."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        fields["search_aliases"] = search_aliases
    return io.Schema(node_id=node_id, display_name=display_name, **fields)


# ---- Epsilon Scaling: of the model, for any sampler ----


class EpsilonScalingFused(io.ComfyNode):
    """lambda of arXiv 2308.15321 for a model: the noise that it predicts is divided by it."""

    @classmethod
    def define_schema(cls):
        return schema(
            "EpsilonScalingFused",
            "Epsilon Scaling (fused)",
            search_aliases=["exposure bias", "eps scaling", "epskernels", "lambda"],
            category="model_patches/sampling",
            description="Divides the predicted noise by lambda, after guidance. 1 changes nothing; 1.005 is a common start.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "eps_scaling", default=1.005, tooltip="lambda; in 'linear', of the first step.", **SCALING
                ),
                io.Combo.Input(
                    "schedule",
                    options=["uniform", "linear"],
                    default="uniform",
                    tooltip="uniform: eps_scaling in all steps. linear: from eps_scaling in the sampler's first step to "
                    "at_the_end in its last, by equal amounts from step to step.",
                ),
                io.Float.Input(
                    "at_the_end",
                    default=1.005,
                    tooltip="lambda of the last step; 'uniform' does not read it.",
                    **SCALING,
                ),
                io.Combo.Input(
                    "flow",
                    options=["noise", "velocity"],
                    default="noise",
                    tooltip="What lambda divides in flow models (Flux, SD3, AuraFlow, ...). noise: eps of x = (1 - sigma)*x_0 "
                    "+ sigma*eps, as everywhere in epskernels. velocity: eps - x_0, as in ComfyUI's own node, where the same "
                    "lambda does a tenth or less. Other models do not read it.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, eps_scaling, schedule, at_the_end, flow):
        patched = model.clone()
        if schedule == "uniform":
            at_the_end = eps_scaling
        if not eps_scaling == at_the_end == 1:
            patched.set_model_sampler_post_cfg_function(
                functools.partial(scale, first=eps_scaling, last=at_the_end, velocity=flow == "velocity")
            )
        return io.NodeOutput(patched)


def scale(args, *, first, last, velocity):
    """The hook after guidance. What it knows of the model is read here, once all other patches are in place."""
    x = args["input"]
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    sigma = args["sigma"].reshape(-1).to(wide).expand(len(x))
    lambda_t = torch.full_like(sigma, first)
    if first != last:
        lambda_t = lambda_t + (last - first) * along(sigma, args["model_options"])
    alpha = torch.ones_like(sigma)
    if is_flow(args["model"].model_sampling):
        if velocity:
            return scale_denoised(x, args["denoised"], lambda_t)
        alpha = 1 - sigma
    alone = alpha < NOISE_ALONE * sigma  # x says nothing of x_0: only 1 has a meaning
    lambda_t, alpha = (torch.where(alone, 1.0, value) for value in (lambda_t, alpha))
    return scale_denoised(x, args["denoised"], lambda_t, alpha)


def along(sigma, model_options):
    """(B,) how far the sampler has come: 0 in its first step, 1 in its last, linear in the step's number.

    sigma: (B,). Between two steps' levels it is linear in sigma. Raises RuntimeError if ComfyUI does not tell them.
    """
    levels = model_options.get("transformer_options", {}).get("sample_sigmas")
    if levels is None:
        raise RuntimeError(
            "Epsilon Scaling (fused): schedule 'linear' counts the sampler's steps, and this ComfyUI does not tell "
            "their sigmas (transformer_options['sample_sigmas']); update ComfyUI, or take 'uniform'"
        )
    # The last level is where the last step ends. The others are sorted, for samplers that go up.
    levels = levels[:-1].to(sigma).sort(descending=True).values
    if len(levels) < 2:
        return torch.zeros_like(sigma)
    passed = (levels[:-1] - sigma[:, None]) / (levels[:-1] - levels[1:])  # of each step, whose length may be 0
    return passed.nan_to_num(0.0).clamp(0, 1).sum(1) / (len(levels) - 1)


# ---- the sampler ----

# Of ComfyUI's list, under its names; "ddim" is its euler with another noise outside of a mask.
SAMPLERS = [
    "euler", "euler_ancestral", "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms",
    "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_ancestral",
    "gradient_estimation", "er_sde", "seeds_2", "seeds_3", "sa_solver", "ddim", "uni_pc", "uni_pc_bh2",
    "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "res_multistep_ancestral_cfg_pp",
    "gradient_estimation_cfg_pp",
]  # fmt: skip
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")  # ComfyUI's default noise
DPM = ("dpm_fast", "dpm_adaptive")  # they have no noise in ComfyUI's list, and are told their two ends
CHURNED = ("euler", "heun", "dpm_2", "ddim")
PER_SAMPLE, COMFYUIS = "per sample", "ComfyUI's"


class EpskernelsSampler(io.ComfyNode):
    """A SAMPLER of ComfyUI's list whose steps are one launch each."""

    @classmethod
    def define_schema(cls):
        return schema(
            "EpskernelsSampler",
            "Sampler (fused)",
            search_aliases=["KSamplerSelect", "epskernels", "fused sampler", "per-sample seeds", *SAMPLERS],
            category="sampling/custom_sampling/samplers",
            description="A sampler of ComfyUI's list, each step one launch. For SamplerCustom and SamplerCustomAdvanced. It has "
            "no lambda of its own: Epsilon Scaling of the model acts on it as on any sampler.",
            inputs=[
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler"),
                io.Float.Input(
                    "eta",
                    default=1.0, min=0.0, max=100.0, step=0.01, round=False,
                    tooltip="How much of a step is noise. Read by the ancestral, SDE and SEEDS samplers. 0 to 1 for the "
                    "ancestral ones on flow models.",
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0, min=0.0, max=100.0, step=0.01, round=False,
                    tooltip="By what the noise is multiplied. Read by every sampler that adds some, but ddpm and lcm.",
                ),
                io.Combo.Input(
                    "noise",
                    options=[PER_SAMPLE, COMFYUIS],
                    default=PER_SAMPLE,
                    tooltip="per sample: made in the step's kernel, sample i of the batch with seed + i, the same alone as in "
                    "any batch. ComfyUI's: of ComfyUI's own generator or Brownian tree, for the images of its own sampler.",
                ),
                io.Int.Input(
                    "seed",
                    default=-1, min=-1, max=LARGEST_SEED, optional=True,
                    tooltip="Of the noise in the steps. -1: the seed of the run. A second sampler after SplitSigmas needs "
                    "another one than the first, which would else repeat its noise.",
                ),
                io.Int.Input(
                    "order",
                    default=0, min=0, max=4, optional=True,
                    tooltip="Of lms, ipndm, ipndm_v, deis (1 to 4), er_sde (1 to 3) and dpm_adaptive (2, 3). 0: as ComfyUI.",
                ),
                io.Float.Input(
                    "s_churn",
                    default=0.0, min=0.0, max=100.0, step=0.01, round=False, optional=True,
                    tooltip="Noise before the steps of euler, heun and dpm_2 (EDM). Not on flow models.",
                ),
                *(
                    io.Float.Input(
                        f"dcw_{band}",
                        default=0.0, min=-1.0, max=1.0, step=0.005, round=False, optional=True,
                        tooltip=f"Differential correction of the {band} band (arXiv 2604.16044): by how much of x' - x_0 it "
                        f"grows after each step, {share}. 0: none. Not for the samplers of CFG++, nor with churn.",
                    )
                    for band, share in (("low", "the more noise the more"), ("high", "the less noise the more"))
                ),
            ],
            outputs=[io.Sampler.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler_name, eta, s_noise, noise, seed=-1, order=0, s_churn=0.0, dcw_low=0.0, dcw_high=0.0):
        function = getattr(k_diffusion, f"sample_{'euler' if sampler_name == 'ddim' else sampler_name}")
        given = {"eta": eta, "s_noise": s_noise, "s_churn": s_churn}
        if sampler_name in DPM:
            given = {}
        if order:
            given |= dict.fromkeys(("order", "max_order", "max_stage"), order)
        taken = inspect.signature(function).parameters
        options = {name: value for name, value in given.items() if name in taken}
        if dcw_low or dcw_high:
            if "correction" not in taken:
                raise ValueError(f"dcw_low, dcw_high: expected 0 for {sampler_name}, got {dcw_low}, {dcw_high}")
            options["correction"] = corrections.dcw(dcw_low, dcw_high)
        if noise == PER_SAMPLE or "noise_sampler" not in taken or sampler_name in (*CHURNED, *DPM):
            noise_of = per_sample if noise == PER_SAMPLE else None
        else:
            noise_of = brownian if sampler_name in BROWNIAN else comfyuis
        sampler = comfy.samplers.KSAMPLER(
            functools.partial(sample, function, options, noise_of, None if seed == -1 else seed, sampler_name in DPM),
            inpaint_options={"random": True} if sampler_name == "ddim" else {},
        )
        return io.NodeOutput(sampler)


def sample(function, options, noise_of, seed, two_ends, model, x, sigmas, extra_args, callback=None, disable=None):
    """What comfy.samplers.KSAMPLER calls."""
    if len(sigmas) < 2:
        return x
    seed = extra_args.get("seed") if seed is None else seed
    if noise_of is not None:
        options = options | noise_of(x, sigmas, 0 if seed is None else seed)
    schedule = (sigmas,)
    if two_ends:
        schedule = (sigmas[-1] if sigmas[-1] > 0 else sigmas[-2], sigmas[0])
        if function is k_diffusion.sample_dpm_fast:
            schedule = (*schedule, len(sigmas) - 1)
    return function(model, x, *schedule, extra_args=extra_args, callback=callback, disable=disable, **options)


def seeds_of(seed, indices):
    """seed + i as the int64 that has the same bits."""
    return [(seed + int(i) + 2**63) % 2**64 - 2**63 for i in indices]


def per_sample(x, sigmas, seed):
    return {"seeds": seeds_of(seed, range(len(x)))}


def comfyuis(x, sigmas, seed):
    return {"noise_sampler": comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)}


def brownian(x, sigmas, seed):
    ends = sigmas[sigmas > 0].min(), sigmas.max()
    return {"noise_sampler": comfy.k_diffusion.sampling.BrownianTreeNoiseSampler(x, *ends, seed=seed, cpu=True)}


# ---- the noise to begin with ----


class EpskernelsNoise(io.ComfyNode):
    """A NOISE of which each sample has its own seed."""

    @classmethod
    def define_schema(cls):
        return schema(
            "EpskernelsNoise",
            "Random Noise per sample",
            search_aliases=["RandomNoise", "epskernels", "seed per image", "batch seed"],
            category="sampling/custom_sampling/noise",
            description="The noise to begin with: image i of the batch has that of noise_seed + i, the same alone as in any "
            "batch.",
            inputs=[io.Int.Input("noise_seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True)],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, noise_seed):
        return io.NodeOutput(SampleNoise(noise_seed))


class SampleNoise:
    """What ComfyUI takes as NOISE: `seed`, and generate_noise of a latent."""

    def __init__(self, seed):
        self.seed = seed

    def generate_noise(self, input_latent):
        latent = input_latent["samples"]
        if getattr(latent, "is_nested", False):
            made = [self.of(part, input_latent, draw) for draw, part in enumerate(latent.unbind())]
            return type(latent)(made)
        return self.of(latent, input_latent, 0)

    def of(self, latent, input_latent, draw):
        indices = input_latent.get("batch_index")
        seeds = seeds_of(self.seed, range(len(latent)) if indices is None else indices)
        return epskernels.normal(seeds, tuple(latent.shape[1:]), draw=draw, stream=1)


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [EpsilonScalingFused, EpskernelsSampler, EpskernelsNoise]


async def comfy_entrypoint():
    return Extension()
