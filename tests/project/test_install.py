"""The sdist, and wheels, compiled and not: installed in an environment of their own, away from the source tree."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv

import pytest
import torch

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ROOT = pathlib.Path(__file__).parents[2]
USE = (
    "import sys, warnings, torch, epskernels\n"
    "from epskernels import build, models, quality, samplers, schedule\n"
    "assert 'site-packages' in epskernels.__file__, epskernels.__file__\n"
    "table = samplers.ddpm(schedule.linear(), 20)\n"
    "x = torch.ones(2, 3)\n"
    "y = epskernels.step(x, x, table, 3, seeds=torch.arange(2))\n"
    "with epskernels.use_backend('reference'):\n"
    "    assert torch.equal(y, epskernels.step(x, x, table, 3, seeds=torch.arange(2)))\n"
    "assert models.DIGITS.with_name('py.typed').exists() and len(quality.real_digits().mean) == 64\n"
    "assert (models.DIGITS / 'unet' / 'diffusion_pytorch_model.safetensors').exists()\n"
    "if not build.why_missing():\n"
    "    torch.ops.load_library(build.library())\n"
    "    assert (build.cmake_dir() / 'epskernels-config.cmake').exists()\n"
    "print('why', build.why_missing())\n"
    "print('cuda', build.why_missing('cuda'))\n"
)


def make_wheel(folder, root=ROOT, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(root)]
    tools = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, env={**os.environ, "PATH": tools, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment that finds torch where this one has it, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder, site


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """As a build frontend makes it; of a copy: other tests write into the checkout while setuptools looks through it."""
    folder = tmp_path_factory.mktemp("sdist")
    without = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info", "*.so", "*built*.txt")
    copy = shutil.copytree(ROOT, folder / "sources", ignore=without)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=copy, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


def install_and_use(environment, wheel, tmp_path):
    folder, site = environment
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return use(environment, USE, tmp_path)


def use(environment, code, folder):
    python = [str(environment[0] / "bin" / "python"), "-c", code]
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may lead to the checkout
    return subprocess.run(python, cwd=folder, env=without, capture_output=True, text=True)


@pytest.mark.deep
@pytest.mark.parametrize("cuda", ["auto", "0"])
def test_wheel_works_away_from_the_source_tree(environment, tmp_path, cuda):
    made = make_wheel(tmp_path, EPSKERNELS_BUILD="1", EPSKERNELS_CUDA=cuda)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"epskernels-0.1.0-{python}-{python}-linux_"), wheel.name
    result = install_and_use(environment, wheel, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "why None" in result.stdout and "FallbackWarning" not in result.stderr
    library = (environment[1] / "epskernels" / "libepskernels_cuda.so").exists()
    if cuda == "0":
        assert "cuda the CUDA kernel is missing (EPSKERNELS_CUDA=0 was set when it was installed)" in result.stdout
        assert not library
    elif torch.version.cuda is None and NVCC:  # it would take minutes, and be of no use
        why = f"torch {torch.__version__} has no CUDA to run it; EPSKERNELS_CUDA=1 compiles it all the same"
        assert (
            f"cuda the CUDA kernel is missing ({why}); install nvcc and a torch>=2.11 with CUDA, then" in result.stdout
        )
        assert not library
    else:
        assert library == bool(NVCC)


def tool(name):
    """A program of this environment, or of the machine."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    return found or pytest.skip(f"{name} is not installed; make wheel-check installs it")


@pytest.mark.deep
@pytest.mark.parametrize("cuda", ["0", "1"])
def test_a_wheel_asks_for_no_library_but_torch_s_and_the_system_s(environment, tmp_path, cuda):
    """auditwheel finds nothing to bring along but what torch loads; torch-abi-audit no symbol outside of torch's stable ABI.
    The wheel that auditwheel writes has a tag of manylinux, and works."""
    auditwheel, audit, _ = tool("auditwheel"), tool("torch-abi-audit"), tool("patchelf")
    if cuda == "1" and not NVCC:
        pytest.skip("nvcc is not on this machine: the CUDA library is not compiled here")
    made = make_wheel(tmp_path, EPSKERNELS_BUILD="1", EPSKERNELS_CUDA=cuda)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    of_torch = [f"lib{name}.so" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda", "torch_python")]
    excluded = [word for name in of_torch for word in ("--exclude", name)]
    command = [auditwheel, "repair", "--plat", "auto", *excluded, "-w", str(tmp_path / "repaired"), str(wheel)]
    path = os.pathsep.join([os.path.dirname(tool("patchelf")), os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_x86_64", repaired.name), repaired.name
    result = install_and_use(environment, repaired, tmp_path)
    assert result.returncode == 0 and "why None" in result.stdout, result.stderr

    shutil.unpack_archive(repaired, tmp_path / "files", "zip")
    assert not [*(tmp_path / "files").glob("*.libs")], "auditwheel brought a library along"
    libraries = [*(tmp_path / "files" / "epskernels").glob("libepskernels*.so")]
    assert len(libraries) == (3 if cuda == "1" else 2)
    for library in libraries:
        told = subprocess.run([audit, "--check", "torch", "-v", library], capture_output=True, text=True)
        assert told.returncode == 0 and "Torch ABI:   STABLE" in told.stdout, told.stdout + told.stderr


def test_the_sdist_has_what_builds_the_package_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in files if name.startswith("epskernels.egg-info/"))}
    top = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    compiled = (".so", "built.txt", "built_cuda.txt")
    below = [path.relative_to(ROOT) for part in ("csrc", "epskernels") for path in (ROOT / part).rglob("*.*")]
    below = {str(path) for path in below if "__pycache__" not in path.parts and not path.name.endswith(compiled)}
    assert len(below) > 50 and files - made == top | below


def test_without_the_build_it_runs_on_the_reference_and_says_so_once(environment, sdist, tmp_path):
    made = make_wheel(tmp_path, sdist, EPSKERNELS_BUILD="0")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "epskernels-0.1.0-py3-none-any.whl"  # for any machine, and never taken for one with kernels
    result = install_and_use(environment, wheel, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "EPSKERNELS_BUILD=0 was set when it was installed" in result.stdout
    assert result.stderr.count("FallbackWarning: epskernels runs its pure PyTorch reference") == 1
    assert "pip install --force-reinstall --no-deps PATH_OF_THE_CHECKOUT\n" in result.stderr
    checked = use(environment, "from epskernels.cli import main; exit(main(['info', '--require', 'cpu']))", tmp_path)
    assert checked.returncode == 1 and checked.stderr.startswith(
        "epskernels info: epskernels: cpu: the compiled kernels"
    )

    shutil.unpack_archive(sdist, tmp_path)
    (sources,) = tmp_path.glob("epskernels-*/")
    result = use(
        environment, "from epskernels import build as b; print(b.why_missing(), b.why_missing('cuda'))", sources
    )
    why = f"(this is the source tree {sources}, not built for this Python, and it hides the package installed in "
    why += f"{environment[1] / 'epskernels'}); run outside of the source tree, or build it there: `make build` or"
    assert result.stdout.count(why) == 2, result.stdout + result.stderr
    shutil.rmtree(environment[1] / "epskernels")
    result = use(environment, "from epskernels import build; print(build.why_missing())", sources)
    assert "(this is the source tree" in result.stdout and "); build it there: `make build`" in result.stdout


@pytest.mark.parametrize(
    "switch, wanted, expected",
    [
        ("EPSKERNELS_BUILD", "1", "EPSKERNELS_BUILD=1, but the build lacked a C++ compiler"),
        ("EPSKERNELS_BUILD", "yes", "EPSKERNELS_BUILD: expected auto, 0 or 1, got 'yes'"),
        ("EPSKERNELS_CUDA", "yes", "EPSKERNELS_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_switches_of_the_build(switch, wanted, expected, tmp_path):
    """1 makes a missing tool an error; other values are refused."""
    made = make_wheel(tmp_path, **{switch: wanted} | ({"PATH": str(tmp_path)} if wanted == "1" else {}))
    assert made.returncode != 0
    assert expected in made.stdout + made.stderr


def of_setup(expression, before="", **variables):
    """What an expression over the names of setup.py gives."""
    code = f"import runpy, sys, sysconfig\n{before}\nsys.argv = ['setup.py', '--version']\n"
    code += f"setup = runpy.run_path('setup.py')\nprint(eval({expression!r}, setup))"
    environment = {name: value for name, value in os.environ.items() if name != "EPSKERNELS_CUDA"} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "switch, missing, useless, expected",
    [
        (None, [], None, "None"),
        (None, [], "no use", "no use"),
        (None, ["nvcc"], "no use", "the build lacked nvcc"),
        ("auto", [], "no use", "no use"),
        ("", [], "no use", "no use"),
        ("1", [], "no use", "None"),
        ("1", ["nvcc"], "no use", "EPSKERNELS_CUDA=1, but the build lacked nvcc"),
        ("0", [], None, "EPSKERNELS_CUDA=0 was set when it was installed"),
        ("yes", [], None, "EPSKERNELS_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_what_is_of_no_use_is_built_where_the_switch_insists(switch, missing, useless, expected):
    variables = {} if switch is None else {"EPSKERNELS_CUDA": switch}
    done = of_setup(f"reason_against('EPSKERNELS_CUDA', {missing}, {useless!r})", **variables)
    said = done.stderr if expected.startswith(("EPSKERNELS_CUDA=1", "EPSKERNELS_CUDA:")) else done.stdout
    assert said.splitlines()[-1] == expected


def test_each_compiler_has_a_build_folder_of_its_own():
    """CMake keeps the compiler that a folder has seen first."""
    compilers = ("", "g++", "clang++", "/usr/bin/clang++ -m64")
    names = {of_setup("build_folder().name", CXX=named).stdout.splitlines()[-1] for named in compilers}
    assert len(names) == 4 and all(re.fullmatch(r"cmake-[\w.+-]+", name) for name in names)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("cuda: Optional[str] = None", "False"),
        ("cuda = None", "False"),
        ("cuda: Optional[str] = '13.0'", "True"),
        ("cuda = '12.8'", "True"),
    ],
)
def test_whether_a_torch_has_cuda_is_read_not_imported(line, expected, tmp_path):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    assert of_setup(f"torch_has_cuda(ROOT / {str(tmp_path)!r})").stdout.splitlines()[-1] == expected


def test_this_torch_is_read_right():
    assert of_setup("torch_has_cuda(find_torch())").stdout.splitlines()[-1] == str(torch.version.cuda is not None)


@pytest.mark.parametrize(
    "without, expected",
    [
        ("real = sysconfig.get_path; sysconfig.get_path = lambda name: '/none' if 'include' in name else real(name)",
         [f"Python.h of Python {sysconfig.get_python_version()} (package python3-dev or python3-devel)"]),
        ("sys.modules['pybind11'] = None", ["pybind11"]),
        ("", []),
    ],
    ids=["Python.h", "pybind11", "nothing"],
)  # fmt: skip
def test_what_the_build_lacks_is_named(without, expected):
    result = of_setup("missing_tools()", before=without)
    assert result.stdout.splitlines()[1:] == [str(expected)], result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_another_torch_in_the_place_of_the_one_that_is_there(tmp_path):
    def said(*arguments):
        """What `make build` would do."""
        # These tests may run under it.
        of_make = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "TORCH", "VENV", "EPSKERNELS_CUDA")
        outside = {name: value for name, value in os.environ.items() if name not in of_make}
        command = ["make", "--dry-run", "build", f"VENV={tmp_path}", *arguments]
        return subprocess.run(command, cwd=ROOT, env=outside, check=True, capture_output=True, text=True).stdout

    assert "pip install --quiet torch==2.13.0 " in said() and "--editable" in said()
    (tmp_path / ".torch").write_text("torch==2.11.0\n")
    (tmp_path / ".ready").touch()
    assert "Nothing to be done" in said() and "Nothing to be done" in said("TORCH=torch==2.11.0")
    again = said("TORCH=torch==2.15.0")
    assert "pip install --quiet torch==2.15.0 " in again and "--editable" in again
    assert f"echo 'torch==2.15.0' > {tmp_path}/.torch" in again
    (tmp_path / ".ready").unlink()
    for asked in ("", "0", "1", "auto"):  # what the caller says; else, where there is nvcc, the CUDA kernel too
        told = asked or ("1" if NVCC else "auto")
        assert f"EPSKERNELS_CUDA={told} " in said(*([f"EPSKERNELS_CUDA={asked}"] if asked else []))
    assert "EPSKERNELS_CUDA=auto " in said("NVCC=") and "EPSKERNELS_CUDA=1 " in said("NVCC=/some/nvcc")
