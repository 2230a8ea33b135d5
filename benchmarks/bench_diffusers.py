"""Host time and operations of a step: the schedulers of epskernels.diffusers beside diffusers' own, one table.

    make bench-diffusers    # or: python benchmarks/bench_diffusers.py [--only REGEX] [--json FILE]

Whole trajectories of small latents, where the step is all overhead; the results are compared before anything is timed. Operations
are counted as the dispatcher sees them, views among them. Blocks, rounds and intervals as in bench.py.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import diffusers
import harness
import numpy as np
import torch
from diffusers.utils import is_torchsde_available
from harness import OURS, Comparison
from torch.utils._python_dispatch import TorchDispatchMode

from epskernels import build
from epskernels import diffusers as fused

THEIRS, SHAPE, STEPS = "diffusers", (1, 4, 16, 16), 20


def plain(scheduler, f, i, t, x, before, call):
    """The results of a step, x' first. before: those of the step before, or None."""
    return scheduler.step(f, t, x, return_dict=False, **call)


def wuerstchen(scheduler, f, i, t, x, before, call):
    return scheduler.step(f, t.expand(len(x)), x, return_dict=False)


def cogvideo(scheduler, f, i, t, x, before, call):
    back = scheduler.timesteps[i - 1] if i else None
    return scheduler.step(f, before and before[1], t, back, x)


def predicted(scheduler, f, i, t, x, before, call):
    return scheduler.step_pred(f, t, x, return_dict=False)


def repainted(scheduler, f, i, t, x, before, call):
    return scheduler.step(f, t, x, torch.zeros(SHAPE), torch.ones(SHAPE), return_dict=False)


def corrected(scheduler, f, i, t, x, before, call):
    """KarrasVe's step, and its correction."""
    sigma_hat, sigma_prev = scheduler.schedule[STEPS - 1 - i], scheduler.schedule[STEPS - 2 - i] if i < STEPS - 1 else 0
    state, derivative = scheduler.step(f, sigma_hat, sigma_prev, x, return_dict=False)
    if i == STEPS - 1:
        return (state,)
    return scheduler.step_correct(f, sigma_hat, sigma_prev, x, state, derivative, return_dict=False)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A scheduler, its configuration, the arguments of step, how many times faster it is to be, and our seeds, if any.

    steps: set_timesteps' arguments. go: how a step is called. calls: of the model, where there are more timesteps.
    """

    name: str
    config: dict = dataclasses.field(default_factory=dict)
    call: dict = dataclasses.field(default_factory=dict)
    times: float | None = None
    seeds: tuple | None = None
    steps: dict = dataclasses.field(default_factory=lambda: {"num_inference_steps": STEPS})
    go: object = plain
    calls: int | None = None


SDE, SIGMA_MIN = {"algorithm_type": "sde-dpmsolver++"}, {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
QUICK = {"num_train_timesteps": 100}  # KDPM2 computes a timestep for each of the training's, one by one
FIRST, MULTISTEP = 2, 5  # how many times faster
KINDS = {
    "DDPM": Kind("DDPMScheduler", times=10),
    "DDPM, seeds": Kind("DDPMScheduler", seeds=(7,), times=10),
    "DDPMParallel": Kind("DDPMParallelScheduler", times=FIRST),
    "UnCLIP": Kind("UnCLIPScheduler", times=FIRST),
    "DDIM": Kind("DDIMScheduler", times=5),
    "DDIM, eta 1": Kind("DDIMScheduler", call={"eta": 1.0}),
    "DDIMParallel": Kind("DDIMParallelScheduler", times=FIRST),
    "DDIMInverse": Kind("DDIMInverseScheduler", times=FIRST),
    "CogVideoXDDIM": Kind("CogVideoXDDIMScheduler", times=FIRST),
    "CogVideoXDPM": Kind("CogVideoXDPMScheduler", go=cogvideo, times=MULTISTEP),
    "DDPMWuerstchen": Kind("DDPMWuerstchenScheduler", go=wuerstchen, calls=STEPS, times=FIRST),
    "RePaint": Kind("RePaintScheduler", go=repainted, times=FIRST),
    "ScoreSdeVe": Kind("ScoreSdeVeScheduler", go=predicted, times=FIRST),
    "KarrasVe": Kind("KarrasVeScheduler", {"s_churn": 0.0}, go=corrected),
    "EulerDiscrete": Kind("EulerDiscreteScheduler", times=FIRST),
    "EulerDiscrete, churn": Kind("EulerDiscreteScheduler", call={"s_churn": 4.0}),
    "EulerAncestralDiscrete": Kind("EulerAncestralDiscreteScheduler", times=FIRST),
    "HeunDiscrete": Kind("HeunDiscreteScheduler"),
    "KDPM2Discrete": Kind("KDPM2DiscreteScheduler", QUICK),
    "KDPM2AncestralDiscrete": Kind("KDPM2AncestralDiscreteScheduler", QUICK),
    "DPMSolverMultistep, dpmsolver++ 2M": Kind("DPMSolverMultistepScheduler", times=8),
    "DPMSolverMultistep, dpmsolver++ 3M": Kind("DPMSolverMultistepScheduler", {"solver_order": 3}, times=8),
    "DPMSolverMultistep, sde-dpmsolver++ 2M": Kind("DPMSolverMultistepScheduler", SDE, times=8),
    "DPMSolverMultistep, dpmsolver 2M": Kind(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **SIGMA_MIN}, times=MULTISTEP
    ),
    "DPMSolverMultistep, thresholding": Kind("DPMSolverMultistepScheduler", {"thresholding": True}),
    "DPMSolverMultistepInverse": Kind("DPMSolverMultistepInverseScheduler", times=MULTISTEP),
    "DPMSolverSinglestep": Kind("DPMSolverSinglestepScheduler", times=MULTISTEP),
    "UniPCMultistep, bh2 order 2": Kind("UniPCMultistepScheduler", times=15),
    "UniPCMultistep, bh2 order 3": Kind("UniPCMultistepScheduler", {"solver_order": 3}, times=15),
    "UniPCMultistep, flow": Kind("UniPCMultistepScheduler", FLOW, times=15),
    "SASolver": Kind("SASolverScheduler", times=MULTISTEP),
    "SASolver, seeds": Kind("SASolverScheduler", seeds=(7,), times=MULTISTEP),
    "PNDM": Kind("PNDMScheduler", {"skip_prk_steps": True}, times=MULTISTEP),
    "LMSDiscrete": Kind("LMSDiscreteScheduler", times=MULTISTEP),
    "IPNDM": Kind("IPNDMScheduler", times=MULTISTEP),
    "DEISMultistep": Kind("DEISMultistepScheduler", times=MULTISTEP),
    "EDMEuler": Kind("EDMEulerScheduler", times=FIRST),
    "EDMDPMSolverMultistep": Kind("EDMDPMSolverMultistepScheduler", times=MULTISTEP),
    "LCM": Kind("LCMScheduler", times=FIRST),
    "TCD": Kind("TCDScheduler", times=FIRST),
    "SCM": Kind(
        "SCMScheduler", steps={"num_inference_steps": STEPS, "intermediate_timesteps": None}, calls=STEPS, times=FIRST
    ),
    "CMStochasticIterative": Kind("CMStochasticIterativeScheduler", times=FIRST),
    "ConsistencyDecoder": Kind("ConsistencyDecoderScheduler", steps={"num_inference_steps": 2}, times=FIRST),
    "FlowMatchEulerDiscrete": Kind("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, times=FIRST),
    "FlowMatchEulerDiscrete, stochastic": Kind(
        "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, times=FIRST
    ),
    "FlowMatchHeunDiscrete": Kind("FlowMatchHeunDiscreteScheduler"),
    "FlowMatchLCM": Kind("FlowMatchLCMScheduler", times=FIRST),
    "FlowMapEulerDiscrete": Kind("FlowMapEulerDiscreteScheduler", times=FIRST),
    "LTXEulerAncestralRF": Kind("LTXEulerAncestralRFScheduler", times=FIRST),
    "MiniMaxH3": Kind("MiniMaxH3Scheduler", times=FIRST, steps={"num_inference_steps": STEPS + 1}),
    "Helios": Kind("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]}, times=MULTISTEP),
}
if is_torchsde_available():  # whose motions cost more than all else
    KINDS |= {
        "CosineDPMSolverMultistep": Kind("CosineDPMSolverMultistepScheduler"),
        "DPMSolverSDE": Kind("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}),
    }
LASTING = ("_seen", "noise_sampler", "num_inference_steps")  # what a trajectory does not begin anew with


def trajectory(kind, package):
    """A function that runs the steps after set_timesteps again and again, given outputs instead of a model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers about itself
        scheduler = getattr(package, kind.name)(**kind.config)
        scheduler.set_timesteps(**kind.steps)
        if hasattr(scheduler, "set_sigmas"):
            scheduler.set_sigmas(STEPS)
    scheduler.is_scale_input_called = True
    timesteps, x0, f = list(scheduler.timesteps)[: kind.calls], torch.randn(SHAPE), torch.randn(SHAPE)
    begin = {
        name: value
        for name, value in vars(scheduler).items()
        if name not in LASTING and (value is None or isinstance(value, (int, list)))
    }

    def run():
        vars(scheduler).update(
            {name: list(value) if isinstance(value, list) else value for name, value in begin.items()}
        )
        x, result = x0, None
        for i, t in enumerate(timesteps):
            result = kind.go(scheduler, f, i, t, x, result, kind.call)
            x = result[0]
        return x

    run.scheduler, run.steps = scheduler, len(timesteps)
    return run


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def ops(run):
    """Operations of a step, on average over the trajectory."""
    run()
    with Count() as count:
        run()
    return count.calls / run.steps


def made(kind):
    torch.manual_seed(1)
    ours = trajectory(kind, fused)
    torch.manual_seed(1)
    theirs = trajectory(kind, diffusers.schedulers)
    results = []
    for run in (ours, theirs):
        torch.manual_seed(2)
        results.append(run())
    # Whatever outputs, not a denoiser's: errors relative to the largest.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4 * float(results[1].abs().max()))
    assert ours.scheduler.path == "fused", ours.scheduler.path
    if kind.seeds is not None:
        ours.scheduler.seeds = kind.seeds
    return {OURS: ours, THEIRS: theirs}


def comparisons(names):
    return [
        Comparison(
            "scheduler", name, lambda kind=kind: made(kind), targets={THEIRS: 1 / kind.times} if kind.times else {}
        )
        for name, kind in KINDS.items()
        if name in names
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only schedulers whose name holds this expression")
    parser.add_argument("--json", default="benchmarks/results/diffusers.json")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--one-pass", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if build.why_missing():
        raise SystemExit(f"bench: {build.why_missing()}")
    torch.set_grad_enabled(False)
    wanted = comparisons(harness.asked(parser, args.only, list(KINDS)))
    if args.one_pass:
        found = {comparison.name: harness.time_block(comparison, 7, 0.02) for comparison in wanted}
        args.one_pass.write_text(json.dumps(found))
        return
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.blocks):
            path = pathlib.Path(folder) / f"{i}.json"
            command = [sys.executable, __file__, "--only", args.only, "--one-pass", path]
            subprocess.run([str(part) for part in command], check=True)
            blocks.append(json.loads(path.read_text()))
    results = {"schema": harness.SCHEMA, "machine": harness.about(), "shape": SHAPE, "steps": STEPS, "rows": []}
    print(json.dumps(results["machine"]))
    print("| scheduler | times less host time | interval of 95 % | at least | ops, diffusers | ops, fused |")
    print("|---|---|---|---|---|---|")
    for comparison in wanted:
        measured = [{name: np.array(times) for name, times in block[comparison.name].items()} for block in blocks]
        (row,) = harness.rows_of(comparison, measured)
        counted = {name: ops(run) for name, run in made(KINDS[comparison.name]).items()}
        results["rows"].append(row | {"ops": counted[OURS], "ops_of_peer": counted[THEIRS]})
        low, high = row["interval"]
        least = "" if row["target"] is None else f"{1 / row['target']:.0f}{'' if row['met'] else ' NOT MET'}"
        times = f"| {row['name']} | {1 / row['ratio']:.1f} | [{1 / high:.1f}, {1 / low:.1f}] | {least} "
        print(f"{times}| {counted[THEIRS]:.1f} | {counted[OURS]:.1f} |", flush=True)
    harness.save(args.json, results)
    missed = [row["name"] for row in results["rows"] if row["met"] is False]
    print(f"{len(results['rows'])} schedulers, {len(missed)} targets not met; written to {args.json}")


if __name__ == "__main__":
    main()
