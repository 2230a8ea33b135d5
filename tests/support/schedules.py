"""What set_timesteps has to be called with, by the scheduler's class."""

OF_MOTIONS = ("CosineDPMSolverMultistepScheduler",)  # whose noise torchsde makes
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
