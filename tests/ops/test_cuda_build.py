"""The CUDA library as nvcc made it, read on any machine: its symbols, its ABI, its registration, its machine code.

Skipped, saying so, where there is no nvcc; a build that lacks the library although nvcc is there fails.
"""

import collections
import contextlib
import ctypes
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import epskernels
from epskernels import build
from epskernels.spec import TERMS

from ..support import sass

PACKAGE = pathlib.Path(epskernels.__file__).parent
LIBRARY = PACKAGE / "libepskernels_cuda.so"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not on this machine: the CUDA library is not compiled here"
)
TARGETS = build.cuda_targets() or ""
ARCHITECTURES = [
    f"sm_{number}" for number in re.findall(r"(\d+)(?:-real|\b(?!-virtual|\.))", TARGETS.split("architectures")[-1])
]
# The disassembly of one takes seconds; `make test` reads the last.
each_architecture = pytest.mark.parametrize(
    "architecture", [*(pytest.param(name, marks=pytest.mark.deep) for name in ARCHITECTURES[:-1]), *ARCHITECTURES[-1:]]
)

DTYPES = {"0": "float32", "1": "float16", "2": "bfloat16"}
GUIDANCE, M1, NOISE, EVERYTHING = TERMS["GUIDANCE"], TERMS["M1"], TERMS["NOISE"], 2**32 - 1
SMALL, LARGE, BY_BAND = "0", "1", "2"  # csrc/step_cuda.cu::Form
NORMALS = {("normal_kernel", dtype) for dtype in DTYPES}
SUMS = {("tiles_kernel", dtype, guided) for dtype in DTYPES for guided in ("false", "true")} | {("level_kernel",)}


def test_library_is_there():
    assert LIBRARY.exists(), "nvcc is here, and the CUDA library was not built: " + str(build.why_missing("cuda"))
    assert ARCHITECTURES, TARGETS


def test_undefined_symbols_are_torch_s_stable_abi_and_the_system_s():
    lines = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True).stdout
    unknown = []
    for name in re.findall(r"\s[UwV] (\S+)", lines):
        symbol, _, version = name.partition("@")
        system = version.startswith(("GLIBC", "CXXABI", "GCC_"))
        weak = symbol in ("__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
        if not (system or weak or symbol.startswith(("aoti_torch_", "torch_"))):
            unknown.append(name)
    assert not unknown
    assert "aoti_torch_get_current_cuda_stream" in lines


@pytest.mark.parametrize("library", ["libepskernels.so", "libepskernels_cpu.so", "libepskernels_cuda.so"])
def test_abi_audit(library):
    tool = pathlib.Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
    if not tool.exists():
        pytest.skip("torch-abi-audit is not installed")
    result = subprocess.run([tool, "--check", "torch", "-v", PACKAGE / library], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Torch ABI:   STABLE" in result.stdout and "unstable=0" in result.stdout, result.stdout


REGISTERS = """
import ctypes, sys
import torch, epskernels
ctypes.CDLL(sys.argv[1])  # stands for the libtorch_cuda.so that a torch with CUDA has loaded
torch.ops.load_library(sys.argv[2])
for op in epskernels.ops.REFERENCE:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"epskernels::{op}", "CUDA"), op
assert not torch._C._dispatch_find_dangling_impls()
"""


without_cuda = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch has CUDA: the library is loaded for real"
)


@pytest.fixture
def stand_in(tmp_path):
    source, library = tmp_path / "torch_cuda.c", tmp_path / "libtorch_cuda.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", library], check=True)
    return library


@without_cuda
def test_it_registers_every_op_for_cuda(stand_in):
    command = [sys.executable, "-c", REGISTERS, stand_in, LIBRARY]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# A Python whose torch has CUDA: this one, or the one that is named. No GPU is needed.
CUDA_PYTHON = sys.executable if torch.version.cuda else os.environ.get("EPSKERNELS_CUDA_PYTHON")
LOADED = """
import pathlib, sys
import torch, epskernels
from epskernels import build, ops, samplers, schedule
assert torch.version.cuda is not None, torch.__version__
assert pathlib.Path(epskernels.__file__).parent == pathlib.Path(sys.argv[1]), epskernels.__file__
assert str(pathlib.Path(sys.argv[1], "libepskernels_cuda.so")) in open("/proc/self/maps").read(), build.why_missing("cuda")
for op in ops.REFERENCE:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"epskernels::{op}", "CUDA"), op
assert not torch._C._dispatch_find_dangling_impls()
if not torch.cuda.is_available():
    assert build.why_missing("cuda") == "no GPU is available to torch", build.why_missing("cuda")
if not build.why_missing():  # compiled for this version of Python too
    table, x = samplers.ddpm(schedule.linear(), 5), torch.randn(2, 3, 4)
    got, wanted = (epskernels.step(x, x, table, 2, seeds=torch.arange(2), backend=name) for name in ("cpu", "reference"))
    assert torch.equal(got, wanted)
print("torch", torch.__version__)
"""
ALONE = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
assert "libepskernels_cuda.so" in open("/proc/self/maps").read()
assert torch._C._dispatch_has_kernel_for_dispatch_key("epskernels::step", "CUDA")
"""


@pytest.mark.skipif(
    not CUDA_PYTHON, reason="this torch has no CUDA, and EPSKERNELS_CUDA_PYTHON names no Python whose torch has"
)
def test_a_torch_with_cuda_loads_it():
    """No stand-in: its loader finds every symbol, its dispatcher has every kernel; without the Python package too."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "EPSKERNELS_BACKEND": "auto"}
    for code, argument in ((LOADED, PACKAGE), (ALONE, PACKAGE / "libepskernels.so")):
        command = [CUDA_PYTHON, "-c", code, str(argument)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
        assert result.returncode == 0, result.stderr
        assert "no kernels for CUDA tensors" not in result.stderr


BRINGS = """
import ctypes, sys
import torch
if sys.argv[3] == "with":
    ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[2])
loaded = open("/proc/self/maps").read()
assert ("libepskernels_cuda.so" in loaded) == (sys.argv[4] == "True")
for op in sys.argv[5:]:
    for key in ("CPU", "CUDA")[: 1 + ("libepskernels_cuda.so" in loaded)]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"epskernels::{op}", key), (op, key)
assert not torch._C._dispatch_find_dangling_impls()
"""


@without_cuda
@pytest.mark.parametrize(
    "torch_cuda, built",
    [("with", True), ("with", False), *(pytest.param("without", b, marks=pytest.mark.deep) for b in (True, False))],
)
def test_without_python_it_comes_where_torch_has_cuda(stand_in, tmp_path, torch_cuda, built):
    """libepskernels.so brings it, and says so where it is wanted and missing."""
    for name in ("libepskernels.so", "libepskernels_cpu.so", *["libepskernels_cuda.so"] * built):
        (tmp_path / "package").mkdir(exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "package")
    library, comes = tmp_path / "package" / "libepskernels.so", built and torch_cuda == "with"
    arguments = [stand_in, library, torch_cuda, str(comes), *epskernels.ops.REFERENCE]
    result = subprocess.run([sys.executable, "-c", BRINGS, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    missing = torch_cuda == "with" and not built
    assert ("epskernels: no kernels for CUDA tensors: " in result.stderr) == missing


def test_a_torch_without_cuda_does_not_load_it():
    if torch.version.cuda is None:
        assert "built without CUDA" in build.why_missing("cuda")
        assert str(LIBRARY) not in pathlib.Path("/proc/self/maps").read_text()
        with pytest.raises(OSError):
            ctypes.CDLL(str(LIBRARY))  # nor could it: that is why
    else:
        assert str(LIBRARY) in pathlib.Path("/proc/self/maps").read_text()


# ---- machine code ----


@functools.cache
def kernels(architecture):
    """{(kernel, template arguments): (code, registers, stack)}"""
    code, used = sass.kernels(LIBRARY, architecture), sass.registers(LIBRARY, architecture)
    result, written = {}, sass.demangle([*code])
    for mangled, instructions in code.items():
        name = re.search(r"::(\w+_kernel)(?:<(.*?)>)?\(", written[mangled])
        arguments = re.findall(r"(?:\(\w[\w:]*\)|\b)(\d+|true|false)u?\b", (name[2] or "").replace("epskernels::", ""))
        result[name[1], *arguments] = (instructions, *used[mangled])
    return result


def expected(name, x, f=None, tensors="0", form=SMALL):
    """(elements per thread, 16-byte loads without the row's, 16-byte stores of one output)"""
    unit = 4 if x == "0" and f in ("0", None) else 8
    if name == "normal_kernel":
        return unit, 0, unit * (4 if x == "0" else 2) // 16
    tensors = int(tensors)
    one_width = (x == "0") == (f == "0")
    if form == BY_BAND:
        units = 2
    else:
        noise = tensors != EVERYTHING and tensors & NOISE
        units = 1 if noise or not one_width or (unit == 8 and tensors == EVERYTHING) else 2
        if form == LARGE:
            units = 4 if one_width else 2
    x_words, f_words = (units * unit * (4 if dtype == "0" else 2) // 16 for dtype in (x, f))
    if tensors == EVERYTHING:
        return unit * units, 6 * x_words + 3 * f_words, x_words
    loads = x_words + f_words + (f_words if tensors & GUIDANCE else 0) + (x_words if tensors & M1 else 0)
    return unit * units, loads, x_words


def fast_path(key, code):
    """With the row in as few words as the code has a way for: 22 of its 24 columns are five or six, its band's four one."""
    _, loads, stores = expected(*key)
    words = (0,) if key[0] == "normal_kernel" else (6, 7) if key[-1] == BY_BAND else (5, 6)
    for row in words:
        with contextlib.suppress(ValueError):
            return sass.fast_path(code, stores, loads=loads + row)
    raise AssertionError(f"{key}: no way with {loads} loads of 16 bytes and {words} of the row")


@each_architecture
def test_every_kernel_is_there(architecture):
    step = [key for key in kernels(architecture) if key[0] == "step_kernel"]
    by_band = [key for key in step if key[-1] == BY_BAND]
    # Large tensors have kernels of their own, except where the widths differ and there is no noise.
    assert len(by_band) == 9 * 3 and len(step) - len(by_band) == 9 * (4 + 2 * 4 + 1) + 5 * 4
    assert kernels(architecture).keys() == {*step, *NORMALS, *SUMS}


@each_architecture
def test_no_local_memory_and_no_fused_multiply_add(architecture):
    for key, (code, registers, stack) in kernels(architecture).items():
        assert stack == 0 and sass.count(code, r"(LDL|STL).*") == 0, key
        # By band, the kernel for everything holds two units of nine tensors: two blocks at a time at least, and nothing spilled.
        everything = key[0] == "step_kernel" and int(key[3]) == EVERYTHING
        assert registers <= (240 if everything and key[-1] == BY_BAND else 128), key
        # The root's own correction, two for each of them, and the threshold's division: 5 for each of a thread's elements, and 10
        # where it is not a simple one. And the uniform number w*2^-32 + 2^-33, whose product is exact.
        divisions = 5 * expected(*key)[0] + 10 if everything else 0
        uniform = sum(i.name.startswith("FFMA") and ", 1.16415321826934" in i.operands for i in code)
        assert sass.count(code, r"FFMA.*") - uniform == 2 * sass.count(code, r"MUFU\.RSQ.*") + divisions, key
        assert sass.count(code, r"(DFMA|HFMA2\.(?!MMA)).*") == 0, key
        fused = [i for i in code if i.name.startswith("HFMA2.MMA") and not re.match(r"R\d+, -RZ, RZ, ", i.operands)]
        assert not fused, f"{key}: {fused}"  # HFMA2.MMA R, -RZ, RZ, constant is how a register is set


@pytest.mark.deep
@each_architecture
def test_fast_path_in_16_byte_words(architecture):
    for key, (code, _, _) in kernels(architecture).items():
        if key in SUMS:
            continue
        elements, _, stores = expected(*key)
        path = fast_path(key, code)
        assert sass.count(path, r"STG\.E.*\.128.*") == stores, key
        assert sass.count(path, r"STG.*") == stores, key
        roots = elements // 2 if key[0] == "normal_kernel" or int(key[3]) & NOISE else 0
        assert sass.count(path, r"MUFU\.RSQ.*") == roots, key


@each_architecture
def test_sums_exchange_only_within_a_warp(architecture):
    """Two words of each double, for each of 5 halvings, and no barrier: a warp's lanes read nothing that another warp wrote."""
    for key in SUMS:
        code, _, _ = kernels(architecture)[key]
        doubles = {"level_kernel": 1, "tiles_kernel": 4 if key[-1] == "true" else 2}[key[0]]
        assert sass.count(code, r"SHFL\.DOWN.*") == 2 * 5 * doubles, key
        assert sass.count(code, r"(BAR|STS|LDS|ATOM|RED).*") == 0, key


BUDGET = {
    "x and f, float32": ("step_kernel", "0", "0", "0", LARGE),
    "x and f, bfloat16": ("step_kernel", "2", "2", "0", LARGE),
    "x and f, float32, small tensors": ("step_kernel", "0", "0", "0", SMALL),
    "x and f, bfloat16, small tensors": ("step_kernel", "2", "2", "0", SMALL),
    "with guidance, float32": ("step_kernel", "0", "0", "1", LARGE),
    "with guidance, bfloat16": ("step_kernel", "2", "2", "1", LARGE),
    "with noise, float32": ("step_kernel", "0", "0", "64", LARGE),
    "with noise, bfloat16": ("step_kernel", "2", "2", "64", LARGE),
    "with noise, bfloat16, small tensors": ("step_kernel", "2", "2", "64", SMALL),
    "with guidance and noise, float32": ("step_kernel", "0", "0", "65", LARGE),
    "with guidance and noise, bfloat16": ("step_kernel", "2", "2", "65", LARGE),
    "by band, float32": ("step_kernel", "0", "0", "0", BY_BAND),
    "by band, bfloat16": ("step_kernel", "2", "2", "0", BY_BAND),
    "by band with noise, float32": ("step_kernel", "0", "0", "64", BY_BAND),
    "by band with noise, bfloat16": ("step_kernel", "2", "2", "64", BY_BAND),
    "normal, float32": ("normal_kernel", "0"),
    "normal, bfloat16": ("normal_kernel", "2"),
}  # fmt: skip


def budget(architecture):
    """Per kernel: registers, and instructions per element on the fast path, by kind."""
    rows = {}
    for title, key in BUDGET.items():
        code, registers, _ = kernels(architecture)[key]
        elements, path = expected(*key)[0], fast_path(key, code)
        kinds = collections.Counter(instruction.name.split(".")[0] for instruction in path)
        per_element = {kind: round(count / elements, 2) for kind, count in kinds.most_common()}
        rows[title] = {"registers": registers, "instructions": round(len(path) / elements, 1), "kinds": per_element}
    return rows


@each_architecture
def test_instruction_budget(architecture, record_property, capsys):
    """Bounds a little above what the kernels have, so that an addition shows; docs/architecture.md says what they predict."""
    rows = budget(architecture)
    with capsys.disabled():
        for title, row in rows.items():
            record_property(title, row)
            print(
                f"\n{architecture} {title}: {row['registers']} registers, {row['instructions']} instructions per element",
                end="",
            )
        print()
    assert rows["with noise, float32"]["instructions"] < 66
    assert rows["with noise, bfloat16"]["instructions"] < 62
    assert rows["x and f, float32"]["instructions"] < 24
    assert rows["x and f, bfloat16"]["instructions"] < 18
    assert rows["x and f, float32"]["registers"] <= 72


if __name__ == "__main__":
    print(json.dumps({architecture: budget(architecture) for architecture in ARCHITECTURES}, indent=1))
