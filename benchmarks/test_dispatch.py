"""What a call costs, with pytest-benchmark: absolute numbers for whoever works on the dispatch; not part of `make test`.

make bench-dispatch
"""

import pytest
import torch

import epskernels
from epskernels import samplers, schedule

TABLE = samplers.ddim(schedule.linear(), 20, clip=1.0)
OPS = torch.ops.epskernels
OP, OP_PLAIN, OP_OUT = OPS.step.default, OPS.step_plain.default, OPS.step_out.default
INDEX = TABLE.row_index[7]


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


CALLS = {
    "torch.add": lambda x, f, y: torch.add(x, f),
    "torch.add, out=": lambda x, f, y: torch.add(x, f, out=y),
    "the op": lambda x, f, y: OP(x, f, TABLE.rows, INDEX),
    "the op, plain": lambda x, f, y: OP_PLAIN(x, f, TABLE.rows, INDEX),
    "the op, out=": lambda x, f, y: OP_OUT(x, f, TABLE.rows, INDEX, out=y),
    "epskernels.step": lambda x, f, y: epskernels.step(x, f, TABLE, 7),
    "epskernels.step, out=": lambda x, f, y: epskernels.step(x, f, TABLE, 7, out=y),
    "epskernels.step, by use_backend": lambda x, f, y: epskernels.step(x, f, TABLE, 7),
}


@pytest.mark.parametrize("call", CALLS)
def test_call(benchmark, call):
    x, f, y = torch.randn(1, 1024), torch.randn(1, 1024), torch.empty(1, 1024)
    expected = epskernels.step(x, f, TABLE, 7, backend="reference")
    with epskernels.use_backend("cpu") if "use_backend" in call else torch.no_grad():
        result = CALLS[call](x, f, y)
        result = y if result is None else result
        assert torch.equal(result, torch.add(x, f) if "add" in call else expected)
        benchmark(CALLS[call], x, f, y)
