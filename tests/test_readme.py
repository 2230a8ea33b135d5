"""The README's Python blocks run as they stand."""

import torch
from markdown_examples import blocks


def test_examples_run_and_agree():
    example, equivalent = (code for _, _, code in blocks("README.md", "python"))
    names = {}
    exec(example, names)
    assert names["images"].shape == (8, 3, 32, 32) and names["images"].isfinite().all()

    exec(equivalent, names)
    table, f, seeds = names["table"], names["f"], names["seeds"]
    x = torch.randn(8, 3, 32, 32)
    import epskernels
    from epskernels.table import COLUMNS

    row = type("Row", (), dict(zip(COLUMNS, table.rows[4].tolist(), strict=True)))
    z = epskernels.normal(seeds, (3, 32, 32), stream=0, draw=4)
    torch.testing.assert_close(names["step"](x, f, row, z), epskernels.step(x, f, table, 4, seeds=seeds))
