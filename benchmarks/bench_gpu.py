"""The GPU kernels side by side with a copy, torch.add, torch.compile, eager PyTorch and diffusers, interleaved in one process.

    python benchmarks/bench_gpu.py --json results.json [--seconds N] [--only REGEX] [--device cuda|cpu] \
        [--stop-after N] [--resume]

    node        a node of a CUDA graph of many steps, over buffers of three times the L2 cache or more; between two events
    node, warm  the same over one set of buffers
    call        calls from Python, one after the other on one set of buffers; between two events
    host        what a call costs the host, by its clock, without waiting for the device
Correctness is asserted before anything is timed. The cases come by their worth: those of the predictions first. --device cpu
tests this program where there is no GPU, and judges no target; so does tests/gpu/stand_in.
"""

import argparse
import collections
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import typing

import peers
import torch

import epskernels
from epskernels import build, corrections, samplers, schedule

DRY = "EPSKERNELS_GPU_DRY" in os.environ  # on a stand-in: tiny tensors, few rounds, nothing judged
ROUNDS, ROW = 2 if DRY else 15, 7
REPLAY_BYTES = 1 if DRY else 10e9  # what a graph moves, about: 3 ms of an H100's memory bandwidth
OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
OP, ADD_NEW = "torch.ops.epskernels.step", "torch.add, new tensor"
INDUCTOR, REDUCE = "inductor max-autotune-no-cudagraphs", "inductor reduce-overhead"
FUNCTIONAL = ("eager", INDUCTOR, REDUCE)

SMALL = ((1, 4, 64, 64), (16, 4, 64, 64))
SHAPES = (*SMALL, (2, 16, 128, 128), (1, 16, 21, 90, 160), (64, 3, 256, 256), (256, 3, 256, 256))
TWO_SHAPES = ((16, 4, 64, 64), (64, 3, 256, 256))
CHECKED_SHAPES = ((3, 3, 67, 5), (2, 4, 32, 32))  # samples at any address, and at multiples of 16 bytes
DTYPES = {  # of the state, of the model's output
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 of bfloat16": (torch.float32, torch.bfloat16),
}
_same = {"schedule": schedule.linear(), "steps": 20, "scaling": 1.005}
FEATURES = {  # the table, and what its rows need beyond x and f
    "plain": (samplers.ddim(**_same, clip=1.0), ()),
    "noise": (samplers.ddpm(**_same), ("seeds",)),
    "guidance": (samplers.ddim(**_same, clip=1.0, guidance=7.5), ("u",)),
    "history": (samplers.dpmpp_2m(**_same), ("m1", "m0")),
    "guidance+noise": (samplers.ddpm(**_same, guidance=7.5), ("u", "seeds")),
    "learned": (samplers.ddpm(**_same, variance="learned_range"), ("v", "seeds")),
    "rescale": (samplers.ddim(**_same, clip=1.0, guidance=7.5), ("u",)),  # the step and the sums that its factor takes
    "band": (samplers.ddim(**_same, clip=1.0, correction=corrections.dcw(0.01, -0.005)), ()),
    "normal": (None, ("seeds",)),  # no step: the generator alone
}
AT_TWO_SHAPES = ("rescale", "normal")
COMPARED = ("plain", "noise", "guidance", "rescale", "band")  # with PyTorch's step
MIXED = ("plain", "noise")  # all that is measured of mixed dtypes


class Case(typing.NamedTuple):
    shape: tuple
    dtype: str
    feature: str
    small: bool = False

    @property
    def name(self):
        return f"{self.shape} {self.dtype} {self.feature}"

    @property
    def tensors(self):
        """{name: dtype} of the step's tensors of this shape."""
        state, model = DTYPES[self.dtype]
        names = ("out",) if self.feature == "normal" else ("x", "f", "out", *FEATURES[self.feature][1])
        return {name: model if name in ("f", "u", "v") else state for name in names if name != "seeds"}

    @property
    def bytes(self):
        """What the step must move: each input read once, each output written once."""
        return math.prod(self.shape) * sum(dtype.itemsize for dtype in self.tensors.values())

    @property
    def large(self):
        return math.prod(self.shape) * self.tensors["out"].itemsize >= 64e6


def all_cases(device):
    """The largest states first, whose times are predicted, then small latents; within a shape what has one dtype."""
    for shape in (SHAPES[-1], *SHAPES[:-1]):
        for dtype, feature in itertools.product(DTYPES, FEATURES):
            if (dtype == "float32 of bfloat16" and feature not in MIXED) or (
                feature in AT_TWO_SHAPES and shape not in TWO_SHAPES
            ):
                continue
            small = shape in SMALL and feature not in AT_TWO_SHAPES
            tiny = device == "cpu" or DRY
            yield Case(tuple(max(4, n // 16) if n > 4 else n for n in shape) if tiny else shape, dtype, feature, small)


def plan(case, device):
    """{how: providers}. Inductor's reduce-overhead only where overhead matters; a kernel of Inductor's is timed everywhere."""
    everyone = [*OURS[device], *(("torch.randn",) if case.feature == "normal" else ("copy", "torch.add"))]
    compared, hows = case.feature in COMPARED, {}
    if device == "cuda":
        hows["node"] = everyone + [INDUCTOR] * compared
        if case.small:
            hows["node, warm"] = hows["node"]
    if device == "cpu" or compared:
        hows["call"] = everyone + [INDUCTOR, "eager"] * compared + [REDUCE] * (compared and case.small)
    if case.small and case.dtype == "float32" and case.feature in ("plain", "noise"):
        hows["call"].append("diffusers")
    if case.small and case.dtype == "float32" and case.feature == "plain":
        hows["host"] = [*OURS[device], OP, ADD_NEW]
    return hows


# ---- what is compared ----


def functional_step(x, f, row, u=None, z=None):
    """The same formula as a user writes it for torch.compile: float32 inside, the row a tensor, so that no step recompiles."""
    d_x, d_f, clip, g, c_x, c_m0, c_noise = row[0], row[1], row[2], row[3], row[4], row[6], row[10]
    dtype, x, f = x.dtype, x.float(), f.float()
    fhat = f if u is None else u.float() + g * (f - u.float())
    m0 = torch.clamp(d_x * x + d_f * fhat, -clip, clip)
    total = c_x * x + c_m0 * m0
    return (total if z is None else total + c_noise * z).to(dtype)


def functional_noisy_step(x, f, row):
    return functional_step(x, f, row, z=torch.randn_like(x))


def functional_rescaled_step(x, f, row, u, phi=0.7):
    f, u = f.float(), u.float()
    fhat, dims = u + row[3] * (f - u), tuple(range(1, f.dim()))
    ratio = f.std(dims, keepdim=True) / fhat.std(dims, keepdim=True)
    return functional_step(x, (phi * ratio + (1 - phi)) * fhat, row)


def functional_band_step(x, f, row):
    """As the correction's authors write it: the step, the wavelets of x' and m0, their bands moved apart, the inverse."""
    dtype, x, f = x.dtype, x.float(), f.float()
    m0 = torch.clamp(row[0] * x + row[1] * f, -row[2], row[2])
    next_x = row[4] * x + row[6] * m0  # with what the rows' own coefficients have of the high bands in it
    of_next, of_m0 = peers.haar(next_x), peers.haar(m0)
    return peers.inverse_haar([of_next[0] * (1 + row[24]) + of_m0[0] * row[25], *of_next[1:]], x).to(dtype)


FUNCTIONS = {"band": functional_band_step, "noise": functional_noisy_step, "rescale": functional_rescaled_step}


def functional(case, tensors):
    """The functional step of a case, and its arguments."""
    arguments = [tensors["x"], tensors["f"], table_on(case.feature, tensors["x"].device).rows[ROW]]
    arguments += [tensors["u"]] if "u" in tensors else []
    return FUNCTIONS.get(case.feature, functional_step), arguments


@functools.cache
def table_on(feature, device):
    return FEATURES[feature][0].to(device)


def make_sets(case, count, device):
    """`count` sets of a step's tensors, by name; outputs are NaN until they are written."""
    names = {name: dtype for name, dtype in case.tensors.items() if case.feature != "normal"}
    stacks = {name: torch.randn((count, *case.shape), dtype=dtype, device=device) for name, dtype in names.items()}
    for name in {"out", "m0"} & stacks.keys():
        stacks[name].fill_(math.nan)
    seeds = torch.arange(case.shape[0], device=device)
    return [{"seeds": seeds} | {name: stack[i] for name, stack in stacks.items()} for i in range(count)]


def our_call(provider, case, tensors):
    """The package's own dispatch for its compiled kernels; other backends are named."""
    backend, seeds = provider if provider in ("triton", "reference") else None, tensors["seeds"]
    if case.feature == "normal":
        dtype = case.tensors["out"]
        return functools.partial(epskernels.normal, seeds, case.shape[1:], dtype=dtype, backend=backend)
    named = {name: tensors[name] for name in ("out", *FEATURES[case.feature][1])}
    table = table_on(case.feature, seeds.device)
    call = functools.partial(epskernels.step, tensors["x"], tensors["f"], table, ROW, backend=backend, **named)
    if case.feature != "rescale":
        return call

    factor = functools.partial(epskernels.guidance_rescale, tensors["f"], tensors["u"], table, ROW, backend=backend)
    return lambda: call(rescale=factor())


def compiled_calls(provider, case, sets, budget):
    """Compiled by the calls made here, not in the loops that are timed."""
    if budget["seconds"] <= 0:
        raise RuntimeError("not compiled: the time of --compile-seconds is used up")
    begin = time.perf_counter()
    torch._dynamo.utils.counters.clear()
    function, arguments = functional(case, sets[0])
    function = torch.compile(function, mode=provider.removeprefix("inductor "), dynamic=False, fullgraph=True)
    calls = [functools.partial(function, *functional(case, tensors)[1]) for tensors in sets]
    if provider == REDUCE:  # at its best: its graph reads these tensors where they are
        arguments = [tensor.clone() for tensor in arguments]
        for tensor in arguments:
            torch._dynamo.mark_static_address(tensor)

        def call():
            torch.compiler.cudagraph_mark_step_begin()
            return function(*arguments)

        calls = [call]
    try:
        for i in range(4):
            calls[i % len(calls)]()
        if sets[0]["x"].is_cuda:
            torch.cuda.synchronize()
    finally:
        budget["seconds"] -= time.perf_counter() - begin
    if provider == REDUCE and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]:
        raise RuntimeError("Inductor left its CUDA graph out")
    return calls


def calls_of(provider, case, sets, budget):
    """The provider's step as functions without arguments: one for each set of tensors, or for the first."""
    first, device, dtype = sets[0], sets[0]["seeds"].device, case.tensors["out"]
    if provider in OURS["cuda"] + OURS["cpu"]:
        return [our_call(provider, case, tensors) for tensors in sets]
    if provider == "torch.randn":
        return [functools.partial(torch.randn, case.shape, dtype=dtype, device=device)] * len(sets)
    if provider == "copy":  # the step's bytes, half of them read and half written
        tensors = torch.randn((2, len(sets), case.bytes // 8), device=device)
        return [functools.partial(b.copy_, a) for a, b in zip(*tensors, strict=True)]
    if provider == "torch.add":  # the step's bytes, two thirds read and one written, at aligned addresses
        tensors = torch.randn((3, len(sets), case.bytes // (3 * dtype.itemsize) // 16 * 16), dtype=dtype, device=device)
        return [functools.partial(torch.add, a, b, out=out) for a, b, out in zip(*tensors, strict=True)]
    if provider == OP:
        table = table_on(case.feature, device)
        op = torch.ops.epskernels.step.default
        return [functools.partial(op, first["x"], first["f"], table.rows, table.row_index[ROW])]
    if provider == ADD_NEW:
        return [functools.partial(torch.add, first["x"], first["f"])]
    if provider == "eager":
        function, arguments = functional(case, first)
        return [functools.partial(function, *arguments)]
    if provider == "diffusers":
        import diffusers

        scheduler = (diffusers.DDPMScheduler if case.feature == "noise" else diffusers.DDIMScheduler)()
        scheduler.set_timesteps(20)
        t = scheduler.timesteps[ROW]  # on the host, where the scheduler reads it
        return [functools.partial(scheduler.step, first["f"], t, first["x"], return_dict=False)]
    return compiled_calls(provider, case, sets, budget)


# ---- correctness ----


def check_ours(provider, device):
    """Raises AssertionError where a bit differs from the reference on the CPU, the specification."""
    for case in (Case(s, dtype, feature) for s in CHECKED_SHAPES for dtype in DTYPES for feature in FEATURES):
        (here,) = make_sets(case, 1, "cpu")
        there = {name: tensor.to(device, copy=True) for name, tensor in here.items()}
        expected, got = our_call("reference", case, here)(), our_call(provider, case, there)()
        assert torch.equal(got.cpu(), expected), f"{provider} is not the reference: {case.name}"
        if "m0" in here:
            assert torch.equal(there["m0"].cpu(), here["m0"]), f"{provider} is not the reference: {case.name}, m0"


def close(got, expected):
    rtol, atol = (1e-4, 1e-4) if expected.dtype == torch.float32 else (1e-2, 1e-3)
    return torch.allclose(got, expected, rtol=rtol, atol=atol)


def check_functional(device):
    """Raises AssertionError where the peers' formula is not ours."""
    shape = CHECKED_SHAPES[0]
    for case in (Case(shape, dtype, feature) for dtype in DTYPES for feature in COMPARED):
        (here,) = make_sets(case, 1, "cpu")
        expected = our_call("reference", case, here)()
        function, arguments = functional(case, here)
        if case.feature == "noise":
            z = epskernels.normal(here["seeds"], shape[1:], draw=ROW, stream=0, backend="reference").to(device)
            function = functools.partial(functional_step, z=z)
        got = function(*(tensor.to(device) for tensor in arguments))
        assert close(got.cpu(), expected), f"the functional step is not the reference: {case.name}"


def check_at_size(case, calls, sets, device, failures):
    """What is timed, at its own size, into NaN: ours give the same bits, and the deterministic peers come close to them."""
    expected = None
    for provider in [p for p in (*OURS[device], *FUNCTIONAL) if p in calls and case.feature != "normal"]:
        ours = provider in OURS[device]
        if not ours and (expected is None or case.feature == "noise"):
            continue
        try:
            sets[0]["out"].fill_(math.nan)
            got = calls[provider][0]()
            right = not got.isnan().any() and (expected is None or (torch.equal if ours else close)(got, expected))
        except Exception as error:
            failures[provider] = one_line(error)
            continue
        if not right:
            failures[provider] = "wrong at this size: NaN, or not what our first kernel gives"
        elif ours and expected is None:
            expected = got.clone()


# ---- timing ----


def one_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def captured(calls, steps):
    """A CUDA graph of that many calls, turn by turn, and their outputs, which are its memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:4]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), [None] * len(calls)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(steps):
            outputs[i % len(calls)] = calls[i % len(calls)]()
    for output in (outputs[0], outputs[-1]):
        output.fill_(math.nan)
    graph.replay()
    if outputs[0].isnan().any() or outputs[-1].isnan().any():
        raise RuntimeError("the CUDA graph does not hold the step")
    return graph, outputs


def sampler(provider, how, case_bytes, calls, device):
    """sample(count), which returns the seconds of a run, and how many steps a run is.

    A copy that fills the device is not captured: in a graph it may be slower (github.com/pytorch/pytorch/issues/191284).
    """
    run, steps, outputs = calls[0], 1, None
    if how.startswith("node") and provider == "copy" and case_bytes >= 32e6:
        steps = len(calls)

        def run():
            for call in calls:
                call()

    elif how.startswith("node"):
        calls = calls[:1] if how == "node, warm" else calls
        steps = len(calls) * math.ceil(min(256, REPLAY_BYTES / case_bytes) / len(calls))
        graph, outputs = captured(calls, steps)
        run = graph.replay

    def by_host_clock(count):
        run()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        seconds = time.perf_counter() - begin
        if device == "cuda":
            torch.cuda.synchronize()
        return seconds / count

    if device == "cpu" or how == "host":
        return by_host_clock, steps
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def by_events(count, kept=outputs):
        run()  # the device is busy with it while the host queues what is timed
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return by_events, steps


def interleaved(prepared, seconds, failures):
    """Seconds per step: for each name, one number per round; A B A B, so that a changing clock hurts all."""
    counts, times = {}, {name: [] for name in prepared}
    for turn in range(ROUNDS + 1):
        for name, (sample, steps) in prepared.items():
            try:
                if turn == 0:
                    sample(2)
                    counts[name] = max(1, int(seconds / max(sample(3), 1e-9)))
                elif name not in failures:
                    times[name].append(sample(counts[name]) / steps)
            except Exception as error:
                failures[name] = one_line(error)
    return {name: values for name, values in times.items() if name not in failures}


def report(case, how, providers, times, failures, device):
    """A row for each provider; ours with the quartiles of the rounds' ratios own/peer."""
    for provider in providers:
        row = {"shape": case.shape, "dtype": case.dtype, "feature": case.feature, "how": how, "provider": provider}
        row |= {"device": device, "bytes": case.bytes, "seconds": None, "quartiles": None, "GB/s": None}
        row |= {"copy_share": None, "ratios": {}, "error": failures.get(provider)}
        if own := times.get(provider):
            low, median, high = statistics.quantiles(own, n=4)
            row |= {"seconds": median, "quartiles": [low, high], "GB/s": case.bytes / median / 1e9}
            for peer in [p for p in times if p != provider and provider in (*OURS[device], OP)]:
                ratios = [a / b for a, b in zip(own, times[peer], strict=True)]
                row["ratios"][peer] = statistics.quantiles(ratios, n=4)
            if "copy" in row["ratios"]:
                row["copy_share"] = 1 / row["ratios"]["copy"][1]
        yield row


def measure(case, device, L2, seconds, missing, budget):
    """One case's rows. A provider that fails has its reason there; where the case itself fails, all have."""
    hows = {how: [p for p in names if p not in missing] for how, names in plan(case, device).items()}
    providers = list(dict.fromkeys(p for names in hows.values() for p in names))
    calls, failures, rows = {}, {}, []
    try:
        if any(p.startswith("inductor") for p in providers):
            torch._dynamo.reset()
        sets = make_sets(case, max(2, math.ceil(3 * L2 / case.bytes)) if device == "cuda" else 1, device)
        for provider in providers:
            try:
                calls[provider] = calls_of(provider, case, sets, budget)
            except Exception as error:
                failures[provider] = one_line(error)
        check_at_size(case, calls, sets, device, failures)
    except Exception as error:
        failures = dict.fromkeys(providers, one_line(error)) | failures
    for how, names in hows.items():
        prepared, failed = {}, dict(failures)
        for provider in [p for p in names if p not in failures]:
            try:
                prepared[provider] = sampler(provider, how, case.bytes, calls[provider], device)
            except Exception as error:
                failed[provider] = one_line(error)
        times = interleaved(prepared, seconds, failed)
        rows += report(case, how, names, times, failed, device)
    return rows


# ---- what it says ----

# Claim, what of the peer's time over ours (at least) or ours over the peer's (at most), the peer, how, and in which cases.
TARGETS = (
    ("deterministic step, state of 64 MB or more, share of copy bandwidth", "at least", 0.92, "copy", ("node", "call"),
     lambda case: case.large and case.feature in ("plain", "guidance", "history")),
    ("noise in the kernel, float32, 64 MB or more, share of copy bandwidth", "at least", 0.85, "copy", ("node", "call"),
     lambda case: case.large and case.dtype == "float32" and "seeds" in FEATURES[case.feature][1]),
    ("noise in the kernel, bfloat16, 64 MB or more, share of copy bandwidth", "at least", 0.75, "copy", ("node", "call"),
     lambda case: case.large and case.dtype == "bfloat16" and "seeds" in FEATURES[case.feature][1]),
    ("plain step of small latents in a CUDA graph, time over torch.add's", "at most", 1.3, "torch.add", ("node",),
     lambda case: case.small and case.feature == "plain"),
    ("the step at any shape, time over torch.compile's", "at most", 1.0, "inductor", ("node", "call"),
     lambda case: case.feature != "rescale"),  # whose factor is ten launches of its own
    ("step that corrects a band, 64 MB or more, share of copy bandwidth", "at least", 0.85, "copy", ("node", "call"),
     lambda case: case.large and case.feature == "band"),
    ("small latents, time of diffusers' scheduler.step over ours", "at least", 5.0, "diffusers", ("call",),
     lambda case: case.small),
)  # fmt: skip


def judge(rows, device, missing):
    """Each target for each of our kernels. Met only where every comparison of all cases was made, whatever --only says."""
    found = {(r["shape"], r["dtype"], r["feature"], r["how"], r["provider"]): r["ratios"] for r in rows}
    for provider in OURS[device]:
        for claim, sense, limit, peer, hows, applies in TARGETS:
            values, wanted = [], 0
            for case in filter(applies, all_cases(device)):
                for how, names in plan(case, device).items():
                    for name in [name for name in names if how in hows and name.startswith(peer)]:
                        wanted += 1
                        ratios = found.get((*case[:3], how, provider), {}).get(name, ())
                        if ratios := sorted(1 / r if sense == "at least" else r for r in ratios):
                            values.append((ratios[1], (ratios[0], ratios[2]), f"{case.name}, {how}, {name}"))
            worst = (min if sense == "at least" else max)(values, default=None)
            target = {"claim": f"{provider}: {claim}", "target": f"{sense} {limit:g}", "worst": None, "quartiles": None}
            target |= {
                "where": None,
                "measured": len(values),
                "of": wanted,
                "met": None,
                "missing": missing.get(provider),
            }
            if worst and device == "cuda" and not DRY:
                target |= dict(zip(("worst", "quartiles", "where"), worst, strict=True))
                good = worst[0] >= limit if sense == "at least" else worst[0] <= limit
                target["met"] = (len(values) == wanted or None) if good else False
            yield target


def ceilings(rows, smallest):
    """GB/s of the copy and of torch.add by bytes moved, as this run measured them, and the smallest kernel's time."""
    found = {"smallest kernel, seconds": smallest}
    for row in [row for row in rows if row["provider"] in ("copy", "torch.add") and row["seconds"]]:
        best = found.setdefault(f"{row['provider']}, {row['how']}, GB/s", {})
        best[str(row["bytes"])] = max(best.get(str(row["bytes"]), 0.0), row["GB/s"])
    return found


def said_by(*command):
    """What a command prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=pathlib.Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def nvidia_smi():
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return (said_by("nvidia-smi", query, "--format=csv") or "unknown").splitlines()


def machine(device):
    commit, changed = said_by("git", "rev-parse", "HEAD"), said_by("git", "status", "--porcelain", "-uno")
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
    return {
        "device": gpu.name if gpu else platform.processor() or platform.machine(),
        "count": torch.cuda.device_count(), "multiprocessors": getattr(gpu, "multi_processor_count", None),
        "L2_bytes": getattr(gpu, "L2_cache_size", None), "nvidia_smi": nvidia_smi() if gpu else None,
        "torch": torch.__version__, "cuda_runtime": torch.version.cuda, "python": platform.python_version(),
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "epskernels": epskernels.__version__, "cuda_targets": build.cuda_targets(),
        "commit": commit + "+dirty" * bool(changed) if commit else "unknown",
    }  # fmt: skip


def summary(results, device):
    """At most 45 lines: our first kernel over all cases, what failed, and the targets."""
    rows, how = results["results"], "node" if device == "cuda" else "call"
    ours = next((p for p in OURS[device] if p not in results["providers"]), OURS[device][0])
    steps = {r[:2]: {} for r in ((c.shape, c.dtype) for c in all_cases(device) if c.feature == "plain")}
    for row in [row for row in rows if (row["provider"], row["how"]) == (ours, how) and row["feature"] != "normal"]:
        values = row["copy_share"], row["ratios"].get(INDUCTOR, [None] * 3)[1]
        cell = " ".join("    -" if value is None else f"{value:.3f}" for value in values)
        steps[row["shape"], row["dtype"]][row["feature"]] = cell
    yield f"{results['machine']['device']}, {ours}, {how}: share of copy bandwidth, time over torch.compile's kernel's"
    yield f"{'':<40}" + "".join(f"{feature:>16}" for feature in list(FEATURES)[:-1])
    for (shape, dtype), cells in sorted((key, cells) for key, cells in steps.items() if cells):
        yield f"{f'{shape} {dtype}':<40}" + "".join(f"{cells.get(feature, ''):>16}" for feature in list(FEATURES)[:-1])
    for provider in OURS[device]:
        ratios = [
            r["ratios"]["torch.randn"][1] for r in rows if r["provider"] == provider and "torch.randn" in r["ratios"]
        ]
        if ratios:
            yield f"{provider}: normal, time over torch.randn's: " + ", ".join(f"{ratio:.3f}" for ratio in ratios)
    for row in [row for row in rows if row["provider"] == OP and ADD_NEW in row["ratios"]]:
        times = f"{row['seconds'] * 1e6:.2f} us, {row['ratios'][ADD_NEW][1]:.2f} of torch.add's"
        yield f"{OP}, {row['shape']}, what a call costs the host: {times}"
    failed = collections.Counter((row["provider"], row["error"]) for row in rows if row["error"])
    for (provider, error), times in failed.most_common(6):
        yield f"FAILED, rows: {times}; {provider}: {error[:100]}"
    for target in results["targets"]:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
        found = target["missing"] or "no value"
        if target["worst"] is not None:
            low, high = target["quartiles"]
            found = f"{target['worst']:.3f} [{low:.3f}, {high:.3f}], {target['where']}; {target['measured']} of {target['of']}"
        yield f"{verdict:<13}{target['claim']}, {target['target']}: {found}"


def who_is_missing(device, inductor):
    """{provider: why it takes no part}: not there, or wrong."""
    missing = {provider: build.why_missing(provider) for provider in OURS[device]}
    missing["diffusers"] = None if importlib.util.find_spec("diffusers") else "not installed"
    missing |= dict.fromkeys((INDUCTOR, REDUCE), None if inductor else "off: --inductor")
    if device == "cpu":
        missing[REDUCE] = "needs a GPU"
    checks = [(FUNCTIONAL, lambda: check_functional(device))]
    checks += [((provider,), functools.partial(check_ours, provider, device)) for provider in OURS[device]]
    for providers, check in checks:
        try:
            if not all(missing.get(provider) for provider in providers):
                check()
        except Exception as error:
            missing |= dict.fromkeys(providers, f"REFUSED before timing: {one_line(error)}")
    return {provider: reason for provider, reason in missing.items() if reason}


def resumed(path, info):
    """The rows of a run that ended early; SystemExit where another machine, or another build, made them."""
    if not pathlib.Path(path).exists():
        return []
    before = json.loads(pathlib.Path(path).read_text())
    for key in ("device", "torch", "triton", "epskernels", "cuda_targets"):
        if before["machine"].get(key) != info[key]:
            sys.exit(f"--resume: {path} has {key} {before['machine'].get(key)!r}, and this is {info[key]!r}")
    return [row | {"shape": tuple(row["shape"])} for row in before["results"]]


def key_of(row):
    return row["shape"], row["dtype"], row["feature"]


def left(rows, cases):
    """Those that were not measured, then those where something failed, such as what there was no time to compile."""
    there, failed = {key_of(row) for row in rows}, {key_of(row) for row in rows if row["error"]}
    return sorted((case for case in cases if case[:3] not in there - failed), key=lambda case: case[:3] in failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", default="bench_gpu.json", help="written after every case")
    parser.add_argument("--seconds", type=float, default=0.003, help=f"of one measurement, made {ROUNDS} times")
    parser.add_argument("--compile-seconds", type=float, default=110, help="what Inductor may take to compile, in all")
    parser.add_argument(
        "--only", default="", help="of the cases, those whose 'SHAPE DTYPE FEATURE' holds this expression"
    )
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no case begins")
    parser.add_argument("--resume", action="store_true", help="go on with the cases that the file does not have yet")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--inductor", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    args = parser.parse_args()
    device, begin = args.device, time.perf_counter()
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu: no GPU is available to torch; --device cpu tests this program without one")
    if os.environ.get("EPSKERNELS_BACKEND", "auto") != "auto" or (
        device == "cuda" and build.interprets_triton() and not DRY
    ):
        sys.exit("bench_gpu: unset EPSKERNELS_BACKEND and TRITON_INTERPRET, which change what is measured")
    wanted = [case for case in all_cases(device) if re.search(args.only, case.name)]
    if not wanted:
        names = "; ".join(case.name for case in all_cases(device))
        parser.error(
            f"--only: expected an expression that is in the name of a case, got {args.only!r}; there are: {names}"
        )
    torch.set_grad_enabled(False)
    torch.manual_seed(0)

    def say(words):
        print(f"[{time.perf_counter() - begin:6.1f} s] {words}", flush=True)

    def save():
        results["ceilings"] = ceilings(rows, smallest)
        results["targets"] = list(judge(rows, device, missing))
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1, allow_nan=False))

    missing = who_is_missing(device, device == "cuda" if args.inductor is None else args.inductor)
    info = machine(device)
    results = {"machine": info, "providers": missing, "only": args.only, "ceilings": {}, "results": [], "targets": []}
    results |= {"complete": False}
    if args.resume:
        results["results"] = resumed(args.json, info)
    rows, smallest, budget = results["results"], None, {"seconds": args.compile_seconds}
    for line in (info, *(f"{provider}: {reason}" for provider, reason in missing.items())):
        say(line)
    save()
    one, how = torch.zeros(1, device=device), "node" if device == "cuda" else "call"
    prepared = {"": sampler("", how, REPLAY_BYTES / 256, [lambda: one.fill_(1.0)], device)}
    smallest = statistics.median(interleaved(prepared, args.seconds, {})[""])
    cases = left(rows, wanted)
    for i, case in enumerate(cases):
        if time.perf_counter() - begin > args.stop_after:
            say(f"--stop-after: {len(cases) - i} cases are left; --resume goes on with them")
            break
        new = measure(case, device, info["L2_bytes"] or 60e6, args.seconds, missing, budget)
        rows[:] = [row for row in rows if key_of(row) != case[:3]] + new
        for how in dict.fromkeys(row["how"] for row in new):
            cells = [row for row in new if row["how"] == how]
            times = (f"FAILED: {r['error']}" if r["error"] else f"{r['seconds'] * 1e6:.2f} us" for r in cells)
            say(f"{case.name}, {how}: " + "; ".join(f"{r['provider']} {t}" for r, t in zip(cells, times, strict=True)))
        results["complete"] = i == len(cases) - 1
        save()
    results["complete"] = results["complete"] or not cases
    info |= {"nvidia_smi_after": nvidia_smi() if device == "cuda" else None, "seconds": time.perf_counter() - begin}
    save()
    say(f"written to {args.json}")
    print("\n".join(summary(results, device)))
    refused = any(missing.get(p, "").startswith("REFUSED") for p in (*OURS[device], *FUNCTIONAL))
    if not rows or refused or any(row["error"] for row in rows if row["provider"] in (*OURS[device], OP)):
        sys.exit(1)


if __name__ == "__main__":
    main()
