"""The page with the sliders, docs/explore: its data are those of experiments/explore.py, and it needs nothing else."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import epskernels

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import explore  # noqa: E402
from subjects import SUBJECTS, real_digits  # noqa: E402


@pytest.fixture(scope="module")
def data():
    text = (explore.PAGE / "data.js").read_text()
    return json.loads(text.removeprefix("show(").removesuffix(");\n"))


@pytest.fixture(scope="module")
def subject():
    return SUBJECTS["digits"]()


def test_the_data_are_of_the_methods(data):
    assert data["steps"] == list(explore.STEPS)
    assert data["samples"] == [explore.SAMPLES[steps] for steps in explore.STEPS]
    row = 0
    for found, method in zip(data["methods"], explore.METHODS, strict=True):
        asked = {key: value for key, value in dataclasses.asdict(method).items() if key != "make"}
        assert {key: found[key] for key in asked} == asked | {"weights": list(method.weights)}
        assert found["row"] == row and method.nothing in method.weights
        row += len(explore.STEPS) * len(method.weights)
        for steps, cells in zip(explore.STEPS, found["cells"], strict=True):
            assert len(cells) == len(method.weights)
            for cell in cells:
                assert (cell["distance"] is None) == (explore.SAMPLES[steps] < explore.ENOUGH)
                curves = np.array([cell[name] for name in ("noise", "coarse", "noise_se", "coarse_se")])
                assert curves.shape == (4, steps) and np.isfinite(curves).all() and (curves >= 0).all()
    assert data["rows"] == row
    with Image.open(explore.PAGE / data["picture"]) as image:
        assert image.size == (data["shown"] * data["size"], row * data["size"])
        assert len(image.convert("L").getcolors()) == explore.LEVELS


def test_the_page_is_small_and_asks_for_nothing_else(data):
    files = {path.name: path.stat().st_size for path in explore.PAGE.iterdir()}
    assert set(files) == {"index.html", "data.js", data["picture"]} and sum(files.values()) < 600_000
    text = (explore.PAGE / "index.html").read_text()
    assert "//" not in re.sub(r"(?m)(^|  )// .*$", "", text).replace("<!doctype html>", "")  # no address of elsewhere
    assert re.findall(r'(?:src|href)="([^"]+)"', text) == ["data:,", "../../README.md", "../exposure.md", "data.js"]
    asked, there = set(re.findall(r'\$\("([\w-]+)"\)', text)), re.findall(r'\bid="([\w-]+)"', text)
    assert asked <= set(there) and len(there) == len(set(there))
    assert all('role="img"' in tag for tag in re.findall(r"<(?:canvas|svg)[^>]*>", text))


def test_the_digits_come_out_again(data, subject):
    """The strongest setting of each method, in few steps; another processor may round a grey differently."""
    with Image.open(explore.PAGE / data["picture"]) as image:
        pixels = np.array(image.convert("L")).reshape(data["rows"], data["size"], data["shown"], data["size"])
    for found, method in zip(data["methods"], explore.METHODS, strict=True):
        table = subject.samplers[method.sampler](explore.STEPS[0], *method.make(method.weights[-1]))
        digits = subject.to_stored(epskernels.sample(subject.call, table, range(data["shown"]), subject.shape))[:, 0]
        kept = pixels[found["row"] + len(method.weights) - 1].transpose(1, 0, 2).astype(float)
        step = 255 / (explore.LEVELS - 1)
        assert np.abs(kept - digits).mean() < step and np.abs(kept - 255 + digits).mean() > 5 * step


@pytest.mark.parametrize("method", explore.METHODS, ids=lambda method: method.name)
def test_nothing_is_no_correction(method, subject):
    make = subject.samplers[method.sampler]
    assert torch.equal(make(5, *method.make(method.nothing)).rows, make(5, explore.NOTHING).rows)


def test_a_run_goes_on_and_calls_the_network_once_for_samples_and_curves(subject, monkeypatch, tmp_path):
    calls = []

    def call(x, t):
        calls.append(len(x))
        return 0.1 * x

    for name, value in {
        "CACHE": tmp_path,
        "STEPS": (2,),
        "SAMPLES": {2: 20},
        "ENOUGH": 20,
        "BATCH": 10,
        "TRAINING": 4,
    }.items():
        monkeypatch.setattr(explore, name, value)
    monkeypatch.setattr(explore, "METHODS", explore.METHODS[1:3])
    small = dataclasses.replace(subject, call=call, real=lambda: real_digits()[:50])
    found, image = explore.made(explore.Maker(small))
    cells = sum(len(method.weights) for method in explore.METHODS) - 1  # both have one that changes nothing
    assert len(calls) == 2 + cells * 2 * 2  # training; steps and batches of each
    calls.clear()
    path = sorted(tmp_path.glob("cell-*"))[0]
    path.unlink()
    again, image_again = explore.made(explore.Maker(small))
    assert len(calls) == 4 and again == found and image_again.tobytes() == image.tobytes()
    assert image.size == (12 * 28, (cells + 1) * 28) and found["methods"][0]["cells"][0][0]["distance"] > 0
