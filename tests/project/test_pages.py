"""The Python blocks of the README and of pages run as they stand, and the names that the pages give are there."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import epskernels
from epskernels import exposure, k_diffusion, samplers, scaling, schedule
from epskernels.published_settings import SETTINGS

from ..support import markdown_examples
from ..support.markdown_examples import ROOT, blocks, environment


def test_examples_run_and_agree():
    names = {}
    for _, _, code in blocks("README.md", "python"):
        exec(code, names)
    assert names["pipe"].scheduler.eps_scaling == 1.005
    assert names["images"].shape == (8, 3, 32, 32) and names["images"].isfinite().all()

    for _, _, code in blocks("docs/step.md", "python"):
        exec(code, names)
    table, f, seeds = names["table"], names["f"], names["seeds"]
    x = torch.randn(8, 3, 32, 32)
    from epskernels.table import COLUMNS

    row = type("Row", (), dict(zip(COLUMNS, table.rows[4].tolist(), strict=True)))
    z = epskernels.normal(seeds, (3, 32, 32), stream=0, draw=4)
    torch.testing.assert_close(names["step"](x, f, row, z), epskernels.step(x, f, table, 4, seeds=seeds))


def test_the_papers_settings_are_those_of_the_package():
    """docs/choosing_lambda.md: each number of its tables, and no other setting."""
    page = (ROOT / "docs/choosing_lambda.md").read_text()
    (part,) = re.findall(r"^## The paper's settings\n(.*?)(?=^## )", page, re.M | re.S)
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in part.splitlines() if line.startswith("| ")]
    told = {("DDIM", "CelebA", 100, "uniform"): [float(re.findall(r'"CelebA", 100 steps, ([0-9.]+[0-9])', part)[0])]}
    for name, _, *uniform, line in (row for row in rows if row[0].startswith('"')):
        dataset = name.strip('"')
        told |= {("ADM", dataset, n, "uniform"): [float(b)] for n, b in zip((100, 50, 20), uniform, strict=True)}
        told["ADM", dataset, 20, "linear"] = [float(number) for number in line.split(", ")]
    for calls, steps, *numbers in (row for row in rows if row[0].isdigit()):
        assert steps == f"{(int(calls) + 1) // 2}; {calls}"
        columns = [
            (dataset, solver) for dataset in ("CIFAR-10", "CIFAR-10 conditional") for solver in ("heun", "euler")
        ]
        told |= {
            ("EDM", dataset, int(calls), solver): [float(b)]
            for (dataset, solver), b in zip(columns, numbers, strict=True)
        }
    specs = {key: setting.scaling.to_dict() for key, setting in SETTINGS.items()}
    assert told == {key: [spec[name] for name in ("k", "b") if name in spec] for key, spec in specs.items()}


# ---- docs/samplers.md: its lines, run ----


def test_samplers_page(tmp_path):
    assert len(markdown_examples.run("docs/samplers.md", tmp_path)["table"]) == 6


SEEDS, STEPS, SHAPE = [3, 4], 6, (1, 4, 4)


def lines(heading, cells):
    """The cells of each line of the tables below a heading."""
    (part,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", (ROOT / "docs/samplers.md").read_text(), re.M | re.S)
    found = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in part.splitlines() if line.startswith("| `")]
    return [line for line in found if len(line) == cells]


def code(cell):
    return re.findall(r"`([^`]+)`", cell)[0]


def table_of(expression, **names):
    """What the page's expression makes."""
    return eval(
        expression, {**vars(schedule), **samplers.SAMPLERS, "n": STEPS, "s": schedule.KarrasSchedule(), **names}
    )


def latents():
    return epskernels.normal(SEEDS, SHAPE)


def largest_difference(x, expected):
    return float((x - expected).abs().max() / expected.abs().max().clamp(min=1))


def test_every_sampler_is_named():
    page = (ROOT / "docs/samplers.md").read_text()
    assert [name for name in [*samplers.SAMPLERS, "dit"] if f"`{name}`" not in page] == []
    named = {code(line[0]) for line in lines("From a paper", 3)}
    assert named <= {*samplers.SAMPLERS, "dit"} and len(named) > 15


@pytest.mark.parametrize("scheduler, sampler, within", lines("From diffusers", 3), ids=lambda cell: cell[:45])
def test_a_scheduler_is_the_sampler_beside_it(scheduler, sampler, within):
    from epskernels import diffusers
    from epskernels.diffusers.common import SAMPLERS

    def model(x, t):
        return torch.tanh(0.7 * x + 0.3 * torch.cos(t.float() / 300).reshape(-1, 1, 1, 1))

    assert code(sampler).split("(")[0] in SAMPLERS[code(scheduler).split("(")[0]]
    theirs = eval(code(scheduler), {name: getattr(diffusers, name) for name in [code(scheduler).split("(")[0]]})
    flow = {"sigmas": np.linspace(1, 1 / STEPS, STEPS)} if "FlowMatch" in scheduler else {}
    theirs.seeds = SEEDS
    theirs.set_timesteps(STEPS, **flow)
    table = table_of(code(sampler), t=[round(t) for t in theirs.timesteps.tolist()])
    if within == "method":
        return
    x = latents() * getattr(theirs, "init_noise_sigma", 1.0)
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(model(seen, t.expand(len(x))), t, x, return_dict=False)[0]
    start = None if table.initial_sigma else latents()  # towards noise
    ours = epskernels.sample(model, table, SEEDS, SHAPE, start=start)
    assert largest_difference(ours, x) <= float(within)


@pytest.mark.parametrize("name, sampler, note", lines("From k-diffusion and ComfyUI", 3), ids=lambda cell: cell[:30])
def test_a_function_of_k_diffusion_has_the_bits_of_the_sampler_beside_it(name, sampler, note):
    if sampler == "none":
        return
    table = table_of(code(sampler))
    if not same_bits(name):
        return

    def denoiser(x, sigma):
        return torch.tanh(0.7 * x) / (1 + sigma.float().reshape(-1, 1, 1, 1).sqrt())

    sigmas, x = torch.tensor([*schedule.karras_sigmas(STEPS), 0.0]), 80.0 * latents()
    theirs = getattr(k_diffusion, f"sample_{code(name)}")(denoiser, x, sigmas, disable=True, seeds=SEEDS)
    assert torch.equal(epskernels.sample(denoiser, table, SEEDS, SHAPE, start=x), theirs)


def same_bits(name):
    page = (ROOT / "docs/samplers.md").read_text()
    return page.index(f"| {name} |") < page.index("Not the same bits:")


def test_names_of_user_interfaces():
    from epskernels import diffusers

    (part,) = re.findall(
        r"^## By the names of user interfaces\n(.*?)^## ", (ROOT / "docs/diffusers.md").read_text(), re.M | re.S
    )
    named = re.findall(r"`([^`]+)`", part)
    schedulers = [eval(each, {}, {name: getattr(diffusers, name)}) for each in named
                  if (name := each.partition("(")[0]).endswith("Scheduler")]  # fmt: skip
    assert len(schedulers) == 14 and all(getattr(k_diffusion, each) for each in named if each.startswith("sample_"))
    for option in re.findall(r"`(use_\w+)=True`", part):
        assert diffusers.EulerDiscreteScheduler(**{option: True}).config[option]


def test_every_scheduler_and_function_is_on_the_page():
    from epskernels import diffusers

    page = (ROOT / "docs/samplers.md").read_text()
    twins = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    assert len(twins) > 40 and [name for name in twins if name.removesuffix("Scheduler") not in page] == []
    functions = [name.removeprefix("sample_") for name in k_diffusion.__all__ if name.startswith("sample_")]
    assert [name for name in functions if f"`{name}`" not in page and not name.endswith("_cfg_pp")] == []


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
late = {{"calibrate", "exposure", "features", "images", "k_diffusion", "models", "quality"}}
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
    names = markdown_examples.run("docs/exposure_method.md", tmp_path)
    np.testing.assert_array_equal(exposure.Exposure.load(tmp_path / "exposure.json").norm_gap, names["found"].norm_gap)
    assert scaling.load(tmp_path / "lambda.json")[0].values(3).tolist() == names["matched"].lambda_t.tolist()
    assert (tmp_path / "exposure.png").stat().st_size > 1000 and (tmp_path / "trials.json").exists()


@pytest.mark.usefixtures("one_thread")
def test_choosing_page(tmp_path):
    names = markdown_examples.run("docs/choosing_lambda.md", tmp_path)
    saved = names["DDPMPipeline"].from_pretrained(tmp_path / "corrected").scheduler
    kept = {"sampler": "DDPMScheduler", "steps": 3}
    assert saved.correction == names["found"].best.to_dict() | kept and len(names["found"].trials) == 3


def test_every_page_with_examples_is_run_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    run = {page for page in re.findall(r'(?:run|blocks)\("([\w/]+\.md)"', tests)}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"}
    assert {page for page in pages if blocks(page, "python")} == run


@pytest.mark.usefixtures("one_thread")
def test_corrections_page(tmp_path):
    names = markdown_examples.run("docs/corrections.md", tmp_path)
    saved, notes = names["corrections"].load(tmp_path / "correction.json")
    assert saved == names["correction"] and notes == {"sampler": "ddim", "steps": 10}
    assert names["digits"].shape == (8, 1, 28, 28) and names["digits"].isfinite().all()


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
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [f"00000{i}.png" for i in range(4)]
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    image, latent, flow = (3, 16, 16), (4, 8, 8), schedule.FlowSchedule()
    ddpm, adm = names["own_ddpm"](names["network"], names["betas"]), names["own_p_sample"](names["timesteps"])
    of_edm = lambda x, t: names["net"](x, t, names["one_hot"])  # noqa: E731
    of_adm = lambda x, t: names["adm"](x, t, y=names["y"])  # noqa: E731
    for own, model, table, shape in (
        (ddpm, names["network"], samplers.ddpm(schedule.linear(50), 50), image),
        (names["own_heun"](names["net"]), of_edm, samplers.edm_heun(schedule.KarrasSchedule(rho=6), 18), image),
        (adm, of_adm, samplers.ddpm(schedule.linear(), "10"), image),  # fixed_small
        (adm, of_adm, samplers.ddpm(schedule.linear(), 10, variance="learned_range"), image),  # other timesteps
        (names["own_ldm"](), names["latent_model"], samplers.ddim(schedule.scaled_linear(), 10, guidance=7.5), latent),
        (names["own_euler"](), names["flow_model"], samplers.flow_euler(flow, 10, guidance=4), latent),
    ):
        with pytest.raises(AssertionError, match="not wired as your own loop"):
            names["check"](own, epskernels.sample(model, table, range(4), shape))
