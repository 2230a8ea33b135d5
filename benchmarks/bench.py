"""The step beside what users would pick instead, on this machine.

    make bench            # six passes; or: python benchmarks/bench.py [--full] [--only REGEX] [--json FILE]
    make bench-full       # more sizes, more rounds
    python benchmarks/bench.py --passes 1 --only '^feature: plain'     # a part of it; on a busy machine its intervals are wide

Three questions: how close to the limit (a copy of the same bytes), how much faster than the alternatives, how cost grows.
Correctness is asserted before anything is timed. With a GPU, bench_gpu.py runs too and its results are part of the file.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import harness
import numpy as np
import peers
import torch
from harness import OURS, Comparison

import epskernels
from epskernels import build, corrections, models, samplers, schedule

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
COPY, COMPILED, EAGER = "a copy of the same bytes", "torch.compile", "eager PyTorch"
ROW, LATENT, IMAGES = 7, (16, 4, 64, 64), (16, 3, 256, 256)
VP = {"schedule": schedule.linear(), "steps": 20, "scaling": 1.005}
KARRAS = schedule.KarrasSchedule()
BAND = corrections.dcw(-0.1, 0.05)
FEATURES = {  # the table, the further inputs, and the functional step
    "plain": (samplers.ddim(**VP, clip=1.0), (), peers.plain),
    "guidance": (samplers.ddim(**VP, clip=1.0, guidance=7.5), ("u",), peers.guidance),
    "history": (samplers.dpmpp_2m(**VP), ("m1",), peers.history),
    "noise": (samplers.ddpm(**VP), ("seeds",), peers.noise),
    "guidance and noise": (samplers.ddpm(**VP, guidance=7.5), ("u", "seeds"), peers.guidance_noise),
    "band": (samplers.ddim(**VP, clip=1.0, correction=BAND), (), peers.band),
    "band and noise": (samplers.ddpm(**VP, correction=BAND), ("seeds",), peers.band_noise),
    "learned variance": (samplers.ddpm(**VP, variance="learned_range"), ("v", "seeds"), peers.learned),
}
step = epskernels.step


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def tensors_of(shape, dtype, names):
    """x, f, and the named inputs of a step."""
    tensors = {name: torch.randn(shape, dtype=dtype) for name in ("x", "f", *names) if name != "seeds"}
    return tensors | ({"seeds": torch.arange(shape[0])} if "seeds" in names else {})


def check(feature, dtype):
    """Ours has the reference's bits, and the peer's formula comes close to it."""
    table, names, function = FEATURES[feature]
    tensors = tensors_of((3, 3, 67, 5), dtype, names)
    keeps = {"return_m0": True} if feature == "history" else {}
    x, f = tensors.pop("x"), tensors.pop("f")
    got = step(x, f, table, ROW, **tensors, **keeps)
    expected = step(x, f, table, ROW, **tensors, **keeps, backend="reference")
    for a, b in zip(*((r if keeps else (r,)) for r in (got, expected)), strict=True):
        assert torch.equal(a, b), f"{feature}: not the reference's bits"
    seeds = tensors.pop("seeds", None)
    z = None if seeds is None else epskernels.normal(seeds, x.shape[1:], draw=ROW, stream=0)
    if feature.startswith("band"):
        theirs = peers.band(x, f, table.rows[ROW], z=z)
    else:
        theirs = peers.functional_step(x, f, table.rows[ROW], **tensors, z=z)[0]
    tolerance = {} if dtype == FLOAT else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(theirs, got[0] if keeps else got, **tolerance)


# ---- comparisons ----


def a_copy(numel):
    """Copies that many bytes in all: half of them read, half written."""
    a, b = torch.randn(numel // 8), torch.empty(numel // 8)
    return lambda: b.copy_(a)


def step_and_peers(feature, shape, dtype, wanted):
    """Ours, into a new tensor as the peers do, and the wanted ones of them."""

    def make():
        check(feature, dtype)
        table, names, function = FEATURES[feature]
        tensors = tensors_of(shape, dtype, names)
        given = {name: tensors[name] for name in names}
        x, f, rows = tensors["x"], tensors["f"], table.rows[ROW]
        keeps = {"return_m0": True} if feature == "history" else {}
        arguments = [x, f, rows, *(given[name] for name in names if name != "seeds")]
        moved = len([name for name in names if name != "seeds"]) + 3 + bool(keeps)
        y = torch.empty_like(x)
        fused = compiled(function) if COMPILED in wanted else None
        peers_by_name = {
            COPY: a_copy(moved * x.nbytes),
            COMPILED: lambda: fused(*arguments),
            EAGER: lambda: function(*arguments),
            "torch.add(x, f, out=)": lambda: torch.add(x, f, out=y),
            "torch.randn alone": lambda: torch.randn(shape, dtype=dtype),
        }
        ours = {OURS: lambda: step(x, f, table, ROW, **given, **keeps)}
        return ours | {name: peers_by_name[name] for name in wanted}

    return make


def into_out(feature, shape, wanted):
    """Ours written into a given tensor, beside peers that do so too: what a new one costs is the operating system's affair."""

    def make():
        contenders = step_and_peers(feature, shape, FLOAT, [name for name in wanted if name != COMPILED])()
        table, names, function = FEATURES[feature]
        tensors = tensors_of(shape, FLOAT, names)
        x, f, y = tensors.pop("x"), tensors.pop("f"), torch.empty(shape)
        contenders[OURS] = lambda: step(x, f, table, ROW, **tensors, out=y)
        if COMPILED in wanted:
            fused, rows, z = (
                compiled(lambda z, *arguments: z.copy_(function(*arguments))),
                table.rows[ROW],
                torch.empty(shape),
            )
            contenders[COMPILED] = lambda: fused(z, x, f, rows)
        return contenders

    return make


def by_size(full):
    """Beside the limit and torch.compile, all into given tensors."""
    for power in range(3, 9 if full else 8):
        shape, axes = (1, 10**power), {"numel": 10**power}
        for feature, target in (("plain", 1.0), ("noise", 0.1)):
            if power == 8 and feature == "noise":
                continue  # PyTorch's generator alone would take minutes
            both = axes | {"feature": feature}
            beside = into_out(feature, shape, [COPY, COMPILED])
            yield Comparison("size", f"{feature} into out, 10^{power}", beside, both, {COMPILED: target})


def by_limit():
    yield Comparison("limit", f"plain into out, {IMAGES}", into_out("plain", IMAGES, ["torch.add(x, f, out=)", COPY]),
                     {"shape": IMAGES}, {"torch.add(x, f, out=)": 1.1})  # fmt: skip
    yield Comparison("limit", f"noise into out, {IMAGES}", into_out("noise", IMAGES, ["torch.randn alone"]),
                     {"shape": IMAGES}, {"torch.randn alone": 0.35})  # fmt: skip


def by_feature():
    for feature in FEATURES:
        for shape in (LATENT, IMAGES):
            yield Comparison("feature", f"{feature}, {shape}", step_and_peers(feature, shape, FLOAT, [COMPILED, EAGER, COPY]),
                             {"feature": feature, "shape": shape}, {COMPILED: 1.0})  # fmt: skip


def by_band():
    """A step that corrects the low band of x' beside the one that does not, both into given tensors."""
    for feature, without in (("band", "plain"), ("band and noise", "noise")):
        for shape in (LATENT, IMAGES):

            def make(feature=feature, without=without, shape=shape):
                contenders = into_out(feature, shape, [])()
                return contenders | {"without a band": into_out(without, shape, [])()[OURS]}

            yield Comparison("band", f"{feature} into out, {shape}", make, {"feature": feature, "shape": shape},
                             {"without a band": 1.25})  # fmt: skip


def by_dtype():
    for dtype in (FLOAT, BFLOAT, HALF):
        for feature in ("plain", "noise"):
            name = f"{feature}, {str(dtype).removeprefix('torch.')}, {IMAGES}"
            yield Comparison("dtype", name, step_and_peers(feature, IMAGES, dtype, [COMPILED, COPY]),
                             {"dtype": str(dtype), "feature": feature}, {COMPILED: 1.0})  # fmt: skip


def by_scheduler():
    import diffusers

    karras = {"use_karras_sigmas": True, "solver_order": 2}
    two_m = samplers.dpmpp_2m(schedule.linear(), 20)
    euler = samplers.edm_euler(KARRAS, 20)
    cases = {
        "DDPMScheduler": (diffusers.DDPMScheduler, {}, samplers.ddpm(schedule.linear(), 20), ("seeds",), 1 / 10),
        "DDIMScheduler": (diffusers.DDIMScheduler, {}, samplers.ddim(schedule.linear(), 20), (), 1 / 8),
        "EulerDiscreteScheduler": (diffusers.EulerDiscreteScheduler, {}, euler, (), None),
        "DPMSolverMultistepScheduler": (diffusers.DPMSolverMultistepScheduler, karras, two_m, ("m1",), None),
        "UniPCMultistepScheduler": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}, two_m, ("m1",), None),
        "EDMEulerScheduler": (diffusers.EDMEulerScheduler, {}, euler, (), None),
    }
    for name, (scheduler, options, table, names, target) in cases.items():
        for shape in ((1, 4, 64, 64), LATENT):

            def make(scheduler=scheduler, options=options, table=table, names=names, name=name, shape=shape):
                tensors = tensors_of(shape, FLOAT, names)
                x, f = tensors.pop("x"), tensors.pop("f")
                keeps = {"return_m0": True} if names == ("m1",) else {}
                ours = lambda: step(x, f, table, ROW, **tensors, **keeps)  # noqa: E731
                return {OURS: ours, f"diffusers' {name}": peers.scheduler_at(scheduler(**options), x, f, ROW)}

            targets = {f"diffusers' {name}": target} if target and shape[0] == 1 else {}
            yield Comparison("scheduler", f"{table.name}, {shape}, beside {name}", make, {"shape": shape}, targets)


def by_formula():
    """In sigma space, on the denoised estimate, as k-diffusion's users and EDM's have it."""
    sigma = torch.tensor(schedule.karras_sigmas(20), dtype=torch.float64)
    tables = {
        "Euler": samplers.edm_euler(KARRAS, 20), "Heun": samplers.edm_heun(KARRAS, 20),
        "DPM++ 2M": samplers.dpmpp_2m(KARRAS, 20, prediction="sample"),
    }  # fmt: skip
    before, now, after = (sigma[ROW + i].float() for i in (-1, 0, 1))

    def make(name, shape):
        x, d, other = (torch.randn(shape) for _ in range(3))
        table = tables[name]
        if name == "Euler":
            ours, theirs = lambda: step(x, d, table, ROW), lambda: peers.euler(x, d, now, after)
        elif name == "DPM++ 2M":
            ours = lambda: step(x, d, table, ROW, m1=other, return_m0=True)[0]  # noqa: E731
            theirs = lambda: peers.dpmpp_2m(x, d, other, before, now, after)  # noqa: E731
        else:
            m0 = torch.empty(shape)

            def ours():
                x_euler = step(x, d, table, 2 * ROW, m0=m0)
                return step(x_euler, other, table, 2 * ROW + 1, m1=m0)

            def theirs():
                x_euler = peers.euler(x, d, now, after)
                return peers.heun(x, x_euler, d, other, now, after)

        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
        return {OURS: ours, "the formula, eager": theirs}

    for name in tables:
        for shape in ((1, 4, 64, 64), LATENT):
            yield Comparison(
                "formula", f"{name}, {shape}", lambda name=name, shape=shape: make(name, shape), {"shape": shape}
            )


def by_batch():
    """The cost of a batch over that of one sample, into given tensors: growth."""
    for batch in (2, 4, 8, 16, 32, 64):

        def make(batch=batch):
            check("plain", FLOAT)
            table = FEATURES["plain"][0]
            x, f = torch.randn(batch, 4, 64, 64), torch.randn(batch, 4, 64, 64)
            one, other, y, z = x[:1].clone(), f[:1].clone(), torch.empty_like(x), torch.empty_like(x[:1])
            return {
                OURS: lambda: step(x, f, table, ROW, out=y),
                "one sample": lambda: step(one, other, table, ROW, out=z),
            }

        yield Comparison("batch", f"{batch} samples of (4, 64, 64)", make, {"batch": batch})


def by_growth(full):
    """The cost of a state over that of one of 1,000 elements, into given tensors: growth."""
    for power in range(4, 9 if full else 8):

        def make(numel=10**power):
            table = FEATURES["plain"][0]
            x, f, y = torch.randn(1, numel), torch.randn(1, numel), torch.empty(1, numel)
            one, other, z = torch.randn(1, 1000), torch.randn(1, 1000), torch.empty(1, 1000)
            return {
                OURS: lambda: step(x, f, table, ROW, out=y),
                "1,000 elements": lambda: step(one, other, table, ROW, out=z),
            }

        yield Comparison("growth", f"10^{power} elements", make, {"numel": 10**power})


def by_rows():
    """Distinct rows in a batch of 64, beside the same batch on one row."""
    for distinct in (1, 2, 8, 64):

        def make(distinct=distinct):
            table = samplers.ddim(schedule.linear(), 64, clip=1.0)
            x, f = torch.randn(64, 4, 64, 64), torch.randn(64, 4, 64, 64)
            index = table.index[:distinct].repeat(64 // distinct)
            assert torch.equal(step(x, f, table, index), step(x, f, table, index, backend="reference"))
            return {OURS: lambda: step(x, f, table, index), "one row": lambda: step(x, f, table, ROW)}

        yield Comparison("rows", f"{distinct} distinct rows in a batch of 64", make, {"rows": distinct})


def by_threads():
    for feature in ("plain", "noise"):
        for power in (5, 6, 7):

            def make(feature=feature, power=power):
                run = step_and_peers(feature, (1, 10**power), FLOAT, [])()[OURS]
                return {OURS: run, "one thread": lambda: run()}

            threads = torch.get_num_threads()
            before = {OURS: lambda n=threads: torch.set_num_threads(n), "one thread": lambda: torch.set_num_threads(1)}
            name = f"{feature}, 10^{power}, {threads} threads"
            yield Comparison("threads", name, make, {"numel": 10**power, "threads": threads}, {}, before)


def by_loop(full):
    """Whole trajectories with a model that costs nothing: its output is there already."""
    import diffusers

    shape, seeds = (4, 4, 64, 64), range(4)
    for steps in (20, 50, 100) if full else (20, 50):
        for name, table, scheduler in (
            ("ddim", samplers.ddim(schedule.linear(), steps), diffusers.DDIMScheduler()),
            ("ddpm", samplers.ddpm(schedule.linear(), steps), diffusers.DDPMScheduler()),
            ("dpmpp_2m", samplers.dpmpp_2m(schedule.linear(), steps), diffusers.DPMSolverMultistepScheduler()),
        ):

            def make(table=table, scheduler=scheduler, steps=steps):
                f = torch.randn(shape)

                def theirs():
                    scheduler.set_timesteps(steps)
                    x = torch.randn(shape)
                    for t in scheduler.timesteps:
                        x = scheduler.step(f, t, x, return_dict=False)[0]
                    return x

                sample = lambda: epskernels.sample(lambda x, t: f, table, seeds, shape[1:])  # noqa: E731
                return {OURS: sample, f"diffusers' {type(scheduler).__name__}": theirs}

            yield Comparison("loop", f"{name}, {steps} steps, {shape}", make, {"steps": steps})


def by_real_model():
    """The bundled digits: the whole, beside its model calls alone. What is above 1 is all that is not the model."""
    network = models.load()
    for name, table in {
        "ddim": samplers.ddim(network.schedule, 10),
        "ddpm": samplers.ddpm(network.schedule, 10),
    }.items():

        def make(table=table):
            model, shape = network.callable(), network.shape
            x, timesteps = torch.randn(4, *shape), [torch.full((4,), int(t)) for t in table["t"]]

            @torch.no_grad()
            def calls():
                for t in timesteps:
                    model(x, t)

            return {OURS: lambda: epskernels.sample(model, table, range(4), shape), "its model calls alone": calls}

        yield Comparison("real model", f"{name}, 10 steps, 4 digits", make, {"steps": 10})


def by_call():
    """What a call costs: 1,024 elements; as PyTorch's modes have it, and compiled."""
    table, _, _ = FEATURES["plain"]
    op, index = torch.ops.epskernels.step.default, table.row_index[ROW]
    add = "torch.add(x, f)"

    def make(run, around=lambda function: function):
        x, f, y = torch.randn(1, 1024), torch.randn(1, 1024), torch.empty(1, 1024)
        return {OURS: around(lambda: run(x, f, y)), add: around(lambda: torch.add(x, f))}

    def within(mode):
        def hundred(function):
            def run():
                with mode():
                    for _ in range(100):
                        function()

            return run

        return hundred

    def make_compiled(run):
        ours = compiled(run)  # which forgets what was compiled before
        peer = torch.compile(torch.add, dynamic=False, fullgraph=True)
        x, f, y, i = torch.randn(1, 1024), torch.randn(1, 1024), torch.empty(1, 1024), index
        return {
            OURS: lambda: ours(x, f, i, y),
            "torch.compile of torch.add": lambda: peer(x, f),
            add: lambda: torch.add(x, f),
        }

    functional, into = lambda x, f, y: step(x, f, table, ROW), lambda x, f, y: step(x, f, table, ROW, out=y)  # noqa: E731
    for name, run, target in (
        ("torch.ops.epskernels.step", lambda x, f, y: op(x, f, table.rows, index), 4.0),
        ("epskernels.step", functional, 4.0),
        ("epskernels.step, out=", into, None),
    ):
        yield Comparison("call", name, lambda run=run: make(run), {"numel": 1024}, {add: target})
    for name, mode in (
        ("inference_mode", torch.inference_mode),
        ("grad mode, no input requires grad", torch.enable_grad),
    ):
        for form, run in (("", functional), (", out=", into)):
            making = lambda run=run, mode=mode: make(run, within(mode))  # noqa: E731
            yield Comparison("call", f"100 of epskernels.step{form}, {name}", making, {"numel": 1024})
    for form, run in (
        ("", lambda x, f, i, y: step(x, f, table, i)),
        (", out=", lambda x, f, i, y: step(x, f, table, i, out=y)),
    ):
        making = lambda run=run: make_compiled(run)  # noqa: E731
        yield Comparison("compiled call", f"epskernels.step{form}", making, {"numel": 1024})


def memory():
    """Allocations and peak extra bytes of a call, counted by PyTorch's profiler: exact, not timed."""
    shape = (16, 3, 64, 64)
    size = math.prod(shape) * 4
    for feature, (table, names, function) in FEATURES.items():
        tensors = tensors_of(shape, FLOAT, names)
        x, f = tensors.pop("x"), tensors.pop("f")
        y, m0, rows = torch.empty(shape), torch.empty(shape), table.rows[ROW]
        arguments = [x, f, rows, *(tensors[name] for name in names if name != "seeds")]
        keeps = {"m0": m0} if feature == "history" else {}
        for form, run in {
            "new tensor": lambda: step(x, f, table, ROW, **tensors, **keeps),
            "out=": lambda: step(x, f, table, ROW, **tensors, **keeps, out=y),
            EAGER: lambda: function(*arguments),
        }.items():
            run()
            with torch.profiler.profile(profile_memory=True) as profile:
                kept = run()
            changes = [event.bytes for event in memory_events(profile)]
            del kept
            peak = max(np.cumsum([0, *changes]))
            yield {"feature": feature, "form": form, "allocations": sum(change > 0 for change in changes),
                   "peak_over_state": float(peak / size)}  # fmt: skip


def memory_events(profile):
    events = profile.profiler.kineto_results.events()
    found = [event for event in events if event.name() == "[memory]"]
    return sorted((MemoryEvent(event.start_ns(), event.nbytes()) for event in found), key=lambda event: event.start)


class MemoryEvent:
    def __init__(self, start, size):
        self.start, self.bytes = start, size


def growth(rows):
    """Exponents of the cost with the batch and with the size: log-log slopes, 1 where cost is proportional."""
    fits = {}
    for group, axis in (("batch", "batch"), ("growth", "numel")):
        points = [(row["axes"][axis], row["ratio"]) for row in rows if row["group"] == group]
        if len(points) >= 3:
            sizes, costs = np.log(np.array(points, dtype=float)).T
            half = len(points) // 2
            fits[f"{group}, exponent over all"] = float(np.polyfit(sizes, costs, 1)[0])
            fits[f"{group}, exponent of the larger half"] = float(np.polyfit(sizes[half:], costs[half:], 1)[0])
    return fits


def gpu_results():
    """bench_gpu.py's results, or why there are none."""
    if not torch.cuda.is_available():
        return {"not measured": "no GPU is available to torch"}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "gpu.json"
        command = [sys.executable, pathlib.Path(__file__).with_name("bench_gpu.py"), "--json", path]
        done = subprocess.run([str(part) for part in command])
        results = json.loads(path.read_text()) if path.exists() else {}
        return results | {"exit status": done.returncode}


def comparisons(full):
    return [
        *by_limit(), *by_size(full), *by_feature(), *by_band(),
        *by_dtype(), *by_scheduler(), *by_formula(), *by_batch(), *by_growth(full),
        *by_rows(),
        *by_threads(), *by_loop(full), *by_real_model(), *by_call(),
    ]  # fmt: skip


def one_pass(wanted, path, rounds, seconds):
    """One block of every comparison: {title: {contender: seconds by round}}."""
    blocks = {comparison.title: harness.time_block(comparison, rounds, seconds) for comparison in wanted}
    path.write_text(json.dumps(blocks))


def passes(count, arguments):
    """The blocks of `count` processes, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            print(f"pass {i + 1} of {count}", file=sys.stderr, flush=True)
            path = pathlib.Path(folder) / "pass.json"
            command = [sys.executable, __file__, *arguments, "--one-pass", str(path)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            yield json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="more sizes, more rounds")
    parser.add_argument(
        "--only",
        default="",
        help="only comparisons whose 'GROUP: NAME', as the results print it, holds this expression, such as '^feature: plain'; "
        "'^memory' counts memory alone",
    )
    parser.add_argument("--json", default="benchmarks/results/latest.json")
    parser.add_argument(
        "--passes", type=int, help="processes to measure in, one after the other; default 6, or 8 with --full"
    )
    parser.add_argument("--one-pass", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if build.why_missing():
        raise SystemExit(f"bench: {build.why_missing()}")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    everything = comparisons(args.full)
    titles = harness.asked(parser, args.only, [*(comparison.title for comparison in everything), "memory"])
    wanted = [comparison for comparison in everything if comparison.title in titles]
    if args.one_pass:
        one_pass(wanted, args.one_pass, *((9, 0.02) if args.full else (5, 0.006)))
        return
    results = {
        "schema": harness.SCHEMA,
        "machine": harness.about(),
        "full": args.full,
        "rows": [],
        "memory": [],
        "gpu": None,
    }
    print(json.dumps(results["machine"]), flush=True)
    blocks = list(passes(args.passes or (8 if args.full else 6), ["--only", args.only] + ["--full"] * args.full))
    print(f"{'time of epskernels / time of the peer':<90} {'ratio':>8}  {'interval of 95 %':<18} target")
    for comparison in wanted:
        for row in harness.rows_of(comparison, [block[comparison.title] for block in blocks]):
            results["rows"].append(row)
            low, high = row["interval"]
            verdict = {True: "met", False: "NOT MET", None: ""}[row["met"]]
            target = "" if row["target"] is None else f"{row['target']:.3g} {verdict}"
            title = f"{comparison.title} / {row['peer']}"
            print(f"{title:<90} {row['ratio']:8.3f}  [{low:.3f}, {high:.3f}]".ljust(120) + target)
    if "memory" in titles:
        results["memory"] = list(memory())
        for row in results["memory"]:
            counted = f"{row['allocations']} allocations, peak {row['peak_over_state']:.2f} states"
            print(f"memory: {row['feature']}, {row['form']}: {counted}")
    results["growth"] = growth(results["rows"])
    for name, exponent in results["growth"].items():
        print(f"growth: {name}: {exponent:.3f}")
    if not args.only:
        results["gpu"] = gpu_results()
        print(f"gpu: {results['gpu'].get('not measured', 'measured')}")
    harness.save(args.json, results)
    missed = [row for row in results["rows"] if row["met"] is False]
    print(f"{len(results['rows'])} ratios, {len(missed)} targets not met; written to {args.json}")


if __name__ == "__main__":
    main()
