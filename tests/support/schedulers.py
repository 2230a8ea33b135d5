"""Which schedulers a test may call alike: step(model_output, timestep, sample), with one timestep for the batch."""

import inspect

from epskernels import diffusers as fused

_COMMON = ["self", "model_output", "timestep", "sample"]
_TIMESTEP_OF_EACH_SAMPLE = "DDPMWuerstchenScheduler"
OF_ALPHAS = ("DDPM", "DDIM", "UnCLIP", "CogVideoX", "LCM", "TCD", "PNDM")  # whose rows are made of alphas_cumprod


def _called_alike(twin):
    if not hasattr(twin, "step"):
        return False
    parameters = inspect.signature(twin.step).parameters.items()
    return [name for name, p in parameters if p.default is p.empty] == _COMMON


ALIKE = {
    twin.__name__: twin
    for twin in fused.FUSED.values()
    if _called_alike(twin) and twin.__name__ != _TIMESTEP_OF_EACH_SAMPLE
}
# diffusers' constructors of these compute a timestep for each of the training's, one by one: 0.2 s for 1,000.
QUICK = {
    name: {"num_train_timesteps": 100, "beta_start": 0.0085, "beta_end": 0.12}
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
}
