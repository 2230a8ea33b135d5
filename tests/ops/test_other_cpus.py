"""The CPU kernel for Arm, under qemu, and as Clang makes it: built by the project's own CMake, and held to the reference's bits.

`make test-arm` runs the tests of bits, of noise and of sums, and random calls, on these kernels (tests/support/other_cpus.py).
Skipped, saying so, where a compiler or qemu is missing.
"""

import json
import re
import subprocess

import pytest
import torch

import epskernels
from epskernels.ops import REFERENCE
from epskernels.spec import TERMS

from ..support import kernels, other_cpus
from ..support.other_cpus import OTHERS
from .test_guidance import assert_same_sums
from .test_noise import DTYPES, expected_elements, same_bits
from .test_step_bits import check, make_inputs, make_row, random_rows, with_bands

pytestmark = pytest.mark.usefixtures("one_thread")
BUILDS = {"arm_gcc": OTHERS["arm_gcc"], "arm_clang": OTHERS["arm_clang"], "clang": OTHERS["clang_generic"]}


def each(parameter, names):
    """Of which `make test` runs the first."""
    first, *others = names
    cases = [first, *(pytest.param(name, marks=pytest.mark.deep) for name in others)]
    return pytest.mark.parametrize(parameter, cases, indirect=True)


each_build, each_kernel = each("other", BUILDS), each("kernel", OTHERS)
FUSED = {True: r"\s(fn?madd|fn?msub|fml[as])\b", False: r"\svfn?m(add|sub)\w*\b"}  # on Arm, on x86
WIDE = {"arm_clang": r"fmul\s+v\d+\.4s", "arm_gcc": r"fmul\s+v\d+\.4s", "clang": r"vmulps.*%zmm"}


@pytest.fixture
def other(request):
    """One of BUILDS, compiled."""
    other = BUILDS[request.param]
    if missing := other.why_missing():
        pytest.skip(f"{request.param}: {missing}")
    other_cpus.build_server(other)
    return other


# ---- what the build makes of another processor, or compiler ----


@each_build
def test_instruction_sets_and_flags(other):
    """Those of the processor alone; products are never fused."""
    commands = json.loads((other.folder / "cmake" / "compile_commands.json").read_text())
    assert len(commands) >= 5 and all("-ffp-contract=off" in each["command"] for each in commands)
    built = {}
    for each in commands:
        if each["file"].endswith("step_cpu.cpp"):
            capability = re.search(r"EPSKERNELS_CAPABILITY=(\w+)", each["command"]).group(1)
            built[capability] = set(re.findall(r" (-m\S+)", each["command"]))
            assert ("-DEPSKERNELS_X86" in each["command"]) != other.arm
    if other.arm:
        assert built == {"generic": set()}
    else:
        assert set(built) == {"generic", "avx2", "avx512"}
        assert not built["generic"] and "-mavx2" in built["avx2"] and "-mavx512f" in built["avx512"]
        assert not any("fma" in flag for flags in built.values() for flag in flags)


def disassembled(other, *objects):
    disassembler = "aarch64-linux-gnu-objdump" if other.arm else "objdump"
    command = [disassembler, "-d", "--no-show-raw-insn", *objects]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@each_build
def test_machine_code_is_wide_and_fuses_nothing(other):
    code = disassembled(other, *other_cpus.kernel_objects(other))
    assert len(re.findall(WIDE[other.build], code)) > 500
    assert not re.findall(FUSED[other.arm], code)


@pytest.mark.deep
@each_build
def test_all_of_it_compiles_without_a_warning(other):
    """The libraries and the Python module; they link, for Arm against a torch that has no symbols."""
    other_cpus.build(other, "all")
    for name in ("libepskernels_cpu.so", "libepskernels.so"):
        read = ["readelf", "--file-header", other.folder / "cmake" / name]
        header = subprocess.run(read, check=True, capture_output=True, text=True).stdout
        assert ("AArch64" if other.arm else "X86-64") in header


# ---- its bits ----


def every_combination(**columns):
    """A row for each combination of the terms that the kernel has loops of their own for: 128 of them."""
    values = {"GUIDANCE": ("g", 7.5), "CLIP": ("clip", 0.7), "F": ("c_f", -0.4), "M1": ("c_m1", 0.6), "M2": ("c_m2", -0.2),
              "GRAD": ("c_grad", 0.15), "NOISE": ("c_noise", 0.8)}  # fmt: skip
    assert sum(TERMS[name] for name in values) == epskernels.spec.COMMON_TERMS == 127
    rows = []
    for terms in range(128):
        asked = dict(column for name, column in values.items() if terms & TERMS[name])
        rows.append(make_row(d_x=1.25, d_f=-0.75, c_x=0.3, c_m0=1.5, c_in_next=0.9, draw=terms, **asked, **columns))
    return torch.cat(rows)


TENSORS = ("u", "m1", "m2", "grad")
MIXED = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@each_kernel
def test_every_loop_of_the_step(kernel):
    """Each combination of the common terms, with m0 and without; with the learned variance; then the loop for all others."""
    for x_dtype, f_dtype in MIXED:
        for names in ((*TENSORS, "seeds"), (*TENSORS, "noise"), (*TENSORS, "v", "seeds")):
            rows = every_combination(**({"logvar_min": -4, "logvar_max": -2} if "v" in names else {}))
            inputs = make_inputs((128, 37), names, 1, x_dtype, f_dtype)
            check(rows, torch.arange(128), inputs)  # wants m0
            alone = epskernels.step(
                inputs["x"], inputs["f"], rows, torch.arange(128), **{key: inputs[key] for key in names}
            )
            expected = REFERENCE["step"](rows=rows, index=torch.arange(128), **inputs)
            assert same_bits_or_nan(alone, expected)
        for size in (1, 3, 1023, 2049):
            names = (*TENSORS, "v", "y", "rescale", "threshold", "seeds")
            check(random_rows(7, names, size), torch.arange(7), make_inputs((7, size), names, size, x_dtype, f_dtype))


@each_kernel
def test_bands(kernel):
    for dims, shape in ((1, (3, 7)), (1, (3, 2, 1500)), (2, (3, 2, 5, 7)), (2, (3, 1, 33, 65)), (2, (3, 2, 2, 8, 16))):
        for x_dtype, f_dtype in MIXED:
            names = (*TENSORS, "seeds")
            rows = with_bands(random_rows(3, names, 5), dims, 6)
            check(rows, torch.arange(3), make_inputs(shape, names, 7, x_dtype, f_dtype))


@each_kernel
def test_noise(kernel):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    for dtype in DTYPES:
        for shape in ((1,), (3,), (1023,), (5, 7, 31)):
            got = kernel.op("normal")(seeds, list(shape), dtype, 2**32 - 1, 1)
            kernels.compared[kernel.name] += 1
            assert same_bits(got, REFERENCE["normal"](seeds, list(shape), dtype, 2**32 - 1, 1))
    for begin in (0, 4, 2**34 - 512, 2**34, 2**40 + 64, 2**62):
        other_cpus.use(OTHERS[kernel.name].command)
        assert same_bits(other_cpus.normal_elements(77, 3, 1, begin, 1001), expected_elements(begin))


@each_kernel
def test_sums(kernel):
    for dtype in DTYPES:
        for shape in ((2, 1), (2, 3, 7, 5), (2, 1025), (1, 4, 33, 65)):
            inputs = make_inputs(shape, ("u",), 1, dtype, dtype, special=0)
            rows, index = random_rows(2, ("u",), 2, idle=0), torch.arange(shape[0])
            assert_same_sums(kernel, inputs["f"])
            assert_same_sums(kernel, inputs["f"], inputs["u"], rows, index)
            kernels.compared[kernel.name] += 2


def same_bits_or_nan(got, expected):
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and same_bits(got.masked_fill(nan, 0), expected.masked_fill(nan, 0))


# ---- that these tests notice ----


def with_fault(other, name, flags=("", ""), text=("", "")):
    """The command of a process whose kernel was compiled with other flags, or from another text."""
    commands = json.loads((other.folder / "cmake" / "compile_commands.json").read_text())
    (command,) = [each for each in commands if "EPSKERNELS_CAPABILITY=generic" in each["command"]]
    source = (other_cpus.ROOT / "csrc" / "step_cpu.cpp").read_text()
    assert flags[0] in command["command"] and text[0] in source
    places = {end: other.folder / f"{name}{end}" for end in (".cpp", ".o", "")}
    places[".cpp"].write_text(source.replace(*text) if text[0] else source)
    compiled = command["command"].replace(*flags) if flags[0] else command["command"]
    compiled = re.sub(r" -o \S+", f" -I {other_cpus.ROOT}/csrc -o {places['.o']}", compiled.replace(" -Werror", ""))
    subprocess.run(compiled.replace(command["file"], str(places[".cpp"])), shell=True, check=True, cwd=other.folder)
    other_cpus.link_server(other, [places[".o"]], places[""])
    return other.command.replace(str(other.folder / "server"), str(places[""]))


@pytest.mark.deep
@pytest.mark.parametrize("other", ["arm_gcc", "arm_clang"], indirect=True)
def test_a_fused_product_is_noticed(other):
    """Another step, other normals; a square of a float32 is exact in float64, and so are the sums of two."""
    commands = other.command, with_fault(other, "fused", flags=("-ffp-contract=off", "-ffp-contract=fast"))
    assert len(re.findall(FUSED[other.arm], disassembled(other, other.folder / "fused.o"))) > 500
    names, other_ops = ("u", "m1", "seeds"), other_cpus.client()[1]
    rows, inputs = random_rows(3, names, 1, idle=0), make_inputs((3, 100), names, 2, special=0)
    calls = {
        "step": lambda: other_ops.step(rows=rows, index=torch.arange(3), **inputs),
        "normal": lambda: other_ops.normal(inputs["seeds"], [100], torch.float32),
        "moments": lambda: other_ops.moments(inputs["f"]),
    }
    for name, call in calls.items():
        results = []
        for command in commands:
            other_cpus.use(command)
            results.append(call())
        assert torch.allclose(*results, rtol=1e-4, atol=1e-5)
        assert torch.equal(*results) == (name == "moments"), name


@pytest.mark.deep
@pytest.mark.parametrize("other", ["arm_gcc"], indirect=True)
def test_a_write_outside_of_a_tensor_is_noticed(other, capfd):
    whole_tiles = ("begin, end - begin < TILE ? end - begin : TILE);", "begin, TILE);")
    other_cpus.use(with_fault(other, "outside", text=whole_tiles))
    x = torch.zeros(1, 1000)
    with pytest.raises(RuntimeError):
        other_cpus.client()[1].step(x, x, make_row(c_x=1), torch.tensor(0))
    assert "the kernel wrote behind a tensor's elements" in capfd.readouterr().err


def test_a_process_that_does_not_start_is_an_error(capfd):
    if missing := OTHERS["arm_gcc"].why_missing():
        pytest.skip(f"arm_gcc: {missing}")
    other_cpus.use("false")
    with pytest.raises(RuntimeError):
        other_cpus.client()[1].normal(torch.tensor([1]), [4], torch.float32)
    assert "'false' did not start" in capfd.readouterr().err


@pytest.mark.parametrize("name", OTHERS)
def test_a_missing_tool_is_named(name, monkeypatch):
    monkeypatch.setattr(other_cpus, "find", lambda tool: None)
    wanted = OTHERS[name].compiler[0]
    assert wanted in OTHERS[name].why_missing() and ("qemu-aarch64" in OTHERS[name].why_missing()) == ("arm" in name)
    with pytest.raises(pytest.skip.Exception, match=f"{name}: not on this machine: {re.escape(wanted)}"):
        with kernels.Kernel(name).active(monkeypatch):
            pass
