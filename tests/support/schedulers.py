"""How schedulers are called, by their class: which have step(model_output, timestep, sample), and set_timesteps' arguments."""

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
IN_HALVES = ("HeunDiscrete", "FlowMatchHeun", "KDPM2", "DPMSolverSDE")  # a step may not begin at its second half
# What tests construct these with. KDPM2: diffusers computes a timestep for each of the training's, one by one: 0.2 s for 1,000.
CONFIGS = {
    name: {"num_train_timesteps": 100, "beta_start": 0.0085, "beta_end": 0.12}
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
} | {"DPMSolverSDEScheduler": {"noise_sampler_seed": 3}}
OF_MOTIONS = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")  # whose noise torchsde makes
ONE_SCHEDULE = ("ConsistencyDecoderScheduler",)  # of two steps


def times(scheduler):
    """The timesteps at which the model is called: SCM's last is where the last step ends."""
    return scheduler.timesteps[: len(scheduler.timesteps) - ("SCM" in type(scheduler).__name__)]


def set_steps(scheduler, steps):
    """A schedule of so many steps."""
    name = type(scheduler).__name__
    if name == "SCMScheduler":
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
    elif name == "HeliosScheduler":
        scheduler.set_timesteps(steps, stage_index=1)
    else:
        scheduler.set_timesteps(steps + (name == "MiniMaxH3Scheduler"))  # which counts the ends of its steps
