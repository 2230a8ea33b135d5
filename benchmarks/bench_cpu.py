"""The CPU kernel side by side with what it replaces: ratios of medians, interleaved in one process.

    make bench-cpu            # or: python benchmarks/bench_cpu.py [--json FILE] [--rounds N]

Correctness is asserted before anything is timed. A ratio below 1 means that epskernels takes less time.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler

import epskernels
from epskernels import build, samplers, schedule

FLOAT = torch.float32
DETERMINISTIC = samplers.ddim(schedule.linear(), 20, scaling=1.005, clip=1.0)
STOCHASTIC = samplers.ddpm(schedule.linear(), 20, scaling=1.005)
ROW = 7


def functional_step(x, f, row):
    """The same formula as a user writes it for torch.compile; the row is a tensor, so that no step recompiles."""
    d_x, d_f, clip, c_x, c_m0 = row[0], row[1], row[2], row[4], row[6]
    m0 = torch.clamp(d_x * x + d_f * f, -clip, clip)
    return c_x * x + c_m0 * m0


def functional_noisy_step(x, f, row):
    return functional_step(x, f, row) + row[10] * torch.randn_like(x)


def interleaved(contenders, rounds, seconds=0.02):
    """Seconds per call: for each name, one median per round; A B A B, so that a noisy machine hurts all."""
    calls = {}
    for name, run in contenders.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def compare(title, target, ours, peer, rounds):
    """A row of the report: median of the rounds' ratios ours/peer, and its quartiles."""
    times = interleaved({"ours": ours, "peer": peer}, rounds)
    ratios = [a / b for a, b in zip(times["ours"], times["peer"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    met = median <= target
    print(
        f"{title:<66} {median:8.3f}  [{low:.3f}, {high:.3f}]  {target:8.3f}  {'met' if met else 'NOT MET'}", flush=True
    )
    return {"title": title, "ratio": median, "quartiles": [low, high], "target": target, "met": met}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", help="write the results here too")
    args = parser.parse_args()
    if build.why_missing():
        raise SystemExit(f"bench_cpu: {build.why_missing()}")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    step, index = epskernels.step, DETERMINISTIC.row_index[ROW]
    results = []
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "epskernels")}
    info = {**versions, "cpu_capability": build.extension().cpu_capability(), "threads": torch.get_num_threads()}
    print(f"{info}\n{platform.processor() or platform.machine()}; {args.rounds} rounds")
    print(f"{'time of epskernels / time of the peer':<66} {'median':>8}  [quartiles]       target")

    def inputs(shape):
        return torch.randn(shape), torch.randn(shape), torch.empty(shape)

    def row(*comparison):
        results.append(compare(*comparison, args.rounds))

    # ---- correctness first ----
    x, f, y = inputs((3, 3, 67, 5))
    seeds = torch.arange(3)
    torch.testing.assert_close(step(x, f, DETERMINISTIC, ROW), functional_step(x, f, DETERMINISTIC.rows[ROW]))
    with epskernels.use_backend("reference"):
        expected = step(x, f, STOCHASTIC, ROW, seeds=seeds)
    assert torch.equal(step(x, f, STOCHASTIC, ROW, seeds=seeds), expected)
    compiled = torch.compile(functional_step, dynamic=False)
    compiled_noisy = torch.compile(functional_noisy_step, dynamic=False)

    # ---- the limit: the same bytes ----
    shape = (16, 3, 256, 256)
    x, f, y = inputs(shape)
    seeds = torch.arange(16)
    row(f"step, out=, {shape} / torch.add(x, f, out=y)", 1.1,
        lambda: step(x, f, DETERMINISTIC, ROW, out=y), lambda: torch.add(x, f, out=y))  # fmt: skip
    row(f"step with noise, out=, {shape} / torch.randn alone", 0.35,
        lambda: step(x, f, STOCHASTIC, ROW, seeds=seeds, out=y), lambda: torch.randn(shape))  # fmt: skip

    # ---- torch.compile of the same step ----
    for shape in ((1, 4, 64, 64), (16, 4, 64, 64), (16, 3, 256, 256)):
        x, f, y = inputs(shape)
        seeds, coefficients = torch.arange(shape[0]), DETERMINISTIC.rows[ROW]
        noisy_coefficients = STOCHASTIC.rows[ROW]
        row(f"step, {shape} / torch.compile", 1.0,
            lambda: step(x, f, DETERMINISTIC, ROW), lambda: compiled(x, f, coefficients))  # fmt: skip
        row(f"step with noise, {shape} / torch.compile with randn_like", 0.1,
            lambda: step(x, f, STOCHASTIC, ROW, seeds=seeds),
            lambda: compiled_noisy(x, f, noisy_coefficients))  # fmt: skip

    # ---- diffusers ----
    shape = (1, 4, 64, 64)
    x, f, y = inputs(shape)
    seeds = torch.arange(1)
    for scheduler, table, target in ((DDPMScheduler(), STOCHASTIC, 1 / 10), (DDIMScheduler(), DETERMINISTIC, 1 / 8)):
        scheduler.set_timesteps(20)
        t = scheduler.timesteps[ROW]
        noise = {"seeds": seeds} if table is STOCHASTIC else {}
        row(f"step, {shape} / diffusers' {type(scheduler).__name__}.step", target,
            lambda: step(x, f, table, ROW, **noise), lambda: scheduler.step(f, t, x, return_dict=False))  # fmt: skip

    # ---- the cost of a call ----
    x, f, y = inputs((1, 1024))
    op, rows = torch.ops.epskernels.step.default, DETERMINISTIC.rows
    row("torch.ops.epskernels.step, 1,024 elements / torch.add(x, f)", 4.0,
        lambda: op(x, f, rows, index), lambda: torch.add(x, f))  # fmt: skip
    row("epskernels.step, 1,024 elements / torch.add(x, f)", 4.0,
        lambda: step(x, f, DETERMINISTIC, ROW), lambda: torch.add(x, f))  # fmt: skip

    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": info, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
