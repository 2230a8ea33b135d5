"""Makes the data of docs/explore, a page that shows digits sampled with corrections of many strengths from the same seeds.

    python experiments/explore.py      # goes on where it stopped: each cell lies in runs/explore

A cell is a method, a strength and a number of steps. Of each: the first SHOWN digits; the Frechet distance of all its samples,
where these are enough to tell; and how far the chain of these samples is from what the network was trained on, by
`exposure.measure`. All of it takes half an hour of one core. The page reads data.js and digits.png: a row of digits for each
cell, in the order of data.js.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from subjects import SUBJECTS
from tqdm.auto import tqdm

import epskernels
from epskernels import corrections, exposure, quality, scaling
from epskernels.files import write_whole

ROOT = pathlib.Path(__file__).parents[1]
CACHE, PAGE = ROOT / "runs" / "explore", ROOT / "docs" / "explore"
STEPS = (5, 10, 20, 50)
SAMPLES = {5: 200, 10: 200, 20: 200, 50: 32}  # seeds from 0 on
ENOUGH = 200  # samples for a distance
SHOWN = 12
BATCH = 100
TRAINING = 128  # real digits, for the norms of training
LEVELS = 16  # of grey in the pictures
NOTHING = scaling.constant(1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to correct a sampler of `subjects`, at several strengths: the page's first choice.

    name: in the page's address. title, symbol, says: for the page. sampler: of the subject. weights: the strengths, among them
    `nothing`, which changes nothing. make: weight -> (scaling, correction).
    """

    name: str
    title: str
    symbol: str
    says: str
    sampler: str
    nothing: float
    weights: tuple[float, ...]
    make: Callable


METHODS = (
    Method(
        "lambda-unscaled", "Epsilon Scaling, DDIM as in LDM", "lambda",
        "The predicted noise is divided by lambda before the image is estimated from it. Below 1 more noise is taken away than "
        "the network says. The direction of the step stays the network's own.",
        "ddim-unscaled", 1.0, (0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05),
        lambda weight: (scaling.constant(weight), None),
    ),
    Method(
        "lambda", "Epsilon Scaling, DDIM as in ADM", "lambda",
        "The predicted noise is divided by lambda before the image is estimated from it. The direction of the step is derived "
        "again from the clamped estimate, so that the same lambda does something else than in the other form.",
        "ddim", 1.0, (0.94, 0.955, 0.97, 0.985, 1.0, 1.015, 1.03),
        lambda weight: (scaling.constant(weight), None),
    ),
    Method(
        "dcw", "DCW", "weight",
        "DCW is differential correction by wavelets. After every step this share of the difference between state and estimated "
        "image is added to the coarse part of the state. Below 0 the coarse part moves towards the estimate.",
        "ddim", 0.0, (0.0, -0.05, -0.1, -0.15, -0.2, -0.25, -0.3, -0.35, -0.4),
        lambda weight: (NOTHING, corrections.dcw(weight, schedule="constant", target="alpha*m0") if weight else None),
    ),
    Method(
        "frequency", "Frequency regulation", "factor",
        "After every step the coarse part of the state is multiplied by this factor. It is compared with nothing.",
        "ddim", 1.0, (0.98, 1.0, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08),
        lambda weight: (NOTHING, corrections.frequency(weight) if weight != 1 else None),
    ),
)  # fmt: skip


class Remembered:
    """A network that answers an input that it has seen from memory: a chain that is sampled and then measured is run once."""

    def __init__(self, call):
        self.call, self.seen = call, {}

    def __call__(self, x, t):
        key = hashlib.sha256(x.numpy().tobytes()).digest(), t.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.call(x, t)
        return self.seen[key]


def kept(path, make):
    """The arrays of a file; made and written at first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = make()
        write_whole(path, lambda file: np.savez(file, **arrays))
    with np.load(path) as file:
        return dict(file)


class Maker:
    """Makes the cells of one subject, each once."""

    def __init__(self, subject):
        self.subject = subject
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.weights]
        self.key = hashlib.sha256("".join(digests).encode()).hexdigest()[:8]
        self.real_features = subject.features(subject.real())

    def _path(self, kind, table, count):
        return CACHE / f"{kind}-{self.key}-{hashlib.sha256(table.rows.numpy().tobytes()).hexdigest()[:12]}-{count}.npz"

    def training(self, steps):
        """The rows of an Exposure: norms in training. They depend on the noise levels alone, which all methods share."""
        table = self.subject.samplers[METHODS[0].sampler](steps, NOTHING)
        images = torch.from_numpy(self.subject.real()[:TRAINING])
        measure = lambda: exposure.measure(self.subject.call, table, images, parts=("training",)).rows  # noqa: E731
        return kept(self._path("training", table, TRAINING), measure)

    def cell(self, method, weight, steps):
        """(digits uint8 (SHOWN, 28, 28), what data.js has of it)."""
        table, count = self.subject.samplers[method.sampler](steps, *method.make(weight)), SAMPLES[steps]
        found = kept(self._path("cell", table, count), lambda: self._sampled(table, count))
        digits, distance = found.pop("digits"), float(found.pop("distance"))
        # Sampling's norms beside those of training.
        rows = self.training(steps) | {name: values for name, values in found.items() if name.partition("_samples")[1]}
        both = exposure.Exposure(method.sampler, count, 0, rows)
        curves = {
            name: [round(float(value), 4) for value in getattr(both, gap)]
            for name, gap in (("noise", "norm_gap"), ("noise_se", "norm_gap_se"),
                              ("coarse", "state_gap_low"), ("coarse_se", "state_gap_low_se"))
        }  # fmt: skip
        return digits, {"distance": round(distance, 2) if count >= ENOUGH else None, **curves}

    def _sampled(self, table, count):
        call, subject = Remembered(self.subject.call), self.subject
        parts = [range(count)[start : start + BATCH] for start in range(0, count, BATCH)]
        samples = torch.cat([epskernels.sample(call, table, seeds, subject.shape) for seeds in parts])
        real = torch.from_numpy(subject.real()[:count])
        found = exposure.measure(call, table, real, batch=BATCH, parts=("samples",))
        stored = subject.to_stored(samples)
        distance = quality.frechet(self.real_features, subject.features(subject.from_stored(stored)))
        return {"digits": stored[:SHOWN, 0], "distance": np.float64(distance), **found.rows}


def picture(rows):
    """An image of rows of digits, uint8 (rows, SHOWN, 28, 28), in LEVELS greys."""
    count, shown, height, width = rows.shape
    pixels = rows.transpose(0, 2, 1, 3).reshape(count * height, shown * width)
    image = Image.fromarray(np.round(pixels / 255 * (LEVELS - 1)).astype(np.uint8), "P")
    image.putpalette([grey for level in range(LEVELS) for grey in (round(level * 255 / (LEVELS - 1)),) * 3])
    return image


def made(maker, progress=lambda: None):
    """(what data.js holds, digits.png)."""
    methods, rows = [], []
    for method in METHODS:
        said = {
            key: getattr(method, key) for key in ("name", "title", "symbol", "says", "sampler", "nothing", "weights")
        }
        methods.append({**said, "row": len(rows), "cells": [[] for _ in STEPS]})
        for cells, steps in zip(methods[-1]["cells"], STEPS, strict=True):
            for weight in method.weights:
                digits, known = maker.cell(method, weight, steps)
                rows.append(digits)
                cells.append(known)
                progress()
    samples = [SAMPLES[steps] for steps in STEPS]
    about = {"steps": STEPS, "samples": samples, "training": TRAINING, "real": len(maker.real_features)}
    sizes = {"picture": "digits.png", "shown": SHOWN, "size": maker.subject.shape[-1], "rows": len(rows)}
    return {**about, **sizes, "methods": methods}, picture(np.stack(rows))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_grad_enabled(False)
    with tqdm(total=len(STEPS) * sum(len(method.weights) for method in METHODS), unit="cell") as progress:
        data, image = made(Maker(SUBJECTS["digits"]()), progress.update)
    PAGE.mkdir(parents=True, exist_ok=True)
    # A script, not JSON alone: a browser that shows the page from a disk refuses to fetch.
    text = f"show({json.dumps(data, separators=(',', ':'), allow_nan=False)});\n"
    write_whole(PAGE / "data.js", lambda file: file.write(text.encode()))
    write_whole(PAGE / data["picture"], lambda file: image.save(file, "png", bits=4, optimize=True))
    print(f"wrote data.js and {data['picture']} to {PAGE}")


if __name__ == "__main__":
    main()
