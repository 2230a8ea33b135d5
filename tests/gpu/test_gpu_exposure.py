"""Measuring and calibrating on a GPU; skipped without one."""

import numpy as np
import pytest
import torch

from epskernels import calibrate, exposure, samplers, schedule

from ..exposure.test_exposure import SHAPE, TABLES, images, wavy_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("name", TABLES)
def test_the_numbers_of_the_cpu(name, tmp_path):
    """But for how the devices round the model's functions; and resumed there, the same bits."""
    table, data = TABLES[name], images(22)
    arguments = {"model": wavy_for(table), "table": table.to("cuda"), "batch": 4}
    on_gpu = exposure.measure(images=data, **arguments)
    on_cpu = exposure.measure(wavy_for(table), table, data, batch=4)
    for key in on_cpu.rows:
        np.testing.assert_allclose(on_gpu.rows[key], on_cpu.rows[key], rtol=1e-3, atol=1e-5, err_msg=key)
    exposure.measure(images=data[:12], **arguments, state=tmp_path / "state.npz")
    resumed = exposure.measure(images=data, **arguments, state=tmp_path / "state.npz")
    assert all(np.array_equal(resumed.rows[key], on_gpu.rows[key], equal_nan=True) for key in on_gpu.rows)


def test_lambda_is_that_of_the_cpu():
    def model(x, t):
        return torch.tanh(2 * x)

    def sampler(device):
        return lambda s: samplers.ddim(schedule.cosine(), 6, scaling=s).to(device)

    found = [calibrate.match_norms(model, sampler(device), images(32)) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(found[1].lambda_t, found[0].lambda_t, rtol=1e-4)
    target = torch.zeros(SHAPE)
    learned = [
        calibrate.learn(model, sampler(device), lambda x: (x - target.to(x)).square().mean(), range(4), SHAPE, rounds=5)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(learned[1].losses, learned[0].losses, rtol=1e-3)
