"""The examples of docs/production_serving.md run as they stand; torchrun's, in this process."""

import pathlib
import re
import shlex
import sys

import pytest
import torch

from epskernels import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "production_serving.md").read_text()
SERVING, READING = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(COMMAND,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_serving(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    sys.modules.pop("serving", None)
    names = {}
    exec(SERVING, names)
    samples = [*names["samples"], names["late"].result(), names["image"]]
    assert len(samples) >= 13 and all(s.shape == (3, 32, 32) and s.isfinite().all() for s in samples)
    import epskernels

    request = lambda x, t: names["model"](x, t, torch.tensor([1]))  # noqa: E731
    alone = epskernels.sample(request, names["tables"][1], [1], (3, 32, 32))[0]
    assert torch.equal(names["samples"][1], alone)


def test_many_processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    launcher, arguments = COMMAND.split(" -m epskernels ")
    assert launcher == "torchrun --nproc-per-node 2"
    assert cli.main([*shlex.split(arguments), "--quiet"]) == 0
    names = {}
    exec(READING, names)
    assert names["everything"].shape == (42, 1, 28, 28)
