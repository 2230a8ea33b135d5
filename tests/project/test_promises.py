"""What docs/platforms.md and SECURITY.md promise, and the files about the project: citation, metadata, workflow."""

import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
import yaml

import epskernels
from epskernels import images, samplers, schedule

from ..support.markdown_examples import ROOT, environment

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"


def run(code, **variables):
    """What a script prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment() | variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- the files ----


@pytest.mark.parametrize(
    "file, schema", [("CITATION.cff", "citation-file-format"), (".github/workflows/wheels.yml", "github-workflows")]
)
def test_a_file_fits_its_schema(file, schema):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(ROOT / file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_citation_is_of_this_version_and_of_the_paper():
    assert CITATION["version"] == METADATA["project"]["version"] == epskernels.__version__
    assert CITATION["license"] == METADATA["project"]["license"]
    assert CITATION["authors"] == METADATA["project"]["authors"]
    (paper,) = CITATION["references"]
    readme = (ROOT / "README.md").read_text()
    authors = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"{{{paper['title']}}}" in readme and f"{{{authors}}}" in readme and f"{{{paper['year']}}}" in readme
    assert paper["identifiers"][0]["value"] == "arXiv:2308.15321"


def test_the_workflow_runs_the_tests_and_builds_by_settings_that_keep_the_kernels():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert any(re.match(r"make test\b", command) for command in commands)
    assert any("python -m cibuildwheel" in command for command in commands)
    assert all(job["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"] for job in jobs.values())
    settings = METADATA["tool"]["cibuildwheel"]
    assert settings["build-frontend"]["args"] == ["--no-build-isolation", "--no-deps"]
    assert settings["environment"]["EPSKERNELS_BUILD"] == "1"
    # What a build without isolation would lack has to be installed before it.
    needed = [re.match(r"[\w-]+", each)[0] for each in METADATA["build-system"]["requires"]]
    assert all(name in settings["before-build"] for name in [*needed, "torch"])


def test_every_version_of_python_in_the_metadata_is_told_to_be_tried():
    versions = [each.rsplit(" ", 1)[1] for each in METADATA["project"]["classifiers"] if re.search(r":: 3\.\d+$", each)]
    (row,) = re.findall(r"^\| Python \| (.*?) \|", (ROOT / "docs" / "platforms.md").read_text(), re.M)
    assert row.split(", ") == versions


# ---- the promises ----

FORK = """
import multiprocessing, sys, torch, epskernels
from epskernels import samplers, schedule
torch.set_num_threads(1)
table, x = samplers.ddpm(schedule.linear(), 20), torch.linspace(-1, 1, 3000).reshape(2, 1500)

def sample(_):
    torch.set_num_threads(1)
    return epskernels.step(x, x.flip(1), table, 4, seeds=torch.tensor([5, 6])).numpy().tobytes()

here = sample(0)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(sample, range(2)) == [here, here])
"""
SPAWN = """
import multiprocessing, torch, epskernels
from epskernels import samplers, schedule

def model(x, t):
    return -x

if __name__ == "__main__":
    table = samplers.ddpm(schedule.linear(), 20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the arguments are pickled, the table too
        there = pool.apply(epskernels.sample, (model, table, [5, 6], (1500,)))
    print(torch.equal(there, epskernels.sample(model, table, [5, 6], (1500,))))
"""


def test_a_forked_process_with_one_thread_has_the_same_bits():
    assert run(FORK) == "True\n"


@pytest.mark.deep
def test_a_spawned_process_has_the_same_bits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.stdout == "True\n", result.stderr


def test_it_installs_no_signal_handlers_starts_no_threads_and_prints_nothing():
    code = """
import signal, threading, torch
signals = [each for each in signal.Signals if each not in (signal.SIGKILL, signal.SIGSTOP)]
before = {each: signal.getsignal(each) for each in signals}
import epskernels
from epskernels import calibrate, exposure, k_diffusion, samplers, schedule
epskernels.sample(lambda t, x: -x, samplers.ddpm(schedule.linear(), 5), range(2), (3, 4))
assert {each: signal.getsignal(each) for each in signals} == before
assert threading.enumerate() == [threading.main_thread()]
"""
    assert run(code.replace("lambda t, x", "lambda x, t")) == ""


@pytest.mark.parametrize("given", ["x", "f"])
def test_nan_stays_in_its_element_or_in_its_sample(given):
    table = samplers.ddpm(schedule.linear(), 20)
    tensors = {"x": torch.randn(3, 2, 4, 6), "f": torch.randn(3, 2, 4, 6), "u": torch.randn(3, 2, 4, 6)}
    tensors[given][1, 0, 2, 3] = float("nan")
    (x, f, u), seeds = tensors.values(), torch.arange(3)
    expected = torch.zeros(3, 2, 4, 6, dtype=torch.bool)
    expected[1, 0, 2, 3] = True
    assert torch.equal(epskernels.step(x, f, table, 4, seeds=seeds).isnan(), expected)
    by_band = samplers.ddpm(schedule.linear(), 20, correction=epskernels.corrections.dcw(low=-0.1))
    of_block = torch.zeros_like(expected)
    of_block[1, 0, 2:4, 2:4] = True
    assert torch.equal(epskernels.step(x, f, by_band, 4, seeds=seeds).isnan(), of_block)
    threshold = epskernels.dynamic_threshold(x, f, table, 4)
    assert not threshold[[0, 2]].isnan().any()
    if given == "f":
        guided = samplers.ddim(schedule.linear(), 20, guidance=3.0)
        assert epskernels.guidance_rescale(f, u, guided, 4).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_data_that_holds_python_objects_is_refused_and_runs_nothing(suffix, tmp_path):
    ran, file = tmp_path / "ran", tmp_path / f"data{suffix}"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    saved = np.array([Evil()], dtype=object)
    np.save(file, saved, allow_pickle=True) if suffix == ".npy" else np.savez(file, images=saved)
    with pytest.raises(ValueError, match="data: expected"):
        images.load(file, (1, 28, 28))
    assert not ran.exists()


@pytest.mark.deep
def test_tables_have_the_same_float32_without_numpys_avx512():
    code = """
import hashlib, warnings
import numpy as np
from epskernels import samplers, schedule
warnings.simplefilter("ignore")
digest, count = hashlib.sha256(), 0
for sampler in samplers.SAMPLERS.values():
    for steps in (5, 10, 20, 50, 100, 250):
        for path in (schedule.linear(), schedule.cosine(), schedule.KarrasSchedule(), schedule.FlowSchedule(shift=3.0)):
            try:
                rows = sampler(path, steps, scaling=1.005).rows.numpy()
            except (TypeError, ValueError):  # a sampler that is not for this path
                continue
            digest.update(rows.tobytes())
            count += rows.size
print(digest.hexdigest(), count, hashlib.sha256(np.exp(np.linspace(-9, 9, 100001)).tobytes()).hexdigest())
"""
    *here, exp_here = run(code).split()
    *there, exp_there = run(code, NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR").split()
    assert here == there and int(here[1]) > 500_000
    if exp_here == exp_there:
        pytest.skip("NumPy has no AVX-512 to leave out here")
