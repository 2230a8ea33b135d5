"""experiments/exposure.py with a network that costs nothing: it stops, goes on, and comes to the same results."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

from epskernels import quality, schedule

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = str(pathlib.Path(__file__).parents[1] / "experiments")


def prediction(x, t):
    """eps as if the data were normal, and the variance's middle."""
    sigma = torch.tensor(schedule.cosine().sigma).float()[t.long()].reshape(-1, 1, 1, 1)
    return (torch.cat([sigma * x, torch.zeros_like(x)], 1),)


class Network:
    """Calls are counted; after `limit` of them the experiment's time is up."""

    def __init__(self, out_of_time):
        self.calls, self.limit, self.out_of_time = 0, float("inf"), out_of_time

    def __call__(self, x, t, return_dict):
        self.calls += 1
        if self.calls > self.limit:
            raise self.out_of_time
        return prediction(x, t)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "exposure", raising=False)
    import exposure as module

    digits = np.random.default_rng(0).uniform(-1, 1, (40, 1, 28, 28)).astype(np.float32)
    network = Network(module.OutOfTime)
    model = types.SimpleNamespace(network=network, schedule=schedule.cosine(), shape=(1, 28, 28))
    for name, value in {
        "CACHE": tmp_path / "cache", "RESULTS": tmp_path / "results", "DOCS": tmp_path, "CHUNK": 4, "CALIBRATION": 8,
        "SELECT": 8, "ROUNDS": (8,), "STRIDE": 8, "RESAMPLES": 20,
        "SETTINGS": [("ddim", 3), ("dpmpp_2m", 3)], "QUICK": ("ddim", 3, 8),
        "noise_floor": lambda: {"0": 1.0},
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    module.RESULTS.mkdir()
    monkeypatch.setattr(module.models, "load", lambda: model)
    monkeypatch.setattr(module.images, "load", lambda source, shape, count=None: digits[:count])
    module.network = network
    return module


def test_interrupted_experiment_comes_to_the_same_results(experiment, tmp_path):
    experiment.run(10)
    whole, calls = (experiment.RESULTS / "exposure.json").read_text(), experiment.network.calls
    rows = json.loads(whole)["rows"]
    assert [(row["sampler"], row["steps"], row["calls"]) for row in rows] == [("ddim", 3, 3), ("dpmpp_2m", 3, 3)]
    for row in rows:
        best = min(row["sweep"], key=row["sweep"].get)
        assert row["lambda"]["uniform"] == float(best) and len(row["lambda"]["norm-matched"]) == row["steps"]
        assert {f"{b:g}" for b in experiment.GRID} <= row["sweep"].keys()
        assert list(row["tables"]) == ["8"] and {"baseline", "uniform", "norm-matched"} <= row["tables"]["8"].keys()
    real = quality.digit_features(experiment.images.load("mnist", (1, 28, 28)))
    setting = experiment.Setting("ddim", 3, experiment.models.load())
    samples = setting.features(experiment.scaling.constant(1.0), experiment.REPORT_SEED, 8, compute=False)
    assert rows[0]["tables"]["8"]["baseline"]["frechet"][0] == pytest.approx(quality.frechet(real, samples), rel=1e-12)

    for path in [*experiment.CACHE.rglob("*.np?"), *experiment.RESULTS.iterdir()]:
        path.unlink()
    experiment.network.calls = 0
    for limit in (calls // 5, calls // 2, calls):  # each run makes what the one before did not
        experiment.network.limit = experiment.network.calls + limit
        experiment.run(10)
    assert (experiment.RESULTS / "exposure.json").read_text() == whole
    experiment.network.calls = 0
    experiment.run(10)
    assert experiment.network.calls == 0


def test_quick_row_and_report(experiment, tmp_path, capsys):
    experiment.run(10)
    assert experiment.quick() == 0
    assert "lambda 1, frechet" in capsys.readouterr().out
    path = experiment.RESULTS / "exposure.json"
    saved = json.loads(path.read_text())
    other = json.loads(path.read_text())
    table = other["rows"][0]["tables"]["8"]["uniform"]
    table["frechet_difference"] = [value + 1 for value in table["frechet_difference"]]
    path.write_text(json.dumps(other))
    assert experiment.quick() == 1 and capsys.readouterr().out.count("NOT inside") == 1
    from exposure_report import BEGIN, END, report

    (tmp_path / "exposure.md").write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    report(saved, experiment.RESULTS, tmp_path)
    page = (tmp_path / "exposure.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "\nold\n" not in page
    value = saved["rows"][0]["tables"]["8"]["baseline"]["frechet"][0]
    assert f"| ddim, 3 | 8 | {value:.2f} [" in page and (tmp_path / "exposure" / "ddim-3.svg").exists()
