"""The README's Python blocks run as they stand."""

import pathlib
import re

import torch

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run_and_agree():
    example, equivalent = re.findall(r"```python\n(.*?)```", README, re.S)
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
