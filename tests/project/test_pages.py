"""The Python blocks of the README and of pages run as they stand, and the names that the pages give are there."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import epskernels
from epskernels import exposure, samplers, scaling, schedule

from ..support import markdown_examples
from ..support.markdown_examples import ROOT, blocks, environment


def test_examples_run_and_agree():
    example, equivalent = (code for _, _, code in blocks("README.md", "python"))
    names = {}
    exec(example, names)
    assert names["images"].shape == (8, 3, 32, 32) and names["images"].isfinite().all()

    exec(equivalent, names)
    table, f, seeds = names["table"], names["f"], names["seeds"]
    x = torch.randn(8, 3, 32, 32)
    from epskernels.table import COLUMNS

    row = type("Row", (), dict(zip(COLUMNS, table.rows[4].tolist(), strict=True)))
    z = epskernels.normal(seeds, (3, 32, 32), stream=0, draw=4)
    torch.testing.assert_close(names["step"](x, f, row, z), epskernels.step(x, f, table, 4, seeds=seeds))


def test_every_sampler_is_named():
    page = (ROOT / "README.md").read_text()
    assert [name for name in [*samplers.SAMPLERS, "dit"] if f"`{name}`" not in page] == []


def test_what_an_extra_brings_is_not_needed_to_look_around():
    """hasattr and help, where diffusers is not installed."""
    code = """import inspect, pydoc, sys
sys.modules["diffusers"] = None
import epskernels
assert "diffusers" in dir(epskernels) and inspect.getmembers(epskernels.diffusers)
assert "k_diffusion" in dict(inspect.getmembers(epskernels)) and pydoc.render_doc(epskernels)
try:
    epskernels.diffusers.fuse
except ImportError as error:
    assert str(error) == "epskernels.diffusers needs diffusers: pip install 'diffusers>=0.42'", error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_the_names_of_the_pages_are_there_after_the_import_alone():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    pattern = r"(?<!ops\.)(?<!::)\bepskernels((?:\.[A-Za-z]\w*)+)"
    names = {name[1:] for page in pages for name in re.findall(pattern, page.read_text())}
    assert {"diffusers.fuse", "k_diffusion.sample_euler", "exposure", "quality", "build.library"} <= names
    code = f"""
import functools, sys, epskernels
late = {{"calibrate", "exposure", "images", "k_diffusion", "models", "quality"}}
others = {{"diffusers", "matplotlib", "scipy", "epskernels.diffusers.pipelines"}}
read = {{*others, *(f"epskernels.{{name}}" for name in late)}} & set(sys.modules)
assert not read, read
assert late <= set(dir(epskernels)) and {{"step", "__version__"}} <= set(dir(epskernels))
assert not hasattr(epskernels, "no_such_name") and "exposure" not in vars(epskernels)
for name in {sorted(names)}:
    functools.reduce(getattr, name.split("."), epskernels)
for name in late:
    assert getattr(epskernels, name) is sys.modules[f"epskernels.{{name}}"] is vars(epskernels)[name]
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("one_thread")
def test_exposure_page(tmp_path):
    names = markdown_examples.run("docs/exposure.md", tmp_path)
    np.testing.assert_array_equal(exposure.Exposure.load(tmp_path / "exposure.json").norm_gap, names["found"].norm_gap)
    assert scaling.load(tmp_path / "lambda.json")[0].values(3).tolist() == names["matched"].lambda_t.tolist()
    assert (tmp_path / "exposure.png").stat().st_size > 1000 and (tmp_path / "trials.json").exists()


@pytest.mark.deep
@pytest.mark.usefixtures("one_thread")
def test_serving_page(tmp_path):
    names = markdown_examples.run("docs/production_serving.md", tmp_path)
    samples = [*names["samples"], names["late"].result(), names["image"]]
    assert len(samples) >= 13 and all(s.shape == (3, 32, 32) and s.isfinite().all() for s in samples)
    request = lambda x, t: names["model"](x, t, torch.tensor([1]))  # noqa: E731
    assert torch.equal(samples[1], epskernels.sample(request, names["tables"][1], [1], (3, 32, 32))[0])
    assert names["everything"].shape == (42, 1, 28, 28)


@pytest.mark.usefixtures("one_thread")
def test_your_model_page(tmp_path):
    """Each section compares `sample` with a loop of its own. Here: that such a comparison finds a mistake."""
    names = markdown_examples.run("docs/your_model.md", tmp_path)
    assert sorted(path.name for path in (tmp_path / "pngs").iterdir()) == [
        *(f"00000{i}.png" for i in range(4)),
        "run.json",
    ]
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    check, image, latent = names["check"], (3, 16, 16), (4, 8, 8)
    labelled = lambda x, t: names["adm"](x, t, y=names["y"])  # noqa: E731
    own = names["own_p_sample"](names["timesteps"])
    karras = schedule.KarrasSchedule(rho=6)
    mistakes = [
        (
            names["own_ddpm"](names["network"], names["betas"]),
            names["network"],
            samplers.ddpm(schedule.linear(50), 50),
            image,
        ),
        (
            names["own_heun"](names["net"]),
            lambda x, t: names["net"](x, t, names["one_hot"]),
            samplers.edm_heun(karras, 18),
            image,
        ),
        (own, labelled, samplers.ddpm(schedule.linear(), "10"), image),  # fixed_small
        (own, labelled, samplers.ddpm(schedule.linear(), 10, variance="learned_range"), image),  # other timesteps
        (names["own_ldm"](), names["latent_model"], samplers.ddim(schedule.scaled_linear(), 10, guidance=7.5), latent),
        (
            names["own_euler"](),
            names["flow_model"],
            samplers.flow_euler(schedule.FlowSchedule(), 10, guidance=4),
            latent,
        ),
    ]
    for of_own_loop, model, table, shape in mistakes:
        with pytest.raises(AssertionError, match="not wired as your own loop"):
            check(of_own_loop, epskernels.sample(model, table, range(4), shape))
