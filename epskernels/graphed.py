"""The sampling loop without the host: model and step in a CUDA graph, static tensors, one sampler's kernel per model call.

The step writes the model's next input itself (c_in times x', in the model's dtype, in both halves of a doubled guidance batch),
so that nothing stands between a model call and the next but the step. Without CUDA the loop runs without a graph, and says so.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .ops import DTYPES, as_seeds, normal
from .sample import check_callables
from .table import Table
from .time_shift import ShiftedTable, on_device
from .trajectory import Trajectory, ask, f_and_u, outputs
from .typing import Device, ModelCall, SeedsLike, Shape

__all__ = ["GraphedSampler"]


class GraphedSampler:
    """A sampler whose whole loop is captured once, for one table, batch and shape, and replayed for any seeds.

    model: any callable (x, t) -> f, or -> (f, u), u the unconditional output; what it is conditioned on it reads from tensors
    of its own, which may be written between calls. doubled: it takes and returns (2B, ...) instead, u in the first half and f
    in the second. x comes in model_dtype (default: dtype), and f must have it too; t is (B,) or (2B,), int64 timesteps or
    float32 noise levels. table: one sampler's Table, or a ShiftedTable (`time_shift`). batch, shape: of the samples, (batch,
    *shape). dtype: of the state. device: default the table's. whole: capture the loop over all rows, one replay per call of the
    sampler; else a graph of one row, replayed for each, its index advancing on the device: less memory for long tables, and a
    few small kernels more for each row.

    Calls give the bits of `sample` with the same table and seeds where the model does. One call at a time: others wait, on the
    device too, whatever their streams. What the model reads is the caller's to order; the sampler itself has to be kept until
    its last call is done on the device.
    Attributes: graphed, whether a CUDA graph is replayed; why_not, else the reason, which a RuntimeWarning tells too.
    Raises ValueError, TypeError or RuntimeError naming the argument; what the model raises, when it is first called.
    """

    def __init__(
        self,
        model: ModelCall,
        table: Table | ShiftedTable,
        batch: int,
        shape: Shape,
        *,
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype | None = None,
        doubled: bool = False,
        whole: bool = True,
        device: Device | None = None,
    ):
        table, self._shifted = on_device(table, device)
        check_callables(model=model)
        if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shape: expected a list or tuple of sizes of at least 1, got {shape!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
        for name, value in (("dtype", dtype), ("model_dtype", model_dtype or dtype)):
            if value not in DTYPES:
                raise ValueError(f"{name}: expected float32, float16 or bfloat16, got {value}")
        self.table = table
        self.model, self.doubled, self.whole = model, doubled, whole
        device, copies = table.device, 2 if doubled else 1
        timesteps = torch.tensor(table["t"], dtype=torch.int64 if table.discrete else torch.float32, device=device)
        self._timesteps = timesteps[:, None].repeat(1, copies * batch)
        self._timestep_rows = self._timesteps.unbind()
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._index = torch.zeros((), dtype=torch.int64, device=device)
        self._x = torch.zeros(batch, *shape, dtype=dtype, device=device)
        self._run = Trajectory(table, self._x, rows=(self._shifted or table).rows, in_place=True)
        self._model_input = torch.zeros(copies * batch, *shape, dtype=model_dtype or dtype, device=device)
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self.why_not = None if device.type == "cuda" else f"the table is on {device}, and CUDA graphs need a GPU"
        if self.why_not:
            warnings.warn(
                f"epskernels.GraphedSampler runs without a graph: {self.why_not}", RuntimeWarning, stacklevel=2
            )
        else:
            self._capture()

    @property
    def graphed(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return self._graph is not None

    @torch.no_grad()
    def __call__(self, seeds: SeedsLike) -> Tensor:
        """Samples (B, *shape), one for each seed: int64 (B,), or a list or range of integers. ValueError for another number."""
        seeds = as_seeds(seeds, self.table.device)
        if len(seeds) != len(self._x):
            raise ValueError(f"seeds: expected {len(self._x)}, the batch that was captured, got {len(seeds)}")
        with self._in_turn():
            self._seeds.copy_(seeds)
            if self.whole:
                self._loop() if self._graph is None else self._graph.replay()
            else:
                self._begin()
                for _ in range(len(self.table)):
                    self._next_row() if self._graph is None else self._graph.replay()
            return self._x.clone()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """All calls write the same tensors: each waits for the one before, the host by a lock, the call's stream by an event."""
        with self._lock:
            if self._graph is None:
                yield
                return
            stream = torch.cuda.current_stream(self.table.device)
            stream.wait_event(self._done)
            try:
                yield
            finally:
                stream.record_event(self._done)

    # ---- what is captured ----

    def _begin(self) -> None:
        """The initial latent, and the model's first input."""
        x = self.table.initial_sigma * normal(self._seeds, self._x.shape[1:])
        self._x.copy_(x)
        self._index.zero_()
        first = self.table["c_in"][0] * self._x.float()
        for half in self._model_input.split(len(self._x)):
            half.copy_(first)

    def _row(self, i: int | Tensor, index: Tensor, t: Tensor) -> None:
        """Model call i and its step, in place. index, t: of a table without time shift."""
        if self._shifted:
            index, t = self._shifted.choose(i, self._x)
            t = t.repeat(len(self._model_input) // len(self._x))
        output = ask(self.model, self._model_input, t)
        if self.doubled:
            both, beside = f_and_u(output)
            if beside is not None or len(both) != len(self._model_input):
                got = "a pair" if beside is not None else tuple(both.shape)
                raise ValueError(f"model: expected it to return (2B, ...), u and f in one, as doubled says, got {got}")
            unconditional, conditional = both.chunk(2)
            output = conditional, unconditional
        f, u, v = outputs(output, self._x, self.table)
        self._run.step(index, f, u, v, seeds=self._seeds, model_input=self._model_input)

    def _loop(self) -> None:
        self._begin()
        for i, index in enumerate(self.table.row_index):
            self._row(i, index, self._timestep_rows[i])

    def _next_row(self) -> None:
        history = self._run.m
        self._row(self._index, self._index, self._timesteps.index_select(0, self._index.reshape(1))[0])
        for tensor, value in zip(history, [m.clone() for m in self._run.m] if len(history) > 1 else (), strict=False):
            tensor.copy_(value)  # the tensors of a graph cannot change places, but their contents can
        self._run.m = history
        self._index.add_(1)

    @torch.no_grad()
    def _capture(self) -> None:
        run = self._loop if self.whole else self._next_row

        with torch.cuda.device(self.table.device):
            stream = torch.cuda.Stream()  # libraries make workspaces, and the model its mistakes, before the capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._begin()
                run()
            torch.cuda.current_stream().wait_stream(stream)
            self._begin()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self._graph, self._done = graph, torch.cuda.current_stream().record_event()
