"""The examples of docs/production_serving.md run as they stand."""

import pytest
import torch

import epskernels

from ..support import markdown_examples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.deep
def test_serving_page(tmp_path):
    names = markdown_examples.run("docs/production_serving.md", tmp_path)
    samples = [*names["samples"], names["late"].result(), names["image"]]
    assert len(samples) >= 13 and all(s.shape == (3, 32, 32) and s.isfinite().all() for s in samples)
    request = lambda x, t: names["model"](x, t, torch.tensor([1]))  # noqa: E731
    assert torch.equal(samples[1], epskernels.sample(request, names["tables"][1], [1], (3, 32, 32))[0])
    assert names["everything"].shape == (42, 1, 28, 28)
