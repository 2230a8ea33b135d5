"""The drop-in schedulers on a GPU: the bits of the CPU, and no wait for the device between set_timesteps and the last step."""

import pytest
import torch

from ..support import kernels

pytestmark = pytest.mark.skipif(not kernels.ON_GPU, reason="there is no GPU")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from epskernels import diffusers as fused  # noqa: E402

from ..diffusers.test_trajectories import EXAMPLES, STOCHASTIC  # noqa: E402

SHAPE = (2, 3, 16, 16)


def trajectory(name, device, checked=False):
    config, call = STOCHASTIC.get(name, ({}, {}))
    scheduler = getattr(fused, name)(**config)
    scheduler.set_timesteps(8, device=device)
    seeds = {"seeds": torch.tensor([3, 4], device=device)} if name in STOCHASTIC else {}
    generator = torch.Generator().manual_seed(5)
    outputs = [torch.randn(SHAPE, generator=generator).to(device) for _ in scheduler.timesteps]
    x = torch.randn(SHAPE, generator=generator).to(device)
    states = []
    if checked:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for f, t in zip(outputs, scheduler.timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(f, t, x, return_dict=False, **call, **seeds)[0]
            states.append(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scheduler.path == "fused"
    return [state.cpu() for state in states]


@pytest.mark.parametrize("name", EXAMPLES)
def test_bits_of_the_cpu_without_waiting(name):
    for ours, expected in zip(trajectory(name, "cuda", True), trajectory(name, "cpu"), strict=True):
        if "Euler" in name and name in STOCHASTIC and STOCHASTIC[name][1]:
            torch.testing.assert_close(ours, expected)  # churn is torch.add, which fuses as it likes
        else:
            assert torch.equal(ours, expected)
