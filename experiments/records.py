"""What the experiments found, as JSON: a file holds rows of one model, a row is all that is known of one setting.

    {"about": ..., "torch": ..., "epskernels": ..., "rows": [     about: what the rows have in common
    {"sampler": ..., "steps": ..., "calls": model calls,
     "trials": {shape: {b: Frechet distance}},
     "norms": {name: {"lambda_t": ..., "standard_error": ...}},   of `calibrate.match_norms`
     "exposure": {name: ...},                                     of `exposure.measure`
     "lambda": {name: lambda_t, the noisiest step first, or one number},
     "tables": {samples: {name: {measure: [value, low, high]}}},
     "corrected": {                                               of `comparison`
         "trials": {method: {weights: Frechet distance}},
         "by level": a scaling's spec,
         "chosen": {method: weights}, "tables": as above, "delta": {method: delta_t after each row of the chain}}},
    ...]}

experiments/results has one such file for each model; a run keeps one for each setting in runs/exposure. Numbers have 7
significant digits. lambda_t has all of its own: it is compared exactly when a row is read again.
"""

import json
import math

import numpy as np
import torch

import epskernels
from epskernels.exposure import Exposure
from epskernels.files import write_whole

EXACT = ("lambda", "lambda_t")


def rounded(value):
    """The same lists and dicts with floats of 7 significant digits, except under the keys EXACT; NaN becomes None."""
    if isinstance(value, dict):
        return {key: each if key in EXACT else rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}")
    return value


def write(path, about, rows):
    """Whole or not at all; a line for each row. Raises ValueError for an infinite number."""

    def text(value):
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    head = text({"about": about, "torch": torch.__version__, "epskernels": epskernels.__version__, "rows": []})
    lines = ",\n".join(text(rounded(row)) for row in rows)
    write_whole(path, lambda file: file.write(f"{head.removesuffix(']}')}\n{lines}\n]}}\n".encode()))


def read(path, about):
    """The rows of a file; none if it is about something else."""
    saved = json.loads(path.read_text())
    return saved["rows"] if same(saved["about"], about) else []


def same(about, other):
    """Whether rows can be compared. Distances of noise may differ a little: another processor rounds them differently."""
    noise, noise_other = about["noise"], other["noise"]
    if {**about, "noise": None} != {**other, "noise": None} or noise.keys() != noise_other.keys():
        return False
    return all(np.allclose(noise[key], noise_other[key], rtol=1e-4) for key in noise)


def of_exposure(found):
    """An Exposure as a row holds it."""
    rows = {name: values.tolist() for name, values in found.rows.items()}
    return {"sampler": found.sampler, "images": found.images, "seed": found.seed, "rows": rows}


def to_exposure(saved):
    """The Exposure that a row holds."""
    rows = {name: np.array(values, dtype=np.float64) for name, values in saved["rows"].items()}
    return Exposure(saved["sampler"], saved["images"], saved["seed"], rows)
