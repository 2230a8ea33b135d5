"""Continuous batching: requests with their own sampler, steps, lambda, guidance, condition and seed share one running batch.

    tick:  f = model(c_in*x, t, **conditions)              one model call, on all active slots
           x, m0 = step(x, f, rows, index, ...)            one launch: every slot reads its own row
           index += 1

Index, seeds, history and conditions are tensors with an entry for each slot, and the rows of all tables lie in one buffer, so a
tick does nothing per request; joining and leaving, between ticks, do. With time shift a slot takes one of several rows that lie
from its index on. A request comes out with the bits of epskernels.sample alone, if the model gives a sample the same bits in any
batch: convolutions and matrix products in general do not (see Batch, `padded`).

    python examples/serving.py      # unlike requests for digits, sampled together
"""

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import epskernels
from epskernels.table import BAND_COLUMNS, COLUMNS, band_dims_of
from epskernels.time_shift import UNUSED, ShiftedTable, nearest, on_device, variance
from epskernels.trajectory import f_and_u
from epskernels.typing import Backend, Device, ModelOutput, Shape

T, C_IN = COLUMNS.index("t"), COLUMNS.index("c_in")


class Full(RuntimeError):
    """The queue has no room: try again later, or submit with a timeout."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """table: one sampler's, with its steps, lambda and guidance, or a ShiftedTable. condition: what the model gets beside x and
    t, by name. shape: of the sample; default the batch's."""

    table: epskernels.Table | ShiftedTable
    seed: int
    condition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shape: Shape | None = None


class _Job:
    """A request on its way: its future, its rows, and, while it runs, its slot and the tick after which it is done.

    candidates: of each model call, the rows among which time shift chooses by `levels`; 1 without it.
    """

    def __init__(self, request: Request, condition: dict[str, Tensor]):
        self.request, self.condition = request, condition
        self.future: concurrent.futures.Future[Tensor] = concurrent.futures.Future()
        self.table, shifted = on_device(request.table, "cpu")
        self.rows, self.candidates = (shifted or self.table).rows, shifted.candidates if shifted else 1
        self.levels = shifted.levels.flatten() if shifted else None
        self.key = b"".join(each.numpy().tobytes() for each in (self.rows, self.levels) if each is not None)
        self.slot: int | None = None
        self.end = 0
        self.resolved = False

    def resolve(self, result: Tensor | Exception | None) -> None:
        """Once, by the worker: a sample or an exception, where it was not cancelled."""
        if self.resolved:
            return
        self.resolved = True
        if not self.future.set_running_or_notify_cancel():  # only now: until then it can be cancelled
            return
        if isinstance(result, Exception):
            self.future.set_exception(_of_one_request(result))
        elif result is not None:
            self.future.set_result(result)


def _of_one_request(error: Exception) -> Exception:
    """A copy of its own: whoever raises it lengthens its traceback. RuntimeError in the place of what futures take for a sign."""
    mine: Exception | None = None
    with contextlib.suppress(Exception):  # a constructor that takes other arguments
        mine = copy.copy(error)
    if (
        mine is None
        or type(mine) is not type(error)
        or isinstance(error, (StopIteration, concurrent.futures.CancelledError))
    ):
        mine = RuntimeError(f"{type(error).__name__}: {error}")
        mine.__cause__ = error
    return mine.with_traceback(error.__traceback__)


class Rows:
    """The rows of all tables in use, in one device buffer; equal tables lie there once, and leave with their last user."""

    def __init__(self, capacity: int, device: Device):
        wide = len(COLUMNS) + len(BAND_COLUMNS)
        self.buffer = torch.zeros(capacity, wide, dtype=torch.float32, device=device)
        self.levels = torch.full((capacity,), UNUSED, dtype=torch.float64, device=device)
        self._spans: dict[bytes, list[int]] = {}  # by the rows' bytes: [first, end, users]

    def find(self, key: bytes, length: int) -> int | None:
        """Where the rows are or can be put: the first of them, or None where no gap is long enough."""
        if key in self._spans:
            return self._spans[key][0]
        first = 0
        for begin, end, _ in sorted(self._spans.values()):
            if begin - first >= length:
                return first
            first = end
        return first if len(self.buffer) - first >= length else None

    def put(self, key: bytes, rows: Tensor, levels: Tensor | None = None) -> int:
        first = self.find(key, len(rows))
        assert first is not None  # what does not fit waits: Batch.fits
        if key not in self._spans:
            self.buffer[first : first + len(rows), : rows.shape[1]] = rows
            self.buffer[first : first + len(rows), rows.shape[1] :] = 0
            self.levels[first : first + len(rows)] = UNUSED if levels is None else levels
            self._spans[key] = [first, first + len(rows), 0]
        self._spans[key][2] += 1
        return first

    def drop(self, key: bytes) -> None:
        self._spans[key][2] -= 1
        if self._spans[key][2] == 0:
            del self._spans[key]


class Batch:
    """The running batch on its device; memory is all taken here. Not thread-safe: Engine's worker owns it.

    model: (x, t, **conditions) -> f, or (f, u) where `guided`; with twice the channels where `learned_variance`. x: (B, *shape),
    c_in times the states; t: (B,) float32, in which timesteps are exact.
    slots: the most requests that run at once. max_rows: of all their tables. conditions: for each name that the model takes, the
    tensor of a request that does not give it. history: the most earlier m0 that a table may read. second_state: tables may have
    one. window: the widest window of a ShiftedTable; its tables have some window + 1 rows for each model call.
    padded: call the model on all slots, idle ones too. Convolutions and matrix products choose their algorithm, and so the
    order of their sums, by the batch's size: results then do not depend on the load, but are those of a batch of `slots`.
    """

    def __init__(
        self,
        model: Callable[..., ModelOutput],
        shape: Shape,
        *,
        slots: int = 16,
        max_rows: int = 1024,
        conditions: Mapping[str, Any] | None = None,
        guided: bool = False,
        learned_variance: bool = False,
        history: int = 1,
        second_state: bool = False,
        window: int = 0,
        padded: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
        backend: Backend | None = None,
    ):
        self.model, self.shape, self.slots, self.padded, self.backend = model, tuple(shape), slots, padded, backend
        self.guided, self.learned_variance = guided, learned_variance
        self.rows = Rows(max_rows, device)
        self.defaults = {name: torch.as_tensor(value, device=device) for name, value in (conditions or {}).items()}
        self.conditions = {n: default.expand(slots, *default.shape).clone() for n, default in self.defaults.items()}
        self.x = torch.zeros(slots, *self.shape, dtype=dtype, device=device)
        self.index, self.seeds = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self.candidates = torch.ones(slots, 1, dtype=torch.int64, device=device)
        self.window, self._all_candidates = window, torch.arange(2 * (window // 2) + 1, device=device)
        # Never initialised: a table's first rows do not read them.
        self.history = [torch.empty_like(self.x) for _ in range(history)]
        self.y = [torch.empty_like(self.x)] if second_state else []
        self.jobs: list[_Job] = []  # job i runs in slot i
        self.ticks = 0
        self._ends: dict[int, list[_Job]] = collections.defaultdict(list)  # by tick, the jobs that are done after it
        self._members_changed()

    def check(self, request: Request) -> dict[str, Tensor]:
        """The request's conditions as tensors; ValueError where this batch can never run it."""
        if not isinstance(request, Request):
            raise ValueError(f"request: expected a Request, got {request!r}")
        table, shape, candidates = request.table, request.shape, 1
        if isinstance(table, ShiftedTable):
            candidates, table = table.candidates, table.table
        if not isinstance(table, epskernels.Table) or len(table.parts) != 1:
            raise ValueError(f"table: expected one sampler's Table, got {getattr(table, 'name', table)!r}")
        if shape is not None and (not isinstance(shape, (tuple, list)) or tuple(shape) != self.shape):
            raise ValueError(f"shape: this engine makes samples of {self.shape}, got {shape!r}")
        epskernels.as_seeds([request.seed])
        limits = {
            "max_rows": (len(table) * candidates, len(self.rows.buffer)),
            "window": (candidates - 1, self.window),
            "history": (table.history, len(self.history)),
            "second_state": (table.second_state, bool(self.y)),
            "guided": (table.guided, self.guided),
            "learned_variance": (table.learned_variance, self.learned_variance),
        }
        for option, (asked, limit) in limits.items():
            if asked > limit:
                least = "" if isinstance(limit, bool) else " or more"
                raise ValueError(f"table: {table.name} needs {option}={asked}{least} in Batch, which has {limit}")
        if table.band_dims not in (0, band_dims_of(1 + len(self.shape))):
            expected = f"bands in {band_dims_of(1 + len(self.shape))} dimensions for samples of {self.shape}"
            raise ValueError(f"table: expected {expected}, got {table.name}, which corrects them in {table.band_dims}")
        if not isinstance(request.condition, Mapping):
            raise ValueError(f"condition: expected a mapping, got {request.condition!r}")
        if unknown := set(request.condition) - set(self.defaults):
            raise ValueError(f"condition: expected some of {sorted(self.defaults)}, got {sorted(unknown)}")
        condition = {}
        for name, value in request.condition.items():
            default = self.defaults[name]
            try:
                value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"condition: expected {name} to be a tensor or numbers, got {value!r}") from None
            if value.shape != default.shape or not torch.can_cast(value.dtype, default.dtype):
                expected, got = (f"{tuple(a.shape)} of {a.dtype}" for a in (default, value))
                raise ValueError(f"condition: expected {name} to be {expected}, got {got}")
            condition[name] = value.to(default.dtype, copy=True)
        return condition

    def fits(self, job: _Job) -> bool:
        return len(self.jobs) < self.slots and self.rows.find(job.key, len(job.rows)) is not None

    @torch.no_grad()
    def join(self, job: _Job) -> None:
        """Into the first idle slot, at the job's first row."""
        slot, table = len(self.jobs), job.table
        seeds = epskernels.as_seeds([job.request.seed], self.x.device)
        self.x[slot] = (table.initial_sigma * epskernels.normal(seeds, self.shape, backend=self.backend))[0]
        self.seeds[slot] = seeds[0]
        for name, buffer in self.conditions.items():
            buffer[slot] = job.condition.get(name, self.defaults[name])
        self.index[slot] = self.rows.put(job.key, job.rows, job.levels)
        self.candidates[slot] = job.candidates
        job.slot, job.end = slot, self.ticks + len(table)
        self.jobs.append(job)
        self._ends[job.end].append(job)
        self._members_changed()

    @torch.no_grad()
    def leave(self, job: _Job) -> None:
        """The last slot moves into the job's, so that the active ones are always the first."""
        assert job.slot is not None  # it runs
        last = self.jobs.pop()
        if last is not job:
            own = self.x, self.index, self.candidates, self.seeds, *self.history, *self.y, *self.conditions.values()
            for tensor in own:
                tensor[job.slot] = tensor[last.slot]
            self.jobs[job.slot], last.slot = last, job.slot
        self.index[len(self.jobs)], self.candidates[len(self.jobs)] = 0, 1  # a row that is there, for `padded`
        self.rows.drop(job.key)
        self._ends[job.end].remove(job)
        if not self._ends[job.end]:
            del self._ends[job.end]
        job.slot = None
        self._members_changed()

    def _members_changed(self) -> None:
        tables = [job.table for job in self.jobs]
        self._depth = max((table.history for table in tables), default=0)
        self._second_state = any(table.second_state for table in tables)
        self._scales_input = any((table["c_in"] != 1).any() for table in tables)
        self._shifts = any(job.candidates > 1 for job in self.jobs)
        by_band = any(table.band_dims for table in tables)  # else the launch that knows no bands
        self._applied = self.rows.buffer if by_band else self.rows.buffer[:, : len(COLUMNS)]

    @torch.no_grad()
    def tick(self) -> list[tuple[_Job, Tensor]]:
        """One model call and one step; [(job, sample)] of those that are done by it, which have left."""
        called = self.slots if self.padded else len(self.jobs)
        self.chosen = self.choose(called)
        output = self.model(*self.model_input(called), **{n: buffer[:called] for n, buffer in self.conditions.items()})
        f, u = f_and_u(output)
        if self.guided != (u is not None):
            raise ValueError(f"model: expected {'(f, u)' if self.guided else 'f'}, as guided={self.guided} says")
        f, v = _halves(f, self.shape)
        if len(f) != called or (self.learned_variance and v is None):
            twice = ", twice the channels of x" if self.learned_variance else ""
            raise ValueError(f"model: expected {called} samples{twice}, got {tuple(f.shape)}")
        count = len(self.jobs)
        self.step(f[:count], None if v is None else v[:count], None if u is None else u[:count])
        self.ticks += 1
        done = [(job, self.x[job.slot].clone()) for job in self._ends.get(self.ticks, ())]
        for job, _ in done:
            self.leave(job)
        return done

    def choose(self, called: int) -> Tensor:
        """The row that each slot applies: with time shift, the candidate that is nearest to its state's variance."""
        index = self.index[:called]
        if not self._shifts:
            return index
        candidates = (index[:, None] + self._all_candidates).clamp_(max=len(self.rows.buffer) - 1)
        own = self._all_candidates < self.candidates[:called]
        levels = torch.where(own, self.rows.levels[candidates], UNUSED)
        return index + nearest(variance(self.x[:called], backend=self.backend), levels)

    def model_input(self, called: int) -> tuple[Tensor, Tensor]:
        """x and t of the model call."""
        x = self.x[:called]
        if self._scales_input:
            x = (self.rows.buffer[self.chosen, C_IN].reshape(-1, *[1] * len(self.shape)) * x).to(x.dtype)
        return x, self.rows.buffer[self.chosen, T]

    def step(self, f: Tensor, v: Tensor | None, u: Tensor | None) -> None:
        """One launch, in place, on the active slots.

        Not by epskernels.trajectory.Trajectory, which moves the history of one table: here requests that join and leave change
        how much of it is read and how many slots take part, so that every tick would have to cut its tensors and put them back.
        """
        count = len(self.jobs)
        x, index = self.x[:count], self.chosen[:count]
        u, v = None if u is None else _halves(u, self.shape)[0], v if self.learned_variance else None
        m1, m2 = ([m[:count] for m in self.history[: self._depth]] + [None, None])[:2]
        m0 = m2 if self._depth == 2 else m1  # over the oldest, which is read for the last time
        y = self.y[0][:count] if self._second_state else None
        inputs = {"u": u, "v": v, "m1": m1, "m2": m2, "y": y, "seeds": self.seeds[:count], "backend": self.backend}
        epskernels.step(x, f, self._applied, index, **inputs, out=x, m0=m0, y_out=y)
        if self._depth == 2:
            self.history.reverse()
        self.index[:count] += self.candidates[:count, 0]


def _halves(f: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """f and v of the model's output; v is None where it has the channels of x."""
    if f.dim() < 2 or f.shape[1] != 2 * shape[0]:
        return f, None
    f, v = f.chunk(2, dim=1)
    return f, v


class Engine:
    """A batch served by a thread of its own: `submit` from anywhere; a future's `cancel` works while it waits and while it runs.

    queue: how many requests may wait. They start in the order in which they came. An error of the model fails the requests of
    the batch that it was called for, and the engine goes on. Use it as a context manager: it serves what was submitted, and
    cancels it where the block raises.
    """

    def __init__(self, batch: Batch, *, queue: int = 64):
        self.batch, self.queue = batch, queue
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._open: set[_Job] = set()  # all jobs whose futures are not resolved
        self._cancelled: list[_Job] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="epskernels-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, cancel=True)  # a thread inside torch must not see the interpreter go

    def submit(self, request: Request, timeout: float | None = 0) -> "concurrent.futures.Future[Tensor]":
        """A concurrent.futures.Future of the sample, on the batch's device.

        timeout: seconds to wait for room in the queue, None for ever. Raises ValueError for what the engine cannot run, Full,
        Closed.
        """
        job = _Job(request, self.batch.check(request))
        if threading.current_thread() is self._thread:
            timeout = 0  # a future's callback: room is made by the thread that would wait for it
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._waiting) < self.queue, timeout)
            if self._closing:
                raise Closed("engine: closed, it takes no more requests")
            if len(self._waiting) >= self.queue:
                raise Full(f"engine: the queue is full, {self.queue} waiting and {len(self.batch.jobs)} running")
            self._waiting.append(job)
            self._open.add(job)
            self._changed.notify_all()
        job.future.add_done_callback(functools.partial(self._resolved, job))
        return job.future

    async def generate(self, request: Request) -> Tensor:
        """`submit` for asyncio: cancelling the task cancels the request."""
        return await asyncio.wrap_future(self.submit(request))

    def close(self, cancel: bool = False) -> None:
        """Takes no more requests, serves what it has, or cancels it, and ends the thread."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            unfinished = list(self._open) if cancel else []
            self._changed.notify_all()
        for job in unfinished:
            job.future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _resolved(self, job: _Job, future: "concurrent.futures.Future[Tensor]") -> None:
        with self._changed:
            self._open.discard(job)
            if future.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove(job)
                self._cancelled.append(job)
                self._changed.notify_all()

    # ---- the worker thread ----

    def _run(self) -> None:
        done: Sequence[tuple[_Job, Tensor | Exception]]
        try:
            while self._wait():
                try:
                    self._admit()
                    done = self.batch.tick() if self.batch.jobs else []
                except Exception as error:
                    done = [(job, error) for job in list(self.batch.jobs)]
                    for job, _ in done:
                        self.batch.leave(job)
                for job, result in done:
                    job.resolve(result)
        finally:  # whatever happens, nobody waits for ever
            with self._changed:
                self._closing = True
                unfinished = [*self._open, *self._cancelled]
                self._changed.notify_all()
            for job in unfinished:
                job.resolve(Closed("engine: its thread has ended"))

    def _wait(self) -> bool:
        """Until there is something to do; False at the end. Cancelled jobs have left then."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.batch.jobs or self._cancelled or self._closing)
            cancelled, self._cancelled = self._cancelled, []
        for job in cancelled:
            if job.slot is not None:
                self.batch.leave(job)
            job.resolve(None)
        with self._changed:
            return bool(self._waiting or self.batch.jobs or not self._closing)

    def _admit(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or not self.batch.fits(self._waiting[0]):
                    return  # the first waits for a slot, or for rows: nobody passes it
                job = self._waiting.popleft()
                self._changed.notify_all()
            try:
                self.batch.join(job)
            except Exception as error:
                job.resolve(error)


def main() -> None:
    from epskernels import models, samplers, schedule

    digits = models.load()
    network, path = digits.callable(), digits.schedule
    edm = schedule.KarrasSchedule(model=path)
    tables = {
        "ddpm, 50 steps, lambda 1.005": samplers.ddpm(path, 50, scaling=1.005, variance="learned_range", clip=1.0),
        "ddim, 20 steps": samplers.ddim(path, 20, clip=1.0),
        "dpmpp_2m, 12 steps": samplers.dpmpp_2m(path, 12, spacing="trailing", clip=1.0),
        "edm_heun, 10 steps, lambda 1.002": samplers.edm_heun(edm, 10, prediction="epsilon", scaling=1.002, clip=1.0),
    }
    batch = Batch(network, digits.shape, slots=8, learned_variance=digits.learned_variance, padded=True)
    with Engine(batch) as engine:
        futures = [(name, engine.submit(Request(table, seed))) for seed in range(4) for name, table in tables.items()]
        for name, future in futures:
            sample = future.result()
            print(f"{name:<34} {tuple(sample.shape)}, mean {sample.mean():+.3f}")
    print(f"{len(futures)} requests, {sum(len(tables[name]) for name, _ in futures)} rows, {batch.ticks} model calls")


if __name__ == "__main__":
    main()
