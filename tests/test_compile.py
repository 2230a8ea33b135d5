"""The public functions inside torch.compile: no graph break, the same bits."""

import torch

import epskernels
from epskernels import samplers, schedule


def test_step_and_normal_compile_without_graph_break():
    table = samplers.ddpm(schedule.linear(), 5, scaling=1.01)

    def run(f, seeds):
        x = epskernels.normal(seeds, (3, 5))
        x, m0 = epskernels.step(x, f, table, 1, seeds=seeds, return_m0=True)
        return torch.ops.epskernels.step(x, f, table.rows, table.index[:2], seeds=seeds) + m0

    f, seeds = torch.randn(2, 3, 5), torch.tensor([7, 8])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(f, seeds), run(f, seeds))


def test_in_place_step_is_functionalised():
    table = samplers.ddim(schedule.linear(), 5, scaling=1.01)

    def run(x, f):
        y = x * 1
        torch.ops.epskernels.step_(y, f, table.rows, table.row_index[1])
        return y

    x, f = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x, f), run(x, f))
