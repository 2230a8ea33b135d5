"""Serving on a GPU, and sampling into a directory by torchrun, over NCCL where there are several; skipped without one."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from epskernels import cli, shards

from ..serving.test_serving import ALL, SHAPE, Batch, alone, model, serve, unlike

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["active slots", "padded"])
def test_each_request_is_as_alone(dtype, padded):
    batch, requests = Batch(model, SHAPE, slots=5, dtype=dtype, padded=padded, device="cuda", **ALL), unlike(40)
    for tensor in (*batch.history, *batch.y):
        tensor.fill_(float("nan"))
    for request, sample in zip(requests, serve(batch, requests), strict=True):
        assert sample.is_cuda and sample.dtype == dtype
        assert torch.equal(sample, alone(request, dtype=dtype, device="cuda")), request


def test_ranks_on_gpus_write_what_one_process_writes(tmp_path):
    """As many processes as there are GPUs, up to three; with one, torchrun all the same, and no NCCL."""
    pytest.importorskip("diffusers")
    from ..ranks.test_distributed import build_model

    (tmp_path / "model").mkdir()
    arguments = [
        "--model",
        build_model(tmp_path / "model"),
        "--steps",
        "4",
        "--seeds",
        "0-24",
        "--batch",
        "4",
        "--quiet",
    ]
    assert cli.main(["sample", *arguments, "--device", "cuda", "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(min(3, torch.cuda.device_count())), "-m", "epskernels", "sample"]
    command = [*launcher, *arguments, "--device", "cuda", "--out", str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, many = (shards.Shards(tmp_path / name) for name in ("one", "many"))
    assert np.array_equal(many.load(), one.load()) and len(many) == 7
    assert many.settings["device"] == torch.cuda.get_device_name()
