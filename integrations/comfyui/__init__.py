"""A ComfyUI node: Epsilon Scaling of any model, after guidance, by epskernels.k_diffusion.scale_denoised.

Copy this folder to ComfyUI/custom_nodes/epskernels-comfyui, and install epskernels beside ComfyUI: see README.md.
"""

import importlib
import importlib.util
import pathlib
import re

import torch

HOW = "in ComfyUI's Python environment, in a checkout of epskernels: pip install --no-deps ."


def _check_installation():
    """Raises ImportError, in one line, if a package is missing, hidden or too old."""
    found = importlib.util.find_spec("epskernels")
    if found is None:
        raise ImportError(f"epskernels is not installed; {HOW}")
    here = pathlib.Path(__file__).resolve().parent
    if found.origin and pathlib.Path(found.origin).resolve().parent == here:
        raise ImportError(
            f"the folder {here} hides the package epskernels, whose name it has; rename it to epskernels-comfyui"
        )
    _check_version("torch", (2, 11), "update ComfyUI's torch")
    _check_version("epskernels", (0, 1), HOW)


def _check_version(package, needed, how):
    version = importlib.import_module(package).__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < needed:
        wanted = ".".join(str(part) for part in needed)
        raise ImportError(f"this node needs {package} {wanted} or newer, and {version} is installed; {how}")


_check_installation()

from epskernels.k_diffusion import is_flow, scale_denoised  # noqa: E402
from epskernels.scaling import NOISE_ALONE  # noqa: E402

SCALING = {"min": 0.5, "max": 1.5, "step": 0.0005, "round": False}


class EpsilonScalingFused:
    """lambda of arXiv 2308.15321 for a model: the noise that it predicts is divided by it."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/sampling"
    DESCRIPTION = "Divides the predicted noise by lambda, after guidance. 1 changes nothing; 1.005 is a common start."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "eps_scaling": (
                    "FLOAT",
                    {"default": 1.005, **SCALING, "tooltip": "lambda; in 'linear', of the first step."},
                ),
                "schedule": (
                    ["uniform", "linear"],
                    {
                        "default": "uniform",
                        "tooltip": "uniform: eps_scaling in all steps. linear: from eps_scaling in the sampler's first "
                        "step to at_the_end in its last, by equal amounts from step to step.",
                    },
                ),
                "at_the_end": (
                    "FLOAT",
                    {"default": 1.005, **SCALING, "tooltip": "lambda of the last step; 'uniform' does not read it."},
                ),
                "flow": (
                    ["noise", "velocity"],
                    {
                        "default": "noise",
                        "tooltip": "What lambda divides in flow models (Flux, SD3, AuraFlow, ...). noise: eps of "
                        "x = (1 - sigma)*x_0 + sigma*eps, as everywhere in epskernels. velocity: eps - x_0, as in "
                        "ComfyUI's own node, where the same lambda does a tenth or less. Other models do not read it.",
                    },
                ),
            },
        }

    def patch(self, model, eps_scaling, schedule, at_the_end, flow):
        patched = model.clone()
        if schedule == "uniform":
            at_the_end = eps_scaling
        if eps_scaling == at_the_end == 1:
            return (patched,)

        def scale(args):
            """The hook after guidance. What it knows of the model is read here, once all other patches are in place."""
            x = args["input"]
            wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
            sigma = args["sigma"].reshape(-1).to(wide).expand(len(x))
            lambda_t = torch.full_like(sigma, eps_scaling)
            if schedule == "linear":
                lambda_t = lambda_t + (at_the_end - eps_scaling) * along(sigma, args["model_options"])
            alpha = torch.ones_like(sigma)
            if is_flow(args["model"].model_sampling):
                if flow == "velocity":
                    return scale_denoised(x, args["denoised"], lambda_t)
                alpha = 1 - sigma
            alone = alpha < NOISE_ALONE * sigma  # x says nothing of x_0: only 1 has a meaning
            lambda_t, alpha = (torch.where(alone, 1.0, value) for value in (lambda_t, alpha))
            return scale_denoised(x, args["denoised"], lambda_t, alpha)

        patched.set_model_sampler_post_cfg_function(scale)
        return (patched,)


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


NODE_CLASS_MAPPINGS = {"EpsilonScalingFused": EpsilonScalingFused}
NODE_DISPLAY_NAME_MAPPINGS = {"EpsilonScalingFused": "Epsilon Scaling (fused)"}
