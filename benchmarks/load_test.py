"""Serving under load: the engine of examples/serving.py beside itself with diffusers' schedulers, request by request.

    python benchmarks/load_test.py --json benchmarks/results/serving.json      # about four minutes; --quick: a trial

Hundreds of unlike requests (sampler, steps, lambda, guidance, seed) arrive by a Poisson process. Both contenders are the same
engine: queue, slots, thread, and one model call for the whole batch, with the same t. They differ in what follows it.

    epskernels   one launch for the batch
    diffusers    guidance and lambda for the batch, as PyTorch expressions; then each request's own scheduler.step

A scheduler keeps its request's place and history, so one for several unlike requests there is not; all are made before the clock
starts. First all requests at once: throughput. Then at rates which are given shares of either's throughput: latency, from
arrival to result, waiting included. Contenders take turns with the same arrivals, and in each round another one begins.
"""

import argparse
import dataclasses
import pathlib
import sys
import time

import diffusers
import harness
import numpy as np
import torch

import epskernels
from epskernels import models, samplers, schedule

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from serving import Batch, Engine, Request  # noqa: E402

OURS, PEER = "epskernels", "diffusers"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A sampler in both forms."""

    sampler: str
    steps: int
    lambda_: float = 1.0
    guidance: float = 1.0
    T: int = 1000
    betas: str = "linear"

    def path(self):
        return schedule.cosine(self.T) if self.betas == "squaredcos_cap_v2" else getattr(schedule, self.betas)(self.T)

    def table(self):
        options = {"scaling": self.lambda_, "guidance": self.guidance}
        options |= {"spacing": "trailing"} if self.sampler == "dpmpp_2m" else {}
        return getattr(samplers, self.sampler)(self.path(), self.steps, **options)

    def scheduler(self):
        options = {"beta_schedule": self.betas, "num_train_timesteps": self.T}
        if self.sampler == "ddpm":
            made = diffusers.DDPMScheduler(**options)
        elif self.sampler == "ddim":
            made = diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
        else:
            options |= {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
            made = diffusers.DPMSolverMultistepScheduler(**options)
        made.set_timesteps(self.steps)
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class SchedulerRequest(Request):
    setting: Setting | None = None
    scheduler: object = None

    def begin(self):
        return iter(self.scheduler.timesteps), torch.Generator().manual_seed(self.seed)


class Timed(Batch):
    """Keeps the seconds of all ticks, and of the model and the step in them."""

    def __init__(self, model, *arguments, **options):
        super().__init__(self._timed("model", model), *arguments, **options)
        self.seconds = {"tick": 0.0, "model": 0.0, "step": 0.0}
        self.tick, self.step = self._timed("tick", self.tick), self._timed("step", self.step)

    def _timed(self, name, function):
        def timed(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed


class SchedulerBatch(Timed):
    def _members_changed(self):
        super()._members_changed()
        settings = [job.request.setting for job in self.jobs]
        columns = ((s.guidance for s in settings), (s.lambda_ for s in settings))
        self.g, self.lambda_ = (torch.tensor([*c]).reshape(-1, *[1] * len(self.shape)) for c in columns)

    def join(self, job):
        super().join(job)
        job.timesteps, job.generator = job.request.begin()

    def step(self, f, v, u):
        if u is not None:
            f = u + self.g * (f - u)
        f = f / self.lambda_
        for job in self.jobs:
            i, scheduler = slice(job.slot, job.slot + 1), job.request.scheduler
            further = {"generator": job.generator, "return_dict": False}
            self.x[i] = scheduler.step(f[i], next(job.timesteps), self.x[i], **further)[0]
        self.index[: len(self.jobs)] += 1  # the model's t comes from the same rows


CONTENDERS = {OURS: Timed, PEER: SchedulerBatch}


@dataclasses.dataclass
class Workload:
    name: str
    model: object
    shape: tuple
    slots: int
    guided: bool
    settings: list
    count: int
    shares: dict  # of each contender's throughput, the rates
    rounds: int

    def requests(self, contender, rng):
        """Of the settings in turn; the same for both."""
        tables = {setting: setting.table() for setting in self.settings}
        for number in range(self.count):
            setting = self.settings[number % len(self.settings)]
            seed = int(rng.integers(2**62))
            theirs = {"setting": setting, "scheduler": setting.scheduler()} if contender == PEER else {}
            yield (SchedulerRequest if theirs else Request)(tables[setting], seed, **theirs)


def small_model(x, t):
    """(f, u) at next to no cost, so that the step's share shows."""
    f = x * (0.9 + 1e-4 * t.reshape(-1, 1, 1, 1))
    return f, 0.95 * f


def workloads(quick):
    small = [
        Setting("ddim", 20, 1.004, 5.0), Setting("dpmpp_2m", 15, 1.002, 7.5), Setting("ddpm", 30, 1.005),
        Setting("ddim", 50, 1.001, 3.0), Setting("dpmpp_2m", 25), Setting("ddpm", 40, 1.003, 2.0),
    ]  # fmt: skip
    of_digits = {"betas": "squaredcos_cap_v2"}
    digits = [
        Setting("ddim", 10, 1.004, **of_digits), Setting("dpmpp_2m", 8, **of_digits),
        Setting("ddpm", 12, 1.005, **of_digits),
    ]  # fmt: skip
    network = models.load()
    call = network.callable()
    yield Workload(
        "a model of five products", small_model, (4, 64, 64), 16, True, small, 24 if quick else 200,
        {PEER: (0.6, 0.9), OURS: (0.6, 0.9)}, 1 if quick else 3,
    )  # fmt: skip
    yield Workload(
        "the bundled digits model", call, network.shape, 8, False, digits, 6 if quick else 60,
        {OURS: (0.7,)}, 1 if quick else 3,
    )  # fmt: skip


def run(contender, work, rate, seed):
    """All requests of a workload, arriving at `rate` a second: latencies, throughput, shares of the time."""
    rng = np.random.default_rng(seed)
    requests = [*work.requests(contender, rng)]
    arrivals = np.cumsum(rng.exponential(1 / rate, work.count)) if rate < np.inf else np.zeros(work.count)
    batch = CONTENDERS[contender](work.model, work.shape, slots=work.slots, guided=work.guided)
    done = np.zeros(work.count)

    def note(number):
        return lambda future: done.__setitem__(number, time.perf_counter())

    with Engine(batch, queue=work.count) as engine:
        start = time.perf_counter()
        futures = []
        for number, (request, at) in enumerate(zip(requests, arrivals, strict=True)):
            time.sleep(max(0.0, start + at - time.perf_counter()))
            futures.append(engine.submit(request))
            futures[-1].add_done_callback(note(number))
        samples = [future.result() for future in futures]
    assert all(sample.isfinite().all() for sample in samples), contender
    steps = sum(len(request.table) for request in requests)
    return {
        "latency": done - start - arrivals, "throughput": work.count / (done.max() - start),
        "batch": steps / batch.ticks, "ticks": batch.ticks, **batch.seconds,
    }, samples  # fmt: skip


def check(work):
    """Ours has the bits of sample() alone where the model allows; diffusers' samplers without noise come close to it.

    The digits model's own bits depend on the batch's size, and its trajectories carry such differences on.
    """
    exact = work.model is small_model
    requests = [*work.requests(OURS, np.random.default_rng(0))]
    ours, theirs = (run(contender, work, np.inf, 0)[1] for contender in CONTENDERS)
    compared = 0
    for request, a, b in zip(requests, ours, theirs, strict=True):
        alone = epskernels.sample(work.model, request.table, [request.seed], work.shape)[0]
        scale = alone.abs().max().item()
        if exact:
            assert torch.equal(a, alone), request.table.name
        else:
            torch.testing.assert_close(a / scale, alone / scale, rtol=0, atol=2e-2)
        if not request.table.needs_noise:
            torch.testing.assert_close(b / scale, alone / scale, rtol=0, atol=2e-3 if exact else 2e-2)
            compared += 1
    assert compared >= 2


def summary(runs):
    latencies = np.concatenate([run["latency"] for run in runs])
    seconds = {part: sum(run[part] for run in runs) for part in ("tick", "model", "step")}
    ticks = sum(run["ticks"] for run in runs)
    return {
        "throughput": float(np.median([run["throughput"] for run in runs])),
        "throughput_of_rounds": [round(float(run["throughput"]), 3) for run in runs],
        "latency_ms": {f"p{p}": round(1e3 * float(np.percentile(latencies, p)), 3) for p in (50, 95, 99)},
        "tick_ms": {part: round(1e3 * total / ticks, 4) for part, total in seconds.items()},
        "mean_batch": round(float(np.mean([run["batch"] for run in runs])), 2),
        "requests": len(latencies),
    }


def side_by_side(work, rate, rounds):
    runs = {contender: [] for contender in CONTENDERS}
    for number in range(rounds):
        order = list(CONTENDERS) if number % 2 == 0 else list(CONTENDERS)[::-1]
        for contender in order:
            runs[contender].append(run(contender, work, rate, number)[0])
    return {contender: summary(of) for contender, of in runs.items()}


def measure(work):
    check(work)
    at_once = side_by_side(work, np.inf, work.rounds)
    rows = [{"arrivals": "all at once", "rate": None, **at_once}]
    show(work, rows[0])
    for of, shares in work.shares.items():
        for share in shares:
            rate = share * at_once[of]["throughput"]
            said = f"Poisson, {share:g} of the throughput of {of}"
            rows.append({"arrivals": said, "rate": round(rate, 3), **side_by_side(work, rate, work.rounds)})
            show(work, rows[-1])
    return {
        "model": work.name, "shape": list(work.shape), "slots": work.slots, "requests": work.count, "rounds": work.rounds,
        "settings": [dataclasses.asdict(setting) for setting in work.settings], "rows": rows,
    }  # fmt: skip


def show(work, row):
    print(f"\n{work.name}, {row['arrivals']}" + (f", {row['rate']} a second" if row["rate"] else ""))
    for contender in CONTENDERS:
        at = row[contender]
        latency = ", ".join(f"{name} {value:.1f}" for name, value in at["latency_ms"].items())
        tick = ", ".join(f"{name} {value:.3f}" for name, value in at["tick_ms"].items())
        print(f"  {contender:<11} {at['throughput']:8.2f} requests/s; latency, ms: {latency}; per tick, ms: {tick}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="few requests: to see that it runs")
    args = parser.parse_args()
    begin = time.perf_counter()
    results = [measure(work) for work in workloads(args.quick)]
    seconds = round(time.perf_counter() - begin)
    if args.json:
        # A schema of its own: these rows are not those that harness.load and compare.py know.
        harness.save(
            args.json, {"schema": "serving 1", "machine": harness.about(), "seconds": seconds, "workloads": results}
        )
        print(f"\nwrote {args.json}, {seconds} s")


if __name__ == "__main__":
    main()
