"""A sampler's state between two model calls, and the one place where it moves on: x, the estimates of the calls before, y."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import DTYPES, step
from .table import Table, describe
from .typing import Index, ModelCall, Outputs

__all__ = ["Trajectory", "ask", "f_and_u", "outputs"]


class Trajectory:
    """x: the state, (B, *shape). m: m0 of the calls before, the newest first, as many as the table reads. y: the second state.

    table: one sampler's. rows: what is applied, a Table or its rows, default the table. in_place: x, m and y are written into,
    and are there from the beginning, so that a CUDA graph can hold them. second_state: False where the rows leave it out. All
    may be set between steps.
    """

    def __init__(
        self,
        table: Table,
        x: Tensor,
        *,
        rows: Table | Tensor | None = None,
        in_place: bool = False,
        second_state: bool | None = None,
    ):
        self.table, self.x, self.in_place = table, x, in_place
        self.rows: Table | Tensor = table if rows is None else rows
        self.second_state = table.second_state if second_state is None else second_state
        self.m = [torch.zeros_like(x) for _ in range(table.history)] if in_place else []
        self.y = torch.zeros_like(x) if in_place and self.second_state else None

    def call(self, model: ModelCall, i: int) -> Outputs:
        """f, u and v of row i's model call; u and v are None where there are none. Raises as `outputs`."""
        kind = torch.int64 if self.table.discrete else torch.float32
        t = torch.full((len(self.x),), self.table["t"][i], dtype=kind, device=self.x.device)
        c_in = self.table.calls[i][1]
        return outputs(ask(model, self.x if c_in == 1 else c_in * self.x, t), self.x, self.table)

    def step(
        self,
        i: Index,
        f: Tensor,
        u: Tensor | None = None,
        v: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
        returns_m0: bool = True,
        model_input: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | None:
        """Applies row i, and returns m0; None where neither the caller nor the table asks for it, or where it is in place.

        i: an integer, or the op's index. seeds: of the noise, for tables that have some. model_input: in place, as in `step`.
        inputs: what else `epskernels.step` takes.
        """
        m1, m2 = (*self.m, None, None)[:2]
        inputs |= {"u": u, "v": v, "m1": m1, "m2": m2, "seeds": seeds if self.table.needs_noise else None}
        m0 = None
        if self.in_place:
            m0 = self.m[-1] if self.m else None  # over the oldest, which is read for the last time
            outs: dict[str, Any] = {"out": self.x, "m0": m0, "y_out": self.y, "model_input": model_input}
            step(self.x, f, self.rows, i, **inputs, y=self.y, **outs)
        elif self.second_state:
            self.x, m0, self.y = step(self.x, f, self.rows, i, **inputs, y=self.y, return_y=True)
        elif returns_m0 or self.table.history:
            self.x, m0 = step(self.x, f, self.rows, i, **inputs, return_m0=True)
        else:
            self.x = step(self.x, f, self.rows, i, **inputs)
        if m0 is not None:
            self.m = [m0, *self.m][: self.table.history]
        return m0


def ask(model: ModelCall, x: Tensor, t: Tensor) -> Any:
    """model(x, t). A note on what it raises says what it was given, where torch names neither."""
    try:
        return model(x, t)
    except Exception as error:
        error.add_note(f"epskernels: the model was called with x, {_described(x)}, and t, {_described(t)}")
        raise


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def f_and_u(output: Any) -> tuple[Tensor, Tensor | None]:
    """f, and u or None, of what a model returned: a tensor, a pair of them, or what has the tensor as `.sample`.

    Raises TypeError for anything else.
    """
    pair = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    f, u = (part if isinstance(part, torch.Tensor) else getattr(part, "sample", part) for part in pair)
    if isinstance(f, torch.Tensor) and (u is None or isinstance(u, torch.Tensor)):
        return f, u
    raise TypeError(
        f"model: expected it to return a tensor f, a pair (f, u), or what has f as .sample, got {describe(output)}"
    )


def outputs(output: Any, x: Tensor, table: Table) -> Outputs:
    """f, u and v of what the model returned for the state x; u and v are None where there are none.

    Raises TypeError for an output that is no such thing, ValueError for one of another shape, dtype or device, or without the
    variance that the table needs.
    """
    f, u = f_and_u(output)
    doubled = f.dim() > 1 and x.dim() > 1 and f.shape[1] == 2 * x.shape[1]
    if table.learned_variance and not doubled:
        raise ValueError(
            f"model: {table.name} needs the learned variance, twice the channels of x {tuple(x.shape)}, "
            f"got {tuple(f.shape)}"
        )
    if doubled:
        _check_output("an output", f, (x.shape[0], 2 * x.shape[1], *x.shape[2:]), "twice the channels of x", x)
    else:
        _check_output("an output", f, x.shape, "as x has", x)
    if u is not None:
        _check_output("an unconditional output", u, f.shape, "as the conditional one has", x)
    if not doubled:
        return f, u, None
    f, v = f.chunk(2, dim=1)
    return f, u if u is None else u.chunk(2, dim=1)[0], v if table.learned_variance else None


def _check_output(what: str, output: Tensor, shape: Sequence[int], why: str, x: Tensor) -> None:
    if output.shape != tuple(shape):
        raise ValueError(f"model: expected {what} of shape {tuple(shape)}, {why}, got {tuple(output.shape)}")
    if output.dtype not in DTYPES:
        raise ValueError(
            f"model: expected {what} of float32, float16 or bfloat16, got {_described(output)}; a network in double is called "
            "as lambda x, t: net(x.double(), t).float()"
        )
    if output.device != x.device:
        raise ValueError(f"model: expected {what} on {x.device}, as x is, got one on {output.device}")
