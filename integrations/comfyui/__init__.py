"""A ComfyUI node: Epsilon Scaling of any model, after guidance, by epskernels.k_diffusion.scale_denoised.

Put this folder into ComfyUI/custom_nodes, in an environment with epskernels. Written against ComfyUI's model patcher and its
hook after classifier-free guidance; tested against a stand-in of both, not run inside ComfyUI.
"""

from epskernels.k_diffusion import scale_denoised
from epskernels.scaling import NOISE_ALONE


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
                "eps_scaling": ("FLOAT", {"default": 1.005, "min": 0.5, "max": 1.5, "step": 0.0005, "round": False}),
            },
            "optional": {
                # A linear schedule: lambda goes from eps_scaling, at the noisiest level, to this at the cleanest.
                "at_the_end": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.5, "step": 0.0005, "round": False}),
            },
        }

    def patch(self, model, eps_scaling, at_the_end=0.0):
        patched = model.clone()
        sampling = patched.get_model_object("model_sampling")
        flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)  # x = (1 - sigma)*x_0 + sigma*eps
        noisiest, cleanest = float(sampling.sigma_max), float(sampling.sigma_min)
        reads = flow or at_the_end > 0 or NOISE_ALONE * noisiest > 1  # a zero terminal SNR is written as some thousands

        def scale(args):
            """The hook: {"denoised", "input", "sigma", ...} -> denoised."""
            denoised, x, lambda_t = args["denoised"], args["input"], eps_scaling
            sigma = float(args["sigma"].flatten()[0]) if reads else 0.0  # back from the device
            if at_the_end > 0:
                along = (noisiest - sigma) / (noisiest - cleanest)
                lambda_t += (at_the_end - eps_scaling) * min(max(along, 0.0), 1.0)
            alpha = 1 - sigma if flow else 1.0
            if lambda_t == 1 or alpha < NOISE_ALONE * sigma:  # no other lambda has a meaning there
                return denoised
            return scale_denoised(x, denoised, lambda_t, alpha)

        patched.set_model_sampler_post_cfg_function(scale)
        return (patched,)


NODE_CLASS_MAPPINGS = {"EpsilonScalingFused": EpsilonScalingFused}
NODE_DISPLAY_NAME_MAPPINGS = {"EpsilonScalingFused": "Epsilon Scaling (fused)"}
