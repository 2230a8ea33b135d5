"""experiments/exposure.py with a model that costs nothing: it stops, goes on, and comes to the same results."""

import json
import pathlib
import sys
import threading

import numpy as np
import pytest
import torch

import epskernels
from epskernels import corrections, quality, samplers, schedule

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = str(pathlib.Path(__file__).parents[2] / "experiments")
PATH = schedule.cosine()


class Network:
    """eps as if the data were normal. Calls are counted; after `limit` of them the experiment's time is up."""

    def __init__(self, out_of_time):
        self.calls, self.limit, self.out_of_time = 0, float("inf"), out_of_time

    def __call__(self, x, t):
        self.calls += 1
        if self.calls > self.limit:
            raise self.out_of_time
        return torch.tensor(PATH.sigma).float()[t.long()].reshape(-1, 1, 1) * x


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("comparison", "exposure", "exposure_report", "records", "subjects"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import exposure as module
    from subjects import Made, Subject

    data = np.random.default_rng(0).uniform(-1, 1, (40, 1, 5)).astype(np.float32)
    network, weights = Network(module.OutOfTime), tmp_path / "weights"
    weights.write_bytes(b"1")
    subject = Subject(
        name="nothing", weights=(weights,), shape=(1, 5), schedule=PATH, call=network, real=lambda: data,
        features=lambda samples: np.asarray(samples).reshape(-1, 5),
        to_stored=lambda samples: samples.numpy(), from_stored=np.asarray,
        samplers={"ddim": Made(samplers.ddim, PATH),
                  "dpmpp_2m": Made(samplers.dpmpp_2m, PATH, spacing="trailing")},
        trial=20,
    )  # fmt: skip
    for name, value in {
        "CACHE": tmp_path / "cache", "RESULTS": tmp_path / "results", "CHUNK": 4, "CALIBRATION": 8,
        "ROUNDS": (20,), "STRIDE": 20, "RESAMPLES": 20, "CALLS": (3,), "LIMITS": (0.97, 1.03), "LONG": {},
        "SHAPED": {("ddim", 3)}, "SUBJECTS": {"nothing": lambda: subject}, "QUICK": ("nothing", "ddim", 3, 20),
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    for name, value in {
        "SAMPLES": {"nothing": 20}, "RESAMPLES": 20, "TRIALS": 3, "FITTED_AT": 4, "ORDER": (),
        "SAMPLERS": ("ddim",),
    }.items():  # fmt: skip
        monkeypatch.setattr(module.comparison, name, value)
    module.RESULTS.mkdir()
    module.network, module.subject = network, subject
    return module


@pytest.fixture
def compared(experiment, monkeypatch):
    """The same, which compares the corrections too."""
    monkeypatch.setattr(experiment.comparison, "ORDER", (("nothing", 3),))
    return experiment


def results(experiment):
    """The results' text, with all that was kept."""
    experiment.fold(experiment.subject)
    return experiment.results_path(experiment.subject).read_text()


@pytest.mark.deep
def test_interrupted_experiment_comes_to_the_same_results(compared, tmp_path):
    experiment = compared
    subject = experiment.subject
    experiment.run(10, [subject])
    whole, calls = results(experiment), experiment.network.calls
    rows = json.loads(whole)["rows"]
    assert [(row["sampler"], row["steps"], row["calls"]) for row in rows] == [("ddim", 3, 3), ("dpmpp_2m", 3, 3)]
    assert list(rows[0]["trials"]) == list(experiment.SHAPES) and list(rows[1]["trials"]) == ["uniform"]
    for row in rows:
        for shape, trials in row["trials"].items():
            best = min(trials, key=trials.get)
            for b in (float(best) - 0.005, float(best) + 0.005):  # it is a valley's floor
                assert f"{b:g}" in trials or not experiment.LIMITS[0] <= round(b, 5) <= experiment.LIMITS[1]
            assert np.mean(row["lambda"][shape]) == pytest.approx(float(best), rel=1e-12)
        assert list(row["tables"]) == ["20"] and {"baseline", "uniform", "norm-matched"} <= row["tables"]["20"].keys()
    setting = experiment.Setting(subject, "ddim", 3)
    samples = setting.features(experiment.scaling.constant(1.0), experiment.REPORT_SEED, 20, compute=False)
    assert rows[0]["tables"]["20"]["baseline"]["frechet"][0] == pytest.approx(
        quality.frechet(subject.features(subject.real()), samples), rel=1e-6
    )

    check_corrections(experiment, rows)

    def without(*kinds):
        for kind in kinds:
            for path in [path for path in tmp_path.rglob(kind) if path.is_file()]:
                path.unlink()
        experiment.features_of.cache_clear()
        experiment.network.calls = 0

    without("*.np?", "*.json")
    for limit in (calls // 5, calls // 2, calls):  # each run makes what the one before did not
        experiment.network.limit = experiment.network.calls + limit
        experiment.run(10, [subject])
    assert results(experiment) == whole
    without("*.np?")  # on another machine: the results are all that there is
    experiment.run(10, [subject])
    assert results(experiment) == whole and experiment.network.calls == 0
    other = json.loads(whole)
    other["about"]["noise"]["0.05"] *= 1 + 1e-6  # as another processor's sine and cosine make it
    (experiment.RESULTS / "nothing.json").write_text(json.dumps(other))
    experiment.run(10, [subject])
    assert json.loads(results(experiment)) == other and experiment.network.calls == 0
    (experiment.RESULTS / "nothing.json").write_text(whole.replace('"weights":"', '"weights":"of another'))
    experiment.run(10, [subject])  # whose numbers are no use
    assert results(experiment) == whole and experiment.network.calls > 0


def check_corrections(experiment, rows):
    """The weights chosen are those of the best trial; the table's distances are those of samples made with them."""
    known, base = rows[0]["corrected"], rows[0]["trials"]["uniform"]["1"]
    assert "corrected" not in rows[1]
    one_weight = ["tsr", "dc", "dc, alpha*m0", "dcw low, constant", "dcw low, sigma"]
    assert list(known["chosen"]) == [
        "uniform",
        "by level",
        *one_weight,
        "dcw double",
        "frequency",
        "time shift",
        "pair",
    ]
    shifted = known["trials"]["time shift"]
    assert list(shifted) == ["10", "20", "30", "60"] and len(set(shifted.values())) > 1
    window = known["chosen"]["time shift"]["window"]
    assert min(base, *shifted.values()) == (shifted[str(window)] if window else base)
    for name in one_weight:
        (weight,), trials = known["chosen"][name].values(), known["trials"][name]
        start = 1.0 if name == "tsr" else 0.0
        assert {start + 0.04, start - 0.04} & {float(at) for at in trials} and len(trials) <= 2
        best = min(trials, key=trials.get)
        assert (
            (trials[best], float(best)) == (trials[f"{weight:.7g}"], weight)
            if weight != start
            else base <= trials[best]
        )
    assert known["chosen"]["dcw double"].keys() == {"low", "high", "schedule", "target"}
    found = known["tables"]["20"]
    assert list(found) == ["baseline", *known["chosen"]] and set(found) - set(known["delta"]) <= {"time shift"}
    assert found["baseline"]["frechet"] == rows[0]["tables"]["20"]["baseline"]["frechet"]
    assert found["uniform"]["frechet"] == rows[0]["tables"]["20"]["uniform"]["frechet"]
    setting = experiment.Setting(experiment.subject, "ddim", 3)
    weight = known["chosen"]["dc, alpha*m0"]["s"]
    table = samplers.ddim(PATH, 3, correction=corrections.dc(weight, target="alpha*m0"))
    samples = epskernels.sample(experiment.network, table, range(20), (1, 5))
    real = setting.subject.features(setting.subject.real())
    distance = quality.frechet(real, setting.subject.features(samples))
    assert found["dc, alpha*m0"]["frechet"][0] == pytest.approx(distance, rel=1e-5)
    change = found["dc, alpha*m0"]["frechet_difference"][0]
    assert change == pytest.approx(distance - found["baseline"]["frechet"][0], rel=1e-3, abs=1e-6)


def test_exposure_bias_is_measured_again_for_another_lambda(experiment):
    setting, constant = experiment.Setting(experiment.subject, "ddim", 3), experiment.scaling.constant
    first = setting.measured("uniform", constant(1.02))
    calls = experiment.network.calls
    assert setting.measured("uniform", constant(1.02)).rows.keys() == first.rows.keys()
    assert experiment.network.calls == calls
    assert setting.measured("uniform", constant(1.01)).lambda_t.tolist() == [1.01] * 3
    assert experiment.network.calls == 2 * calls


def test_numbers_have_seven_digits_and_lambda_all(experiment):
    experiment.run(10, [experiment.subject])
    lines = results(experiment).splitlines()
    assert len(lines) == 2 + 2 and lines[0].endswith('"rows":[') and lines[-1] == "]}"  # a line for each setting
    row = json.loads(results(experiment))["rows"][0]
    lambda_t = row["lambda"]["norm-matched"]
    assert lambda_t == row["norms"]["norm-matched"]["lambda_t"] == row["exposure"]["norm-matched"]["rows"]["lambda_t"]
    assert float(f"{lambda_t[1]:.7g}") != lambda_t[1]

    def floats(value):
        if isinstance(value, dict):
            assert not {"lambda", "lambda_t"} & value.keys()
            value = list(value.values())
        if isinstance(value, list):
            return [each for one in value for each in floats(one)]
        return [value] if isinstance(value, float) else []

    del row["lambda"]
    for each in [*row["norms"].values(), *(each["rows"] for each in row["exposure"].values())]:
        del each["lambda_t"]
    numbers = floats(row)
    assert len(numbers) > 200 and all(float(f"{value:.7g}") == value for value in numbers)
    single = row["exposure"]["baseline"]["rows"]["std_single"]
    assert any(float(f"{value:.6g}") != value for value in single)


def test_exposure_comes_back(experiment):
    first = experiment.exposure.measure(
        experiment.network, experiment.Setting(experiment.subject, "dpmpp_2m", 3).sampler(1.0),
        torch.from_numpy(experiment.subject.real()[:8]),
    )  # fmt: skip
    saved = json.loads(json.dumps(experiment.records.rounded(experiment.records.of_exposure(first)), allow_nan=False))
    again = experiment.records.to_exposure(saved)
    assert (again.sampler, again.images, again.seed) == (first.sampler, first.images, first.seed)
    assert np.isnan(first.variance_closed).any()
    for name, values in first.rows.items():
        np.testing.assert_allclose(again.rows[name], values, rtol=5e-7, err_msg=name)


def test_what_runs_kept_goes_into_the_results_whole_or_not_at_all(experiment, monkeypatch):
    subject, path = experiment.subject, experiment.results_path(experiment.subject)
    experiment.run(10, [subject])
    assert not path.exists()  # a run writes nothing that is tracked
    kept = experiment.kept_paths(subject)
    assert [each.parent.name for each in kept] == ["ddim-3", "dpmpp_2m-3"]
    whole = results(experiment)
    assert not experiment.kept_paths(subject)
    setting = experiment.Setting(subject, "ddim", 3)
    setting.keep(tables={})  # as if a run had come to something else since
    before = kept[0].read_text()
    assert experiment.known_rows(subject)["ddim", 3]["tables"] == {}

    def fails(path, about, rows):
        write(path, about, [*rows, {"trials": float("inf")}])

    write = experiment.records.write
    with monkeypatch.context() as patch:
        patch.setattr(experiment.records, "write", fails)
        with pytest.raises(ValueError, match="not JSON compliant"):
            experiment.fold(subject)
    assert path.read_text() == whole and kept[0].read_text() == before
    folded = json.loads(results(experiment))["rows"]
    assert folded[0]["tables"] == {} and folded[1] == json.loads(whole)["rows"][1]
    before = path.read_text()
    setting.keep(tables={"20": {}})
    other = kept[0].read_text().replace('"weights":"', '"weights":"of another')
    kept[0].write_text(other)
    assert results(experiment) == before and kept[0].read_text() == other  # stays for those weights


def test_runs_share_the_work(experiment):
    threads = [threading.Thread(target=experiment.run, args=(10, [experiment.subject])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls, shared = experiment.network.calls, results(experiment)
    experiment.run(10, [experiment.subject])
    assert results(experiment) == shared and experiment.network.calls == calls
    assert [list(row["tables"]) for row in json.loads(shared)["rows"]] == [["20"], ["20"]]


def test_quick_row_and_report(compared, tmp_path, capsys):
    experiment = compared
    experiment.run(10, [experiment.subject])
    assert experiment.quick() == 0
    assert "lambda 1, frechet" in capsys.readouterr().out
    results(experiment)
    path = experiment.RESULTS / "nothing.json"
    saved, other = (json.loads(path.read_text()) for _ in range(2))
    found = other["rows"][0]["tables"]["20"]["uniform"]
    found["frechet_difference"] = [value + 1 for value in found["frechet_difference"]]
    path.write_text(json.dumps(other))
    assert experiment.quick() == 1 and capsys.readouterr().out.count("NOT inside") == 1
    from exposure_report import BEGIN, END, report

    pages = [tmp_path / "docs" / "exposure_tables.md", tmp_path / "docs" / "exposure.md"]
    pages[0].parent.mkdir()
    for page in pages:
        page.write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    report({"nothing": saved}, tmp_path)
    baseline = saved["rows"][0]["tables"]["20"]["baseline"]["frechet"][0]
    corrected = saved["rows"][0]["corrected"]
    change = corrected["tables"]["20"]["dc, alpha*m0"]["frechet_difference"][0]
    said = f"{change:+.3f}" if change else "as baseline"
    line = next(line for line in pages[0].read_text().splitlines() if line.startswith("| ddim, 3 | 20 |"))
    assert said in line and f"s {corrected['chosen']['dc, alpha*m0']['s']:.4g}" in line or not change
    assert "Not measured yet" not in pages[0].read_text()
    for page, start in zip(pages, (f"| ddim, 3 | 20 | {baseline:.3f} [", f"| ddim | {baseline:.3f} ["), strict=True):
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text and start in text
    shares = next(line for line in pages[1].read_text().splitlines() if line.startswith("| `nothing` | ddim, 3 |"))
    found = corrected["tables"]["20"]
    least = min(found[name]["frechet"][0] for name in ("dc", "dc, alpha*m0"))
    assert shares.split(" | ")[4].strip("*") == f"{100 * (1 - least / found['baseline']['frechet'][0]):.0f} %"
    assert (tmp_path / "docs" / "exposure" / "nothing.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "difference, said",
    [([-1, -8, -0.5], "-20 % at T' = 10"), ([-1, -8, 0.5], "unclear at T' = 10"), ([0, 0, 0], "none at T' = 10")],
)
@pytest.mark.parametrize("worst", [5.5, 900.0])
def test_plots_say_what_is_clear_and_leave_nothing_out(worst, difference, said, monkeypatch):
    """An interval below 0 and a trial far above the baseline are inside the frame."""
    monkeypatch.syspath_prepend(FOLDER)
    import exposure_report
    from matplotlib.figure import Figure

    table = {"baseline": {"frechet": [5, 4, 6]}, "uniform": {"frechet": [4, 3, 5], "frechet_difference": difference}}
    row = {"sampler": "ddim", "steps": 10, "calls": 10, "lambda": {"uniform": 0.99}, "tables": {"20": table},
           "trials": {"uniform": {"1": 5.0, "1.01": worst, "0.99": 4.0}}, "corrected": {"tables": {"20": table}}}  # fmt: skip
    axes = Figure().subplots(1, 2)
    exposure_report.draw_distance([row], axes[0])
    exposure_report.draw_corrections([row], axes[1])
    for axis, lows, highs in zip(axes, (0.8, 1), (worst / 5, 1), strict=True):
        bottom, top = axis.get_ylim()
        assert bottom <= min(lows, 1 + difference[1] / 5) and top >= highs
        assert said in axis.get_title() or f"uniform, distance {said}" in axis.get_title()
    figure = Figure()
    exposure_report.draw("ddim", [row], {}, figure.subfigures())
