"""Types, names and docstrings of what users import: mypy on the package and on the examples of the pages, and on the latter
pyright too, whose engine many editors have."""

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

from epskernels import diffusers

from ..support.markdown_examples import ROOT, as_module

PACKAGE = ROOT / "epskernels"
PAGES = sorted(page.relative_to(ROOT) for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
# What users import: completion shows what `__all__` names.
MODULES = [
    "", "build", "calibrate", "calibrate.gradient", "calibrate.norms", "calibrate.trials", "diffusers.pipelines", "exposure",
    "features", "files", "graphed", "guidance", "images", "models", "ops", "published_settings", "quality", "ranks", "sample",
    "samplers", "scaling", "schedule", "seeds", "shards", "table", "trajectory", "typing",
]  # fmt: skip
# Triton reads annotations as the types of a kernel's arguments.
WITHOUT_ANNOTATIONS = {"ops/triton_kernels.py"}


# What a user's checker knows.
KNOWN = """
from typing import Any, assert_type

import torch

import epskernels
from epskernels import samplers, schedule
from epskernels.diffusers import DDPMScheduler, fuse, fused, share, unfuse

table = samplers.ddim(schedule.linear(), 3)
x = torch.zeros(1, 2)
assert_type(epskernels.step(x, x, table, 0), torch.Tensor)
assert_type(epskernels.step(x, x, table, 0, return_m0=True), tuple[torch.Tensor, torch.Tensor])
assert_type(epskernels.step(x, x, table, 0, return_y=True, y=x), tuple[torch.Tensor, torch.Tensor, torch.Tensor])
assert_type(epskernels.sample(lambda x, t: (x, x), table, range(2), (2,)), torch.Tensor)
assert_type(epskernels.Table({"t": 0.0}).history, int)
assert_type(epskernels.calibrate.fit([1.0], "constant").scaling, epskernels.EpsilonScaling)
epskernels.step(x, x, table, 0, bakend="cpu")  # type: ignore[call-overload]
epskernels.step(x, x, table, 0, backend="gpu")  # type: ignore[call-overload]
epskernels.use_backend("gpu")  # type: ignore[arg-type]

scheduler = DDPMScheduler(num_train_timesteps=100, eps_scaling={"k": 0.0002, "b": 1.004})
assert_type(scheduler, DDPMScheduler)
assert_type(scheduler.lambdas, tuple[float, ...])
assert_type(scheduler.path, str | None)
assert_type(scheduler.seeds, torch.Tensor | None)
scheduler.seeds = range(2)
assert_type(scheduler.fork(), DDPMScheduler)
assert_type(DDPMScheduler.from_config(scheduler.config, eps_scaling=1.005), DDPMScheduler)
assert_type(
    DDPMScheduler.from_config({}, return_unused_kwargs=True), tuple[DDPMScheduler, dict[str, Any]]
)
assert_type(fused(scheduler, 1.005), DDPMScheduler)
assert_type(fused(object()), Any)
scheduler.seeds = 7  # type: ignore[assignment]
scheduler.eps_scaling = None  # type: ignore[assignment]
scheduler.step(x, 0, x, seeds=7)  # type: ignore[arg-type]


class Pipeline:
    scheduler = scheduler


pipe = Pipeline()
assert_type(fuse(pipe, eps_scaling=1.005, seeds=[7, 8]), Pipeline)
assert_type(fuse(scheduler), DDPMScheduler)
assert_type(share(pipe), Pipeline)
assert_type(unfuse(pipe), Pipeline)
assert_type(unfuse(scheduler), Any)
fuse(pipe, eps_scaling=None, seeds=7)  # type: ignore[arg-type]
"""


# What an editor shows where the pointer rests on a name: (the code, what its type has to say).
SHOWN = [
    ("samplers.ddim", "(schedule: DiscreteSchedule | KarrasSchedule | FlowSchedule | Grid, steps: "),
    ("samplers.ddim", "eta: float"),
    ("samplers.ddim", ") -> Table"),
    ("fuse", "(pipe: _Pipeline@fuse, eps_scaling: EpsilonScaling | float | "),
    ("fuse", ") -> _Pipeline@fuse"),
    ("epskernels.step", "Overload[(x: Tensor, f: Tensor, table: Table | Tensor, index: int | "),
    ("epskernels.step(x, x, table, 0, return_m0=True)", "tuple[Tensor, Tensor]"),
    ("epskernels.sample", "seeds: Tensor | Iterable[SupportsIndex], shape: "),
    ("table.rows", "Tensor"),
    ("scheduler.lambdas", "tuple[float, ...]"),
    ("epskernels.published('ADM', 'CIFAR-10', 20)", "EpsilonScaling"),
    ("epskernels.k_diffusion.sample_euler", "sigmas: Tensor | Sequence[float]"),
]


def examples(folder):
    """What users write, as files in the folder: `KNOWN`, and the examples of each page in one."""
    files = [folder / "known.py"]
    files[0].write_text(KNOWN)
    for page in PAGES:
        code = as_module(page)
        if code.strip():
            files.append(folder / f"page_{page.stem}.py")  # a page's functions may do without annotations
            files[-1].write_text(code.rstrip() + "\n\n# mypy: allow-untyped-defs\n")
    assert len(files) >= 8
    return files


def test_mypy_finds_nothing_in_the_package_and_in_the_examples_of_the_pages(tmp_path):
    command = [sys.executable, "-m", "mypy", "epskernels", *map(str, examples(tmp_path))]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "examples")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.deep
def test_pyright_finds_nothing_in_the_examples_and_shows_types(tmp_path):
    pytest.importorskip("pyright")
    files = examples(tmp_path)
    with files[0].open("a") as file:
        file.writelines(f"\nreveal_type({code})" for code, _ in SHOWN)
    settings = {
        "typeCheckingMode": "basic", "extraPaths": [str(ROOT), str(ROOT / "examples")],
        "reportPrivateImportUsage": "none",  # diffusers fills its module as it is read, which pyright does not see
    }  # fmt: skip
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "--project",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(result.stdout)
    assert found["summary"]["filesAnalyzed"] == len(files)
    wrong = [each for each in found["generalDiagnostics"] if each["severity"] != "information"]
    assert not wrong, [(each["file"], each["range"]["start"], each["message"]) for each in wrong]
    shown = [each["message"] for each in found["generalDiagnostics"]]
    assert len(shown) == len(SHOWN)
    assert [(code, said) for (code, part), said in zip(SHOWN, shown, strict=True) if part not in said] == []


@pytest.mark.parametrize("name", MODULES)
def test_the_names_that_a_module_lists_are_there(name):
    module = importlib.import_module(f"epskernels.{name}".rstrip("."))
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    missing = [each for each in module.__all__ if not hasattr(module, each) or each not in dir(module)]
    assert not missing
    # Whatever the module defines for others is among them: each public function and class.
    defined = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert not {key for key in defined if not key.startswith("_")} - set(module.__all__)


TO_COPY = [
    *PAGES,
    *(path.relative_to(ROOT) for folder in ("examples", "integrations") for path in (ROOT / folder).rglob("*.py")),
]


@pytest.mark.parametrize("path", TO_COPY, ids=str)
def test_what_users_copy_imports_public_names_alone(path):
    """Anything else may change at any time, says docs/platforms.md."""
    text = as_module(path) if path.suffix == ".md" else (ROOT / path).read_text()
    private = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "epskernels":
            module = importlib.import_module(node.module)
            modules = [name for _, name, _ in pkgutil.iter_modules(getattr(module, "__path__", []))]
            listed = importlib.import_module("epskernels.diffusers.pipelines" if module is diffusers else node.module)
            public = {*getattr(listed, "__all__", ()), *modules}
            private += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public]
    assert not private


def test_every_fused_scheduler_is_listed():
    from epskernels.diffusers import pipelines

    own = {"FUSED", "SchedulerMixin", "fuse", "fused", "share", "unfuse"}
    assert {twin.__name__ for twin in pipelines.FUSED.values()} == set(pipelines.__all__) - own


def public_definitions(node, prefix=""):
    """(dotted name, node) of a module's public functions and classes, and of the classes' public methods."""
    for each in node.body:
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not each.name.startswith("_"):
            marks = [getattr(mark, "id", getattr(mark, "attr", None)) for mark in each.decorator_list]
            if "overload" not in marks and "setter" not in marks:  # the words of a setter are its property's
                yield prefix + each.name, each
            if isinstance(each, ast.ClassDef):
                yield from public_definitions(each, f"{each.name}.")


PATHS = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PATHS)
def test_public_functions_are_annotated_and_say_what_they_do(path):
    silent, untyped = [], []
    for name, node in public_definitions(ast.parse((PACKAGE / path).read_text())):
        if ast.get_docstring(node) is None:
            silent.append(name)
        if isinstance(node, ast.ClassDef):
            continue
        own = node.args
        arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
        typed = node.returns and all(each.annotation for each in arguments if each.arg not in ("self", "cls"))
        if not typed and path not in WITHOUT_ANNOTATIONS:
            untyped.append(name)
    assert not silent and not untyped
