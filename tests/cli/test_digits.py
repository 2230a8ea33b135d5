"""The bundled model: what it samples are digits, to a linear classifier of the 5,000 real ones."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import epskernels
from epskernels import images, models, samplers


@pytest.fixture(scope="module")
def classifier():
    digits = images.load("mnist", (1, 28, 28)).astype(np.float64)
    return LogisticRegression(C=0.05, max_iter=200).fit(digits.reshape(5000, 784), np.arange(5000) // 500)


@pytest.mark.parametrize("steps, count", [(20, 64), pytest.param(50, 256, marks=pytest.mark.deep)])
def test_samples_are_digits_of_all_classes(classifier, steps, count):
    model = models.load()
    table = samplers.ddpm(model.schedule, steps, scaling=1.005, variance="learned_range", clip=model.clip)
    batches = [range(first, first + 64) for first in range(0, count, 64)]
    samples = torch.cat([epskernels.sample(model.callable(), table, seeds, model.shape) for seeds in batches])
    assert samples.abs().max() <= 1
    probabilities = classifier.predict_proba(samples.reshape(count, -1).double().numpy())
    confident = (probabilities.max(axis=1) > 0.5).mean()
    counts = np.bincount(probabilities.argmax(axis=1), minlength=10)
    print(f"{confident:.3f} of {count} with a top probability over 0.5; digits 0 to 9: {counts.tolist()}")
    assert confident >= 0.9
    assert (counts > 0).all(), counts
