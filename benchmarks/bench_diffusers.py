"""Host time and operations of a step: the schedulers of epskernels.diffusers beside diffusers' own, one table.

    make bench-diffusers    # or: python benchmarks/bench_diffusers.py [--only REGEX] [--json FILE]

Whole trajectories of small latents, where the step is all overhead; the results are compared before anything is timed. Operations
are counted as the dispatcher sees them, views among them. Blocks, rounds and intervals as in bench.py.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings

import diffusers
import harness
import numpy as np
import torch
from harness import OURS, Comparison
from torch.utils._python_dispatch import TorchDispatchMode

from epskernels import build
from epskernels import diffusers as fused

THEIRS, SHAPE, STEPS = "diffusers", (1, 4, 16, 16), 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """A scheduler, its configuration, the arguments of step, how many times faster it is to be, and our seeds, if any."""

    name: str
    config: dict = dataclasses.field(default_factory=dict)
    call: dict = dataclasses.field(default_factory=dict)
    times: float | None = None
    seeds: tuple | None = None


SDE, SIGMA_MIN = {"algorithm_type": "sde-dpmsolver++"}, {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KINDS = {
    "DDPM": Kind("DDPMScheduler", times=10),
    "DDPM, seeds": Kind("DDPMScheduler", seeds=(7,), times=10),
    "DDIM": Kind("DDIMScheduler", times=5),
    "DDIM, eta 1": Kind("DDIMScheduler", call={"eta": 1.0}),
    "EulerDiscrete": Kind("EulerDiscreteScheduler", times=2),
    "EulerDiscrete, churn": Kind("EulerDiscreteScheduler", call={"s_churn": 4.0}),
    "EulerAncestralDiscrete": Kind("EulerAncestralDiscreteScheduler"),
    "HeunDiscrete": Kind("HeunDiscreteScheduler"),
    "DPMSolverMultistep, dpmsolver++ 2M": Kind("DPMSolverMultistepScheduler", times=8),
    "DPMSolverMultistep, dpmsolver++ 3M": Kind("DPMSolverMultistepScheduler", {"solver_order": 3}, times=8),
    "DPMSolverMultistep, sde-dpmsolver++ 2M": Kind("DPMSolverMultistepScheduler", SDE, times=8),
    "DPMSolverMultistep, dpmsolver 2M": Kind(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **SIGMA_MIN}
    ),
    "DPMSolverMultistep, thresholding": Kind("DPMSolverMultistepScheduler", {"thresholding": True}),
    "UniPCMultistep, bh2 order 2": Kind("UniPCMultistepScheduler", times=15),
    "UniPCMultistep, bh2 order 3": Kind("UniPCMultistepScheduler", {"solver_order": 3}, times=15),
    "UniPCMultistep, flow": Kind("UniPCMultistepScheduler", FLOW, times=15),
    "EDMEuler": Kind("EDMEulerScheduler", times=2),
    "EDMDPMSolverMultistep": Kind("EDMDPMSolverMultistepScheduler"),
    "LCM": Kind("LCMScheduler"),
    "TCD": Kind("TCDScheduler"),
    "FlowMatchEulerDiscrete": Kind("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, times=2),
    "FlowMatchEulerDiscrete, stochastic": Kind("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}


def trajectory(kind, package):
    """A function that runs the steps after set_timesteps again and again, given outputs instead of a model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers about itself
        scheduler = getattr(package, kind.name)(**kind.config)
        scheduler.set_timesteps(STEPS)
    scheduler.is_scale_input_called = True
    timesteps, x0, f = list(scheduler.timesteps), torch.randn(SHAPE), torch.randn(SHAPE)
    begin = {
        name: value
        for name, value in {
            "_step_index": None, "lower_order_nums": 0, "last_sample": None, "dt": None, "prev_derivative": None,
            "model_outputs": [None] * getattr(scheduler.config, "solver_order", 1),
        }.items()
        if name in vars(scheduler)
    }  # fmt: skip

    def run():
        vars(scheduler).update(
            {name: list(value) if isinstance(value, list) else value for name, value in begin.items()}
        )
        x = x0
        for t in timesteps:
            x = scheduler.step(f, t, x, return_dict=False, **kind.call)[0]
        return x

    run.scheduler = scheduler
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
    return count.calls / len(run.scheduler.timesteps)


def made(kind):
    torch.manual_seed(1)
    ours = trajectory(kind, fused)
    torch.manual_seed(1)
    theirs = trajectory(kind, diffusers)
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


def comparisons(only):
    return [
        Comparison(
            "scheduler", name, lambda kind=kind: made(kind), targets={THEIRS: 1 / kind.times} if kind.times else {}
        )
        for name, kind in KINDS.items()
        if re.search(only, name)
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
    wanted = comparisons(args.only)
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
