"""What is particular to the Triton kernel; its bits are held to the reference with those of the other kernels.

Without a GPU it runs in Triton's interpreter here; for NVIDIA's chips it is compiled ahead, in processes without the
interpreter (`python test_triton.py` is their program), and the code that would run there is read. So it is for AMD's.
"""

import collections
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from epskernels import build
from epskernels.spec import BAND_COLUMNS, COLUMNS, band_dims_of
from epskernels.spec import INPUTS as INPUT_NAMES

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(bool(build.why_missing("triton")), reason=str(build.why_missing("triton"))),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter's numpy meets NaN
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = ("u", "m1", "m2", "v", "grad", "y", "rescale")

# ---- compiled ahead ----

ARCHITECTURES = (80, 90)
AMD = {"gfx942": 64, "gfx1100": 32}  # threads of a warp: MI300X, Radeon RX 7900
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16_of_bfloat16": (torch.float16, torch.bfloat16),
    "float32_of_bfloat16": (torch.float32, torch.bfloat16),
}
INPUTS = {
    "bare": (),
    "guidance_history": ("u", "m1", "m2", "m0"),
    "seeds": ("seeds",),
    "everything_seeds": (*EVERYTHING, "seeds", "m0", "y_out", "model_input"),
    "everything_noise": (*EVERYTHING, "noise", "m0", "y_out", "model_input"),
}
# What the launches have in common with none of the above, to compile at all: arguments that Triton makes constants, those of
# 64 bits, and memory that is not aligned.
ODD = ("one_element", "beyond_32_bits", "misaligned", "expanded", "threshold")
# Those that correct a low band: of pairs and of blocks that 16 bytes hold, and of others.
BANDED = [f"band_{i}-{d}" for i in ("bare", "guidance_history", "seeds") for d in DTYPES]
BAND_SHAPES = {
    "pairs": (4, 4, 4096), "odd_pairs": (4, 4, 4095), "odd_width": (4, 4, 64, 63), "even_width": (4, 4, 64, 62),
    "odd_height": (4, 4, 63, 64), "one_element": (1, 1, 1, 1), "beyond_32_bits": (2, 2, 2**32, 3),
}  # fmt: skip
ODD_BANDS = [f"band_{shape}_seeds" for shape in BAND_SHAPES]


class _Driver:
    """A GPU to compile for, in triton's eyes."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        if self.architecture in AMD:
            return GPUTarget("hip", self.architecture, AMD[self.architecture])
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _use_driver(architecture):
    import triton

    triton.runtime.driver.set_active(_Driver(architecture))


def _tensors(names, x_dtype, f_dtype, shape, make, columns):
    tensors = {"x": make(shape, x_dtype), "f": make(shape, f_dtype), "rows": make((3, columns), torch.float32)}
    tensors |= {"index": make(shape[:1], torch.int64)}
    for key in ("u", "m1", "m2", "v", "grad", "noise", "seeds", "y", "rescale", "threshold"):
        dtype = torch.int64 if key == "seeds" else f_dtype if key in ("u", "v") else x_dtype
        dtype = torch.float32 if key in ("rescale", "threshold") else dtype
        each = key in ("seeds", "rescale", "threshold")
        tensors[key] = make(shape[:1] if each else shape, dtype) if key in names else None
    written = [make(shape, x_dtype), *(make(shape, x_dtype) if key in names else None for key in ("m0", "y_out"))]
    doubled = make((2 * shape[0], *shape[1:]), f_dtype) if "model_input" in names else None
    return tensors | {"written": (*written, doubled)}


def _make(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")  # its address is 0, as aligned as can be


def _make_misaligned(shape, dtype):
    return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


def _calls():
    """By name, what to compile and for what call."""
    from epskernels.ops import triton_backend

    def step(
        names,
        x_dtype=torch.float32,
        f_dtype=torch.float32,
        shape=(4, 4096),
        make=_make,
        expand=False,
        columns=24,
        **changed,
    ):
        tensors = _tensors(names, x_dtype, f_dtype, shape, make, columns) | changed
        if expand:
            tensors["f"] = tensors["f"][:1].expand(shape)
        return triton_backend.step_kernel, lambda launch: triton_backend._run_step(launch, **tensors)

    def normal(dtype):
        out, seeds = _make((4, 4096), dtype), _make((4,), torch.int64)
        return triton_backend.normal_kernel, lambda launch: triton_backend._run_normal(launch, out, seeds, 1, 1)

    def moments(kernel, dtype, guided):
        f = _make((4, 5, 1001), dtype)
        arguments = (f, f, _make((3, 24), torch.float32), _make((4,), torch.int64)) if guided else (f, None, None, None)

        def run(launch):
            kernels = (triton_backend.tiles_kernel, triton_backend.level_kernel)
            launches = (launch if k is kernel else lambda *_, **__: None for k in kernels)
            triton_backend._run_moments(*launches, *arguments)

        return kernel, run

    calls = {f"{i}-{d}": step(INPUTS[i], *DTYPES[d]) for d in DTYPES for i in INPUTS}
    calls |= {f"normal-{dtype}": normal(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    calls |= {f"one_row-{d}": step((), *DTYPES[d], index=_make((), torch.int64)) for d in ("float32", "bfloat16")}
    for dtype in ("float32", "bfloat16"):
        calls[f"moments-{dtype}"] = moments(triton_backend.tiles_kernel, getattr(torch, dtype), False)
        calls[f"moments_guided-{dtype}"] = moments(triton_backend.tiles_kernel, getattr(torch, dtype), True)
    calls["moments_level"] = moments(triton_backend.level_kernel, torch.float32, False)
    calls["one_element"] = step(INPUTS["everything_seeds"], shape=(1, 1))
    calls["beyond_32_bits"] = step(INPUTS["everything_seeds"], shape=(2, 2**33))
    calls["misaligned"] = step(INPUTS["everything_noise"], make=_make_misaligned)
    calls["threshold"] = step(("threshold", "m0"))
    calls["expanded"] = step(INPUTS["bare"], expand=True)
    for name in BANDED:
        inputs, dtypes = name.removeprefix("band_").split("-")
        calls[name] = step(INPUTS[inputs], *DTYPES[dtypes], shape=(4, 4, 64, 20), columns=28)
    for name, shape in zip(ODD_BANDS, BAND_SHAPES.values(), strict=True):
        calls[name] = step(INPUTS["everything_seeds"], *DTYPES["float32_of_bfloat16"], shape=shape, columns=28)
    return calls


@functools.cache
def _inductor_s_copy(kernel, folder):
    """The kernel as Inductor writes it into a module of its own: from its source and the globals that it finds there."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code

    source = user_defined_triton_kernel_transitive_closure_source_code(kernel)
    path = folder / f"inductor_{kernel.__name__}.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{source}")
    sys.path.insert(0, str(folder))
    return getattr(__import__(path.stem), kernel.__name__)


def _compile(architecture, folder, names):
    """The assembler text and machine code of these calls, by kind, into `folder`; `inductor-` before one: as
    Inductor does, without enable_fp_fusion."""
    _use_driver(architecture)
    calls = _calls()
    for target in names:
        kernel, run = calls[target.removeprefix("inductor-")]
        options = {"enable_fp_fusion": False}
        if target.startswith("inductor-"):
            kernel, options = _inductor_s_copy(kernel, folder), {"sanitize_overflow": False, "debug": True}

        def launch(grid, *arguments, target=target, kernel=kernel, options=options, **launched):
            compiled = kernel.warmup(*arguments, grid=grid, **launched, **options)
            for kind in {"ptx", "cubin", "llir", "amdgcn"} & compiled.asm.keys():
                made = compiled.asm[kind]
                (folder / f"{target}.{kind}").write_bytes(made.encode() if isinstance(made, str) else made)

        run(launch)


def _process(folder, *arguments):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.test_triton", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
    )


def _finished(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def ahead(request, tmp_path_factory):
    """{architecture: folder of texts and machine code}, of what the tests of this run read."""
    read = [item.callspec.params for item in request.session.items if "ahead" in getattr(item, "fixturenames", ())]
    folders, processes = {}, []
    for architecture in dict.fromkeys(params["architecture"] for params in read):
        names = sorted({params["name"] for params in read if params["architecture"] == architecture})
        folders[architecture] = tmp_path_factory.mktemp(f"for_{architecture}")
        processes += [_process(folders[architecture], "compile", architecture, folders[architecture], *names)]
    for process in processes:
        _finished(process)
    return folders


STEPS = [f"{i}-{d}" for d in DTYPES for i in INPUTS]
FAST = [*STEPS, "normal-float32", "normal-bfloat16", "one_row-float32", "one_row-bfloat16", *BANDED]
INDUCTOR = [f"inductor-{name}" for name in FAST if name.startswith(("everything_seeds", "normal", "band_seeds"))]
MOMENTS = [*(f"moments{g}-{dtype}" for g in ("", "_guided") for dtype in ("float32", "bfloat16")), "moments_level"]
# What `make test` compiles, for the newest architecture: each kernel, the words of 64 and of 128 bits, and all terms.
SOME = (
    "guidance_history-float32", "seeds-float32_of_bfloat16", "everything_noise-bfloat16", "normal-bfloat16", "threshold",
    "inductor-normal-float32", "moments_guided-float32", "moments_level", "band_seeds-bfloat16", "band_odd_width_seeds",
)  # fmt: skip


def each(names):
    def case(architecture, name):
        read = architecture == ARCHITECTURES[-1] and name in SOME
        return pytest.param(architecture, name, marks=[] if read else pytest.mark.deep)

    return pytest.mark.parametrize(
        "architecture, name", [case(architecture, name) for architecture in ARCHITECTURES for name in names]
    )


def _products(ptx):
    """The number of fma, each of which must be a product: its addend a -0 that was made of %ctaid.z."""
    made = dict(re.findall(r"^\s*(?:neg\.f32|cvt\.rn\.f32\.[us]32|mov\.[bu]32)\s+(%\w+), (%[\w.]+);", ptx, re.M))
    addends = re.findall(r"^\s*fma\.rn\.f32\s+%\w+, [%\w]+, [%\w]+, ([%\w]+);", ptx, re.M)
    assert len(addends) == len(re.findall(r"\b(?:fma|mad)\.[\w.]*f\d", ptx))
    for minus_zero in set(addends):
        assert re.search(rf"neg\.f32\s+{minus_zero},", ptx)
        assert made[made[made[minus_zero]]] == "%ctaid.z"
    return len(addends)


@each([*FAST, *ODD, *ODD_BANDS, *INDUCTOR])
def test_no_operation_is_fused_and_no_subnormal_flushed(ahead, architecture, name):
    """Nor by Inductor, where a multiplication and an addition may be."""
    ptx = (ahead[architecture] / f"{name}.ptx").read_text()
    assert _products(ptx) > 0
    assert ".ftz" not in ptx
    assert not re.search(r"\b(?:ex2|lg2|sin|cos|rsqrt|rcp|div\.(?!rn\.f32)|sqrt\.approx)\.?\S*f32", ptx)
    assert ("div.rn.f32" in ptx) == (name == "threshold")
    assert bool(re.search(r"sqrt\.rn\.f32", ptx)) == ("seeds" in name or "normal" in name or name in ODD[:2])


@each(FAST)
def test_memory_is_accessed_by_128_bits(ahead, architecture, name):
    """Every tensor once; nothing goes through local or shared memory. By 64 bits what of two bytes is beside float32, or has a
    band: four elements of each of two image rows."""
    ptx = (ahead[architecture] / f"{name}.ptx").read_text()
    found = collections.Counter(re.findall(r"\b(ld|st)\.(global|local|shared)\S*?(\.v\d)?\.b(\d+)", ptx))
    inputs, dtypes = name.split("-")
    dtypes = DTYPES.get(dtypes, (getattr(torch, dtypes, None),) * 2)
    banded, inputs = inputs.startswith("band_"), inputs.removeprefix("band_")
    given = set() if inputs == "normal" else {"x", "f", *INPUTS.get(inputs, ())}
    like_f = given & {"f", "u", "v", "model_input"}
    like_x = {"out", *given} - like_f - {"seeds", "rescale"}
    expected = collections.Counter()
    for names, dtype in ((like_x, dtypes[0]), (like_f, dtypes[1])):
        mixed = dtype.itemsize < (4 if banded else max(dtypes, key=lambda d: d.itemsize).itemsize)
        for key in names:  # 8 elements a thread
            access = "st" if key in ("out", "m0", "y_out", "model_input") else "ld"
            words = 2 if mixed or dtype.itemsize == 4 else 1
            expected[access, "global", ".v2" if mixed else ".v4", "32"] += 2 * words if key == "model_input" else words
    scalars = {key for key in found if key[0] == "ld" and not key[2]}  # the row, its index, the seed
    assert {key[1] for key in scalars} == {"global"}
    assert {key: count for key, count in found.items() if key not in scalars} == expected
    assert "bar.sync" not in ptx


@each(FAST)
def test_machine_code(ahead, architecture, name, record_property):
    """No spills, and no multiplication fused with an addition by ptxas: an FFMA is a product or part of a square root."""
    from ..support import sass

    cubin = ahead[architecture] / f"{name}.cubin"
    target = "sm_90a" if architecture == 90 else f"sm_{architecture}"
    (code,), ((registers, stack),) = sass.kernels(cubin, target).values(), sass.registers(cubin, target).values()
    ptx = cubin.with_suffix(".ptx").read_text()
    roots = len(re.findall(r"sqrt\.rn\.f32", ptx))
    assert stack == 0 and sass.count(code, "(LDL|STL|STS|LDS).*") == 0
    assert sass.count(code, "FFMA.*") - _products(ptx) == (2 * roots + 3 if roots else 0)
    executed = len([i for i in code if i.name != "NOP"])
    record_property("registers", registers)
    record_property("instructions_per_element", executed / 8)
    print(f"sm_{architecture} {name}: {registers} registers, {executed} instructions for 8 elements")


@each(MOMENTS)
def test_moments_are_added_once_by_one_warp(ahead, architecture, name):
    """A tile's 1,024 elements in 31 additions of each lane and five after shuffles; nothing fused, spilled or shared."""
    from ..support import sass

    cubin = ahead[architecture] / f"{name}.cubin"
    target = "sm_90a" if architecture == 90 else f"sm_{architecture}"
    (code,), ((_, stack),) = sass.kernels(cubin, target).values(), sass.registers(cubin, target).values()
    ptx = cubin.with_suffix(".ptx").read_text()
    assert (_products(ptx) > 0) == ("guided" in name) and ".ftz" not in ptx
    assert stack == 0 and sass.count(code, "(LDL|STL|LDS|STS|BAR|DFMA).*") == 0
    sums = 1 if name == "moments_level" else 4 if "guided" in name else 2
    assert sass.count(code, "DADD.*") == 36 * sums


# ---- for AMD's chips: compiled and read, not run ----

# What `make test` compiles, for gfx942.
SOME_AMD = ("seeds-bfloat16", "threshold", "moments_guided-float32")


def each_amd(names):
    def case(architecture, name):
        read = architecture == "gfx942" and name in SOME_AMD
        return pytest.param(architecture, name, marks=[] if read else pytest.mark.deep)

    return pytest.mark.parametrize(
        "architecture, name", [case(architecture, name) for architecture in AMD for name in names]
    )


def _issued(gcn):
    """[(operation, operands)]; those that a chip issues in pairs, one by one."""
    lines = (half.strip() for line in gcn.splitlines() for half in line.split(";")[0].split("::"))
    return [
        (name, operands)
        for name, _, operands in (line.partition(" ") for line in lines)
        if re.match(r"[a-z]+_\w+$", name)
    ]


def _lanes(issued, pattern):
    """How many numbers these operations make, of which a packed one makes two, without those of a division of integers."""
    of_integers = ("0x4f800000", "0xcf800000")  # 2^32 and -2^32
    found = [name for name, operands in issued if re.fullmatch(rf"v_(?:pk_|dual_)?(?:{pattern})(?:_e32|_e64)?", name)
             and not any(constant in operands for constant in of_integers)]  # fmt: skip
    return sum(2 if name.startswith("v_pk_") else 1 for name in found)


def _lanes_of_ir(llir, pattern):
    return sum(
        int(width or 1) for width in re.findall(pattern.replace("FLOAT", r"(?:<(\d+) x )?(?:float|double)>?"), llir)
    )


def _minus_zeros(llir):
    """What is minus the grid's third index, which is 0, on every path; and what holds it in all its elements."""
    zeros, minus, known = set(re.findall(r"(%\S+) = tail call i32 @llvm\.amdgcn\.workgroup\.id\.z", llir)), set(), -1
    forms = (
        (zeros, zeros, r"(%\S+) = (?:sitofp|uitofp) i32 (%[\w.-]+) to float"),
        (minus, zeros, r"(%\S+) = fneg (?:<\d+ x )?float>? (%[\w.-]+)"),
        (minus, minus, r"(%\S+) = insertelement <\d+ x float> poison, float (%[\w.-]+), i64 0"),
        (
            minus,
            minus,
            r"(%\S+) = shufflevector <\d+ x float> (%[\w.-]+), <\d+ x float> poison, <\d+ x i32> zeroinitializer",
        ),
    )
    while known < len(minus):
        known = len(minus)
        for made, of, form in forms:
            made |= {name for name, value in re.findall(form, llir) if value in of}
        for name, incoming in re.findall(r"(%\S+) = phi (?:<\d+ x )?float>? (.*)", llir):
            values = set(re.findall(r"\[ (\S+),", incoming)) - {"poison", "undef"}
            minus |= {name} if values and values <= minus else set()
    return minus


@each_amd([*FAST, *ODD, *ODD_BANDS, *INDUCTOR, *MOMENTS])
def test_amd_fuses_nothing_and_rounds_what_it_approximates(ahead, architecture, name):
    """In LLVM's text each fma is a product, with a -0 of the grid's third index; in machine code there are as many, and as many
    sums as there, beside the two corrections of each root and the five of each quotient."""
    llir, gcn = ((ahead[architecture] / f"{name}.{kind}").read_text() for kind in ("llir", "amdgcn"))
    issued = _issued(gcn)
    products = _lanes_of_ir(llir, r"call FLOAT @llvm\.fma")
    roots, quotients = _lanes_of_ir(llir, r"call FLOAT @llvm\.sqrt"), _lanes_of_ir(llir, r"= fdiv FLOAT")
    assert not re.search(
        r"fmuladd|!fpmath|\b(?:fast|afn|arcp|reassoc|contract|nsz)\b|llvm\.amdgcn\.(?:rcp|rsq|sqrt|exp|log|sin|cos)",
        llir,
    )
    minus_zeros = _minus_zeros(llir)
    addends = re.findall(r"@llvm\.fma\.\S+\(.*, (?:float|<\d+ x float>) (%?\S+)\)", llir)
    assert len(addends) == len(re.findall(r"call .*@llvm\.fma", llir)) and set(addends) <= minus_zeros, (
        set(addends) - minus_zeros
    )
    assert (products > 0) == (name not in ("moments-float32", "moments-bfloat16", "moments_level"))

    fused = _lanes(issued, r"(?:fma|fmac|fmaak|fmamk|mad|madak|madmk|mac|dot\d\w*)(?:_mix\w*)?_(?:legacy_)?b?f\d+")
    assert fused == products + 2 * roots + 5 * quotients
    assert _lanes(issued, r"(?:add|sub|subrev)_f\d+") == _lanes_of_ir(llir, r"= f(?:add|sub) FLOAT")
    assert _lanes(issued, "sqrt_f32") == roots and _lanes(issued, "div_fixup_f32") == quotients
    assert _lanes(issued, r"(?:rsq|exp|log|sin|cos)_\w+") == 0
    assert (quotients > 0) == (name == "threshold")
    assert (roots > 0) == ("seeds" in name or "normal" in name or name in ODD[:2])


# Of gfx942, by element: vector instructions, of which one that takes four times as long counts four times (docs/architecture.md).
AMD_COUNTS = {
    "bare-float32": 16.2, "bare-bfloat16": 22.8, "seeds-float32": 80.5, "seeds-bfloat16": 87.0, "band_seeds-float32": 104.9,
    "band_seeds-bfloat16": 111.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "architecture, name",
    [pytest.param("gfx942", name, marks=[] if name in SOME_AMD else pytest.mark.deep) for name in AMD_COUNTS],
)
def test_amd_instruction_budget(ahead, architecture, name):
    vector = [
        operation
        for operation, _ in _issued((ahead[architecture] / f"{name}.amdgcn").read_text())
        if operation[:2] == "v_"
    ]
    slow = [
        operation
        for operation in vector
        if re.match(r"v_(?:mul_(?:lo|hi)_[ui]32|mad_[ui]64_[ui]32|sqrt|rsq|rcp)", operation)
    ]
    assert 0.9 * AMD_COUNTS[name] <= (len(vector) + 3 * len(slow)) / 8 <= AMD_COUNTS[name]  # 8 elements a thread


@each_amd([*FAST, *ODD, *ODD_BANDS, *INDUCTOR, *MOMENTS])
def test_amd_keeps_subnormals_and_needs_no_scratch(ahead, architecture, name):
    gcn = (ahead[architecture] / f"{name}.amdgcn").read_text()
    told = dict(re.findall(r"\.amdhsa_(\w+) (\d+)", gcn)) | dict(
        re.findall(r"\.(\w+_spill_count|\w+_segment_fixed_size):\s+(\d+)", gcn)
    )
    for mode in ("float_denorm_mode_32", "float_denorm_mode_16_64"):
        assert told[mode] == "3", mode  # neither inputs nor results are flushed
    for mode in ("float_round_mode_32", "float_round_mode_16_64", "uses_dynamic_stack", "private_segment_fixed_size"):
        assert told[mode] == "0", mode
    assert told["vgpr_spill_count"] == "0"  # scalar registers may wait in a vector register's lanes
    assert not re.search(r"^\s+(?:scratch_|s_setreg|s_denorm_mode|s_round_mode)", gcn, re.M)


@each_amd([name for name in FAST if not name.startswith("band_")])
def test_amd_accesses_memory_by_128_bits(ahead, architecture, name):
    """Every tensor once, 8 elements a thread on both; by 64 bits what of two bytes is beside float32."""
    issued = _issued((ahead[architecture] / f"{name}.amdgcn").read_text())
    wide = {"dwordx4": 16, "b128": 16, "dwordx2": 8, "b64": 8}
    found = collections.Counter()
    for access in (re.fullmatch(r"buffer_(load|store)_(\w+)", operation) for operation, _ in issued):
        if access:
            found[access[1], wide.get(access[2], access[2])] += 1
    inputs, dtypes = name.split("-")
    dtypes = DTYPES.get(dtypes, (getattr(torch, dtypes, None),) * 2)
    given = set() if inputs == "normal" else {"x", "f", *INPUTS.get(inputs, ())} - {"seeds", "rescale"}
    expected = collections.Counter()
    for key in {"out", *given}:
        dtype = dtypes[1] if key in ("f", "u", "v", "model_input") else dtypes[0]
        size = 8 if dtype.itemsize < max(d.itemsize for d in dtypes) else 16
        access = "store" if key in ("out", "m0", "y_out", "model_input") else "load"
        expected[access, size] += 8 * dtype.itemsize // size * (2 if key == "model_input" else 1)
    assert found == expected


# ---- seen by torch.compile ----


def _capture():
    """{function: (kernels, written arguments, other calls of this package)} in the graph that Inductor would get."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    import epskernels

    _use_driver(90)
    x, f, m1 = torch.zeros(3, 2, 64, 64)
    rows, wide_rows, seeds = torch.zeros(3, 24), torch.zeros(3, 28), torch.zeros(2, dtype=torch.int64)
    image = torch.zeros(2, 3, 7, 6)
    index = torch.zeros((), dtype=torch.int64)
    functions = {
        "step": lambda: epskernels.step(x, f, rows, index, seeds=seeds, backend="triton"),
        "step_m0": lambda: epskernels.step(x * 2, f, rows, index, backend="triton", return_m0=True)[1] + 1,
        "in_place": lambda: epskernels.step(x, f, rows, index, m1=m1, out=x, m0=m1, backend="triton"),
        "normal": lambda: epskernels.normal(seeds, (3, 64), dtype=torch.bfloat16, backend="triton"),
        "band": lambda: epskernels.step(image, image + 1, wide_rows, index, seeds=seeds, backend="triton"),
    }
    seen = {}

    def look(key, graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        kernels = [node for node in nodes if "triton_kernel_wrapper" in str(node.target)]
        written = [node.kwargs["tensors_to_clone"] for node in kernels]
        seen[key] = len(kernels), written, [str(n.target) for n in nodes if "epskernels" in str(n.target)]
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(
            lambda *_: [o if o is None else torch.zeros([*map(int, o.shape)], dtype=o.dtype) for o in outputs]
        )

    for name, function in functions.items():
        for dynamic in (False, True):
            torch.compiler.reset()
            backend = aot_autograd(fw_compiler=functools.partial(look, f"{name}-{dynamic}"))
            torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)()
    rows.requires_grad_()
    both = {f"{way}_compiler": functools.partial(look, way) for way in ("fw", "bw")}
    torch.compile(functions["step"], backend=aot_autograd(**both), fullgraph=True)().sum().backward()
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for, and the tensors are on cpu"):
        from epskernels.ops.triton_backend import TRITON

        TRITON["step"](x, f, rows, index)
    print(json.dumps(seen))


@pytest.mark.deep
def test_inductor_sees_the_kernel(tmp_path):
    """One launch, which writes the outputs and is known to write nothing else, and no opaque call; in a gradient's forward
    pass, and in its backward pass, which makes the noise again."""
    seen = json.loads(_finished(_process(tmp_path, "capture")).splitlines()[-1])
    both = ["out_ptr", "m0_ptr"]
    expected = {"step": ["out_ptr"], "step_m0": both, "in_place": both, "normal": ["out_ptr"], "band": ["out_ptr"]}
    expected = {f"{name}-{d}": [1, [written], []] for name, written in expected.items() for d in (False, True)}
    assert seen == expected | dict.fromkeys(("fw", "bw"), [1, [["out_ptr"]], []])


# ---- bits, and what spoils a sample ----


@functools.cache
def _helpers():
    from . import test_step_bits

    return test_step_bits


def _call(names, x_dtype, f_dtype, shape=(3, 270)):
    """Rows, and inputs that use all of them, on DEVICE."""
    bits = _helpers()
    inputs = bits.make_inputs(shape, names, 5, x_dtype, f_dtype)
    rows = bits.random_rows(len(inputs["x"]), names, 6, idle=0)
    return rows.to(DEVICE), {key: value.to(DEVICE) for key, value in inputs.items()}


@pytest.mark.parametrize(
    "names", [EVERYTHING + ("seeds",), EVERYTHING + ("noise",), ()], ids=["seeds", "noise", "bare"]
)
@pytest.mark.parametrize(
    "dtypes",
    [
        DTYPES["float32"],
        DTYPES["float16_of_bfloat16"],
        *(pytest.param(DTYPES[key], marks=pytest.mark.deep) for key in ("bfloat16", "float32_of_bfloat16")),
    ],
    ids=str,
)
def test_step_does_not_depend_on_the_block(dtypes, names):
    from epskernels.ops import triton_backend

    rows, inputs = _call(names, *dtypes)
    index = torch.arange(3, device=DEVICE)
    arguments = {key: inputs.get(key) for key in INPUT_NAMES if key not in ("rows", "index")}
    launch = triton_backend._launcher(triton_backend.step_kernel, rows.device)
    expected = triton_backend.TRITON["step_y"](rows=rows, index=index, **arguments)
    for block in ((64, 1), (256, 2), (2048, 8)):
        written = [torch.full_like(inputs["x"], 7) for _ in range(3)]
        triton_backend._run_step(launch, (*written, None), rows=rows, index=index, block=block, **arguments)
        _helpers().assert_all_same_bits(written, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normal_does_not_depend_on_the_block(dtype):
    from epskernels.ops import triton_backend

    seeds = torch.tensor([7, -8], device=DEVICE)
    launch = triton_backend._launcher(triton_backend.normal_kernel, seeds.device)
    expected = triton_backend.TRITON["normal"](seeds, (333,), dtype=dtype, draw=5)
    for block in ((64, 1), (1024, 4)):
        out = torch.full_like(expected, 7)
        triton_backend._run_normal(launch, out, seeds, 5, 1, block=block)
        _helpers().assert_same_bits(out, expected, f"normals of {block}")


@pytest.mark.parametrize("start", [2**34 - 64, 2**34, 5 * 2**34 + 64])
def test_normals_far_into_a_sample(start):
    """Where the counter's high word is not 0: a launch whose first program stands there."""
    from epskernels.ops import reference, triton_backend

    seeds, count = torch.tensor([9], device=DEVICE), 64
    group = torch.arange(start // 4, (start + count) // 4)
    words = reference.philox((group & 0xFFFFFFFF, group >> 32, 3, 1), (torch.tensor(9), torch.tensor(0)))
    normals = (*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:]))
    expected = torch.stack(normals, dim=-1).flatten()

    launch = triton_backend._launcher(far_normal_kernel, seeds.device)
    for VEC in (4, 8):
        out = torch.zeros(count, device=DEVICE)
        launch((1,), out, seeds, start, VEC=VEC)
        _helpers().assert_same_bits(out.cpu(), expected, f"VEC {VEC}")


BAD_INDEX = (-1, 3, 2**31, 2**40, -(2**63), 2**63 - 1)


@pytest.mark.parametrize("bad", BAD_INDEX)
def test_index_out_of_range_gives_nan(bad):
    from epskernels.ops.triton_backend import TRITON

    rows, inputs = _call(EVERYTHING + ("seeds",), torch.float32, torch.float32)
    good = TRITON["step_y"](rows=rows, index=torch.tensor([2, 1, 0], device=DEVICE), **inputs)
    got = TRITON["step_y"](rows=rows, index=torch.tensor([2, bad, 0], device=DEVICE), **inputs)
    for result, expected in zip(got, good, strict=True):
        assert result[1].isnan().all()
        _helpers().assert_same_bits(result[::2], expected[::2], "the other samples")


# The coefficient that asks, and the tensor that is then missing.
MISSING = [("g", "u"), ("c_m1", "m1"), ("c_m2", "m2"), ("logvar_min", "v"), ("logvar_max", "v"), ("c_noise", "seeds")]


@pytest.mark.parametrize("column, missing", MISSING)
def test_row_that_needs_an_absent_tensor_gives_nan(column, missing):
    from epskernels.ops.triton_backend import TRITON

    bits, index = _helpers(), torch.arange(3, device=DEVICE)
    rows, inputs = _call(tuple({"u", "m1", "m2", "v", "seeds"} - {missing}), torch.float32, torch.float32)
    expected = TRITON["step_m0"](rows=rows, index=index, **inputs)
    rows[1, bits.COLUMNS.index(column)] = 0.5
    got = TRITON["step_m0"](rows=rows, index=index, **inputs)
    for result, before in zip(got, expected, strict=True):
        assert result[1].isnan().all()
        bits.assert_same_bits(result[::2], before[::2], "the other samples")


BAD_VALUES = [("clip", -1.0), ("clip", float("nan"))]
BAD_VALUES += [("draw", value) for value in (-1.0, 0.5, 2.0**24, float("inf"), float("nan"))]


@pytest.mark.parametrize("column, value", BAD_VALUES, ids=str)
def test_row_that_cannot_be_applied_gives_nan(column, value):
    """A draw only where noise is made of it."""
    from epskernels.ops.triton_backend import TRITON

    bits, index = _helpers(), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    rows, inputs = _call(("seeds",), torch.float32, torch.float32)
    rows[0, bits.COLUMNS.index(column)] = value
    assert all(result.isnan().all() for result in TRITON["step_m0"](rows=rows, index=index, **inputs))
    rows[0, bits.COLUMNS.index("c_noise")] = 0
    assert TRITON["step"](rows=rows, index=index, **inputs).isnan().all() == (column == "clip")


def test_check_rows_raises_before_anything_is_written(monkeypatch):
    from epskernels.ops.triton_backend import TRITON

    rows, inputs = _call(("seeds",), torch.float32, torch.float32)
    out = torch.full_like(inputs["x"], 7)
    call = functools.partial(TRITON["step_out"], rows=rows, out=out, **inputs)
    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "1")
    with pytest.raises(RuntimeError, match=r"index: expected values in \[0, 3\), got 3"):
        call(index=torch.tensor([0, 1, 3], device=DEVICE))
    rows[1, _helpers().COLUMNS.index("g")] = 2
    with pytest.raises(RuntimeError, match=r"u: missing, and row 1 needs it \(g is not 1\)"):
        call(index=torch.tensor([0, 1, 2], device=DEVICE))
    assert (out == 7).all()
    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "0")
    call(index=torch.tensor([0, 1, 3], device=DEVICE))
    assert out[1:].isnan().all() and not out[0].isnan().all()


# ---- the low band ----


def _banded(names, x_dtype, f_dtype, shape):
    """As _call, with rows of all columns: a sample's corrects none, all, or some of the band's terms."""
    rows, inputs = _call(names, x_dtype, f_dtype, shape)
    weights = torch.tensor([[-0.3, 0.2, 0.0], [0.0, 0.0, 0.0], [0.0, -0.7, 0.4]], device=DEVICE)
    dims = torch.full((3, 1), float(band_dims_of(len(shape))), device=DEVICE)
    return torch.cat([rows[:, : len(COLUMNS)], weights, dims], 1), inputs


def _expected(rows, index, inputs):
    inputs = {key: value.cpu() for key, value in inputs.items()}
    return [result.to(DEVICE) for result in _helpers().reference(rows.cpu(), index.cpu(), inputs)]


# Odd and even sizes, of which the least, with and without a multiple of 4; signals, images and videos.
BAND_CASES = [
    ((3, 270), EVERYTHING + ("noise",), "float32"),
    ((3, 271), EVERYTHING + ("seeds",), "float32_of_bfloat16"),
    ((3, 2, 1), ("seeds",), "bfloat16"),
    ((3, 3, 22), ("seeds",), "bfloat16"),
    ((3, 4, 8, 12), EVERYTHING + ("seeds",), "bfloat16"),
    ((3, 4, 7, 8), ("u", "seeds"), "float32"),
    ((3, 4, 9, 6), EVERYTHING + ("seeds", "threshold"), "float16_of_bfloat16"),
    ((3, 4, 6, 15), EVERYTHING + ("seeds",), "float32"),
    ((3, 2, 1, 1), EVERYTHING + ("noise",), "float32"),
    ((3, 2, 3, 5, 7), ("m1", "seeds"), "float32_of_bfloat16"),
    ((3, 2, 3, 4, 4), EVERYTHING + ("noise",), "bfloat16"),
]


@pytest.mark.parametrize("shape, names, dtypes", BAND_CASES, ids=str)
def test_band_is_that_of_the_reference(shape, names, dtypes):
    """Whatever the block: in tiles of 128 elements too, which do not end with the images' rows."""
    from epskernels.ops import triton_backend

    rows, inputs = _banded(names, *DTYPES[dtypes], shape)
    index = torch.tensor([2, 1, 0], device=DEVICE)
    expected = _expected(rows, index, inputs)
    arguments = {key: inputs.get(key) for key in INPUT_NAMES if key not in ("rows", "index")}
    launch = triton_backend._launcher(triton_backend.step_kernel, rows.device)
    for block in (None, (128, 1)):
        written = [torch.full_like(inputs["x"], 7) for _ in expected]
        outputs = (*written, *[None] * (4 - len(expected)))
        triton_backend._run_step(launch, outputs, rows=rows, index=index, block=block, **arguments)
        _helpers().assert_all_same_bits(written, expected)
    plain = _expected(rows[:, : len(COLUMNS)], index, inputs)
    _helpers().assert_same_bits(written[0][1], plain[0][1], "the sample whose row has no band")
    assert not torch.equal(written[0].nan_to_num(), plain[0].nan_to_num())


@pytest.mark.parametrize("shape", [(3, 4, 7, 6), (3, 4, 8, 8), (3, 5, 9)], ids=str)
def test_band_in_place_with_a_doubled_model_input(shape):
    from epskernels.ops.triton_backend import TRITON

    rows, inputs = _banded(("m1", "seeds"), *DTYPES["float32_of_bfloat16"], shape)
    index = torch.tensor([2, 1, 0], device=DEVICE)
    x, m0 = _expected(rows, index, inputs)
    model_input = torch.empty((6, *shape[1:]), dtype=torch.bfloat16, device=DEVICE)
    wide = torch.full((3, 2, *shape[1:]), 7.0, device=DEVICE)  # samples that do not follow each other
    inputs["x"] = wide[:, 1].copy_(inputs["x"])
    TRITON["step_"](rows=rows, index=index, model_input=model_input, m0=inputs["m1"], **inputs)
    _helpers().assert_all_same_bits((wide[:, 1], inputs["m1"]), (x, m0))
    assert (wide[:, 0] == 7).all()
    c_in_next = rows[index, COLUMNS.index("c_in_next")].reshape(-1, *[1] * (len(shape) - 1))
    _helpers().assert_same_bits(
        model_input, (c_in_next * x).bfloat16().repeat(2, *[1] * (len(shape) - 1)), "next input"
    )


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 4, 7, 8), (3, 4, 8, 6), (3, 2, 3, 5, 5)], ids=str)
def test_band_of_a_batch_with_one_row(shape):
    """The launch takes it as one long sample; channels that are not guided, in each."""
    from epskernels.ops.triton_backend import TRITON

    rows, inputs = _banded(("u", "m1"), torch.float32, torch.float32, shape)
    rows[0, COLUMNS.index("guided_channels")] = 1
    index = torch.zeros((), dtype=torch.int64, device=DEVICE)
    _helpers().assert_all_same_bits(TRITON["step_m0"](rows=rows, index=index, **inputs), _expected(rows, index, inputs))


BAD_BANDS = [((3, 9), value) for value in (2.0, 0.0, 1.5, -1.0, float("nan"), float("inf"))]
BAD_BANDS += [((3, 4, 5, 6), 1.0), ((3, 2, 2, 4, 4), 0.0), ((3, 4, 4), 2.0)]
BAD_BANDS += [((3,), 0.0), ((3,), 1.0), ((3, 1, 2, 1, 4, 4), 2.0), ((3, 1, 2, 1, 4, 4), 0.0)]


@pytest.mark.parametrize("shape, value", BAD_BANDS, ids=str)
def test_band_of_other_dimensions_gives_nan(shape, value):
    from epskernels.ops.triton_backend import TRITON

    rows, inputs = _banded((), torch.float32, torch.float32, shape)
    rows[:, len(COLUMNS) + BAND_COLUMNS.index("band_dims")] = value
    index = torch.arange(3, device=DEVICE)
    got = TRITON["step_m0"](rows=rows, index=index, **inputs)
    plain = _expected(rows[:, : len(COLUMNS)], index, inputs)
    for result, expected in zip(got, plain, strict=True):
        assert result[::2].isnan().all()
        _helpers().assert_same_bits(result[1], expected[1], "the sample whose row has no band")


def test_check_rows_refuses_a_band_of_other_dimensions(monkeypatch):
    from epskernels.ops.triton_backend import TRITON

    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "1")
    rows, inputs = _banded((), torch.float32, torch.float32, (3, 4, 9))
    index = torch.arange(3, device=DEVICE)
    for value, expected in (
        (1.5, r"rows: expected band_dims to be 1 or 2, got 1\.5 in row 0"),
        (2, r"x: expected shape \(B, C, H, W\) or \(B, C, F, H, W\), as row 0 corrects a band of it, got \(3, 4, 9\)"),
    ):
        rows[:, -1] = value
        with pytest.raises(RuntimeError, match=expected):
            TRITON["step"](rows=rows, index=index, **inputs)


def test_band_s_gradient_and_vmap_go_around_the_kernel():
    import epskernels

    rows, inputs = _banded(("seeds",), torch.float32, torch.float32, (3, 2, 5, 6))
    index, (x, f) = torch.arange(3, device=DEVICE), torch.randn(2, 2, 3, 2, 5, 6, device=DEVICE)

    def step(x, f, backend):
        return epskernels.step(x, f, rows, index, seeds=inputs["seeds"], backend=backend)

    mapped = torch.vmap(functools.partial(step, backend="triton"))(x, f)
    _helpers().assert_all_same_bits(mapped, [step(*pair, "reference") for pair in zip(x, f, strict=True)])

    gradients = []
    for backend in ("triton", "reference"):
        leaves = [x[0].clone().requires_grad_(), rows.clone().requires_grad_()]
        result = epskernels.step(leaves[0], f[0], leaves[1], index, seeds=inputs["seeds"], backend=backend)
        gradients.append(torch.autograd.grad((result * f[1]).sum(), leaves))
    _helpers().assert_all_same_bits(*gradients)
    assert gradients[0][1][:, -4:-1].abs().sum() > 0


def test_idle_band_passes_no_gradient_to_its_neighbours():
    """Not even what is not finite: the row leaves the band out."""
    import epskernels

    rows, inputs = _banded((), torch.float32, torch.float32, (3, 2, 5, 6))
    rows, bar = rows[1:2].repeat(3, 1), torch.randn(3, 2, 5, 6, device=DEVICE)
    bar[0, 0, 1, 1], index = float("inf"), torch.arange(3, device=DEVICE)
    gradients = []
    for given in (rows, rows[:, : len(COLUMNS)]):
        x = inputs["x"].nan_to_num(0, 0, 0).requires_grad_()
        result = epskernels.step(x, inputs["f"].nan_to_num(0, 0, 0), given, index, backend="triton")
        gradients += torch.autograd.grad(result, x, bar)
    _helpers().assert_same_bits(*gradients, "gradients by x")
    assert gradients[0].isfinite().sum() == x.numel() - 1


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not_aligned"])
def test_tiles_far_into_a_sample_with_images(aligned):
    """Where an offset has more than 32 bits: the elements of some tile, and their normals."""
    from epskernels.ops import reference, triton_backend

    height, width = (2**20 + 1, 2**15 + 4) if aligned else (2**20 + 1, 2**15 - 1)
    units, pairs, tile = -(-width // 4), 2**19 + 1, 2**32 - 77
    unit = tile * 8 + torch.arange(8)
    plane, pair, column = unit // units // pairs, unit // units % pairs, unit % units * 4
    row = pair * 2 + torch.tensor([[[0]], [[1]]])
    column = column[:, None] + torch.arange(4)
    numel = 2**50
    expected = (plane[:, None] * height + row.reshape(2, -1, 1)) * width + column
    expected += numel * ((row.reshape(2, -1, 1) >= height) | (column >= width))
    seeds = torch.tensor([9], device=DEVICE)
    launch = triton_backend._launcher(far_band_kernel, seeds.device)
    where, out = torch.zeros(64, dtype=torch.int64, device=DEVICE), torch.zeros(64, device=DEVICE)
    launch((1,), where, out, seeds, tile, numel, height, width, ALIGNED=aligned)
    assert torch.equal(where.cpu(), expected.flatten()) and expected.min() > 2**34
    e = expected.reshape(-1, 4)[:, :1] + torch.arange(4)
    words = reference.philox((e // 4 & 0xFFFFFFFF, e // 4 >> 32, 3, 1), (torch.tensor(9), torch.tensor(0)))
    normals = torch.stack((*reference.box_muller(*words[:2]), *reference.box_muller(*words[2:])), -1)
    _helpers().assert_same_bits(out.cpu(), normals.gather(-1, (e % 4)[..., None]).flatten(), "normals")


if not build.why_missing("triton"):
    import triton
    import triton.language as tl

    from epskernels.ops.triton_kernels import normals, normals_at, offsets

    @triton.jit
    def far_normal_kernel(out_ptr, seeds_ptr, start, VEC: tl.constexpr):
        start = tl.full([], start, tl.int64)
        draw, stream = tl.full([], 3, tl.uint32), tl.full([], 1, tl.uint32)
        tl.store(out_ptr + tl.arange(0, 64), normals(tl.load(seeds_ptr), draw, stream, start, 64, VEC))

    @triton.jit
    def far_band_kernel(where_ptr, out_ptr, seeds_ptr, tile, numel, height, width, ALIGNED: tl.constexpr):
        tile, draw, stream = tl.full([], tile, tl.int64), tl.full([], 3, tl.uint32), tl.full([], 1, tl.uint32)
        tl.store(where_ptr + tl.arange(0, 64), offsets(tl.arange(0, 64), tile, numel, height, width, 64, 2))
        first = offsets(tl.arange(0, 16) * 4, tile, numel, height, width, 64, 2)
        tl.store(out_ptr + tl.arange(0, 64), normals_at(tl.load(seeds_ptr), draw, stream, first, ALIGNED))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        _compile(sys.argv[2] if sys.argv[2] in AMD else int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:])
    else:
        _capture()
