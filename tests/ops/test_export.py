"""torch.export, AOTInductor, and C++ without Python: docs/production_export.md run as it stands, and what it claims."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import epskernels
from epskernels import build, cli, ops, samplers, schedule
from epskernels.spec import COLUMNS, SCHEMAS

from ..support import markdown_examples
from .test_step_bits import assert_same_bits, make_inputs, random_rows

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
PACKAGE = pathlib.Path(epskernels.__file__).parent
deep = pytest.mark.deep  # the page compiles two packages and a program
BATCH = torch.export.Dim("batch", max=64)


@pytest.fixture(scope="module")
def quick_inductor(tmp_path_factory):
    """No workers, and nothing taken from an earlier run."""
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def page(quick_inductor, tmp_path_factory):
    """The page has run: its names, and the folder with what it wrote."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    return markdown_examples.run("docs/production_export.md", folder), folder


def run_python(code, *arguments, **environment):
    """In a process of its own, that finds this epskernels."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# ---- torch.export ----


LOAD = """
import sys, torch, epskernels
program = torch.export.load(sys.argv[1]).module()
torch.save([program(*inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
"""


@deep
def test_an_exported_program_runs_in_another_process(page, tmp_path):
    names, folder = page
    seeds = torch.tensor([3, -1, 2**40, 0, 3])
    inputs = [(torch.randn(5, 3, 8, 8), torch.tensor(i), seeds) for i in (0, 7, 19)]
    torch.save(inputs, tmp_path / "inputs.pt")
    result = run_python(LOAD, folder / "row.pt2", tmp_path / "inputs.pt", tmp_path / "results.pt")
    assert result.returncode == 0, result.stderr
    for got, (x, index, seeds) in zip(torch.load(tmp_path / "results.pt"), inputs, strict=True):
        assert torch.equal(got, names["module"](x, index, seeds))


@deep
def test_exported_programs_hold_one_op_for_each_row(page):
    names, _ = page
    for program, rows in ((names["exported"], 1), (names["exported_loop"], 4)):
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets.count(torch.ops.epskernels.step.default) == rows
        (size,) = program.range_constraints.values()
        assert size.upper == 64  # the batch has stayed dynamic, over the whole of its range


@deep
def test_an_exported_loop_is_the_sampling_loop(page):
    names, _ = page
    few, model, seeds = names["few"], names["module"].model, torch.tensor([5, 6, 7])

    def both(x, t):
        t = t.to(torch.float32)
        return model(x, t, torch.ones_like(t)), model(x, t, torch.zeros_like(t))

    expected = epskernels.sample(both, few, seeds, (3, 8, 8))
    result = names["exported_loop"].module()(seeds)
    torch.testing.assert_close(result, expected)  # not the same bits: two calls of the model instead of one, doubled
    assert torch.equal(result, names["loop"](seeds))


class Step(torch.nn.Module):
    """Every tensor of the step is an input, rows and a row for each sample too."""

    def forward(self, x, f, rows, index, u, m1, m2, v, grad, seeds):
        inputs = {"u": u, "m1": m1, "m2": m2, "v": v, "grad": grad, "seeds": seeds}
        next_x, m0 = epskernels.step(x, f, rows, index, **inputs, return_m0=True)
        in_place, second_m0 = next_x.clone(), torch.empty_like(x)
        epskernels.step(in_place, f, rows, index, **inputs, out=in_place, m0=second_m0)
        given = epskernels.step(x, f, rows, index, **inputs | {"seeds": None}, noise=grad)
        return next_x, m0, in_place, second_m0, given


OUTPUTS = ("x'", "m0", "x' in place", "m0 of the step in place", "x' with noise given")


NAMES = ("u", "m1", "m2", "v", "grad", "seeds")


def step_inputs(batch, row_count, seed):
    inputs = make_inputs((batch, 3, 35), NAMES, seed, torch.float16, torch.float32)
    rows = random_rows(row_count, NAMES, seed, idle=0)
    index = torch.arange(batch) % row_count
    return (inputs["x"], inputs["f"], rows, index, *(inputs[key] for key in NAMES))


def dynamic_shapes():
    return tuple({0: torch.export.Dim("R") if i == 2 else BATCH} for i in range(10))


@pytest.fixture(scope="module")
def exported_step():
    return torch.export.export(Step(), step_inputs(4, 3, 1), dynamic_shapes=dynamic_shapes())


def assert_step(program, batch, row_count):
    inputs = step_inputs(batch, row_count, batch)
    for got, wanted, what in zip(program(*inputs), Step()(*inputs), OUTPUTS, strict=True):
        assert_same_bits(got, wanted, f"{what}, batch {batch}")


def test_rows_may_be_an_input_of_any_length(exported_step):
    """One program for every table, each sample at its own row."""
    program = exported_step.module()
    for batch, row_count in ((4, 3), (9, 12), (2, 5)):
        assert_step(program, batch, row_count)


def test_the_choice_of_backend_stays_outside():
    class Row(torch.nn.Module):
        def forward(self, x, rows, index):
            return epskernels.step(x, x, rows, index)

    inputs = (torch.randn(2, 3), samplers.ddim(schedule.linear(), 3).rows, torch.tensor(1))
    with epskernels.use_backend("reference"):
        program = torch.export.export(Row(), inputs)
    assert "torch.ops.epskernels.step.default" in program.graph_module.code


# ---- AOTInductor ----


def packaged(program, folder):
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
    return torch._inductor.aoti_load_package(path)


class Normal(torch.nn.Module):
    def forward(self, seeds):
        return epskernels.normal(seeds, (3, 35), dtype=torch.float16, draw=7)


def packaged_normal(seeds, folder):
    return packaged(torch.export.export(Normal(), (seeds,), dynamic_shapes=({0: BATCH},)), folder)


def torch_2_11(what):
    """What that version's AOTInductor gets wrong for every op, and the next known one does not."""
    return pytest.mark.xfail(torch.__version__.startswith("2.11."), reason=what, strict=True)


misread = torch_2_11("it hands an op the number of another dtype")


@deep
@misread
def test_a_packaged_normal_has_the_eager_bits(quick_inductor, tmp_path):
    package = packaged_normal(torch.arange(4), tmp_path)
    for seeds in (torch.arange(4), torch.arange(-3, 6)):
        assert_same_bits(package(seeds), Normal()(seeds), "z")


@deep
def test_a_packaged_step_has_the_eager_bits(exported_step, quick_inductor, tmp_path):
    """Optional inputs, two outputs, the in-place form, noise: through AOTInductor's calls of custom ops."""
    package = packaged(exported_step, tmp_path)
    for batch, row_count in ((4, 3), (9, 12), (1, 1)):
        assert_step(package, batch, row_count)


@deep
def test_a_package_takes_another_table(page):
    """As exported with that table."""
    names, folder = page
    other, x, seeds = names["other"], torch.randn(3, 3, 8, 8), torch.arange(3)
    program = torch.export.load(folder / "row.pt2")
    module = program.module()
    module.rows.copy_(other.rows)
    torch.testing.assert_close(names["rescaled"](x, other.row_index[3], seeds), module(x, other.row_index[3], seeds))


@deep
@torch_2_11("it prints an op's error and goes on without the result")
def test_errors_from_within_a_package_are_the_step_s(page):
    names, _ = page
    x = torch.randn(3, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"epskernels: seeds: expected shape \(3,\), got \(2,\)"):
        names["package"](x, torch.tensor(1), torch.arange(2))


LATER = """
import sys, torch
schema, exported, packaged = sys.argv[1:]
names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
def step(*given):
    print([name for name, value in zip(names, given) if value is not None])
    return given[0]
library = torch.library.Library("epskernels", "DEF")
library.define(schema)
library.impl("step", step, "CPU")
inputs = torch.randn(3, 3, 8, 8), torch.tensor(1), torch.arange(3)
torch.export.load(exported).module()(*inputs)
torch._inductor.aoti_load_package(packaged)(*inputs)
"""


@deep
def test_programs_and_packages_outlive_an_added_argument(page):
    """A later version of the schema, by the rules in spec.py: with optional arguments after those that there are."""
    later = SCHEMAS[0].replace(") -> Tensor", ", Tensor? added=None, *, Tensor? named=None) -> Tensor")
    result = run_python(LATER, later, page[1] / "row.pt2", page[1] / "row_aoti.pt2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["['x', 'f', 'rows', 'index', 'u', 'seeds']"] * 2


CHECKED = """
import sys, torch, epskernels
package = torch._inductor.aoti_load_package(sys.argv[1])
good = torch.randn(3, 3, 8, 8), torch.tensor(1), torch.arange(3)
package(*good)
for x in (good[0].half(), good[0].mT, torch.randn(3, 3, 9, 8), torch.randn(65, 3, 8, 8)):
    try:
        package(x, torch.tensor(1), torch.arange(len(x)))
    except RuntimeError as error:
        print("refused:", str(error).splitlines()[0])
"""


@deep
@torch_2_11("it prints what is wrong, and its exception does not say")
def test_a_package_checks_its_inputs_where_asked(page):
    result = run_python(CHECKED, page[1] / "row_aoti.pt2", AOTI_RUNTIME_CHECK_INPUTS="1")
    assert result.returncode == 0, result.stderr
    refused = [line for line in result.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 4, result.stdout
    for line, word in zip(refused, ("dtype", "stride", "dim value", "dim value"), strict=True):
        assert word in line


# ---- C++ ----


def sampler(page, *arguments, **environment):
    """The program, with no other environment."""
    command = [page[1] / "build" / "sampler", *arguments]
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)


@deep
def test_the_program_has_python_s_bits_without_python(page, tmp_path):
    """And the dynamic linker's log shows all that it loads."""
    names, folder = page
    seeds, table = torch.tensor([-7, 2**63 - 1, 4]), names["table"]  # neither the page's batch nor the export's
    job = {"rows": table.rows, "initial_sigma": table.initial_sigma, "seeds": seeds, "shape": [3, 8, 8]}
    torch.save(job, tmp_path / "job.pt")
    result = sampler(page, tmp_path / "job.pt", tmp_path / "samples.pt", folder / "row_aoti.pt2", LD_DEBUG="files")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "libepskernels_cpu.so" in result.stderr and "wrapper.so" in result.stderr
    assert "libpython" not in result.stderr and "libtorch_python" not in result.stderr

    x = table.initial_sigma * epskernels.normal(seeds, (3, 8, 8))
    for index in table.row_index:
        x = names["package"](x, index, seeds)
    assert torch.equal(torch.load(tmp_path / "samples.pt"), x)


@deep
def test_the_program_s_errors_are_the_step_s(page, tmp_path):
    """A table with guidance, and no unconditional output."""
    result = sampler(page, page[1] / "job.pt", tmp_path / "samples.pt")
    assert result.returncode == 1
    assert result.stderr.strip() == "sampler: epskernels: u: missing, and row 0 needs it (g is not 1)"
    assert not (tmp_path / "samples.pt").exists()


def test_cmake_names_an_installation_that_was_not_compiled(tmp_path):
    (tmp_path / "epskernels").mkdir()
    (tmp_path / "epskernels" / "cmake").symlink_to(PACKAGE / "cmake")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        markdown_examples.build_cpp(tmp_path / "build", tmp_path / "epskernels" / "cmake")
    assert "this installation of epskernels was not compiled" in " ".join(failed.value.stderr.split())


# ---- the schemas, in Python and without it ----

ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    print(getattr(torch.ops.epskernels, name).default._schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("epskernels::" + name, "CPU"), name
assert not torch._C._dispatch_find_dangling_impls(), torch._C._dispatch_find_dangling_impls()
x = torch.ones(2, 3)
rows = torch.zeros(1, {width})
rows[0, {g}], rows[0, {c_x}] = 1, 2
assert torch.equal(torch.ops.epskernels.step(x, x, rows, torch.tensor(0)), 2 * x)
try:
    import epskernels
except ImportError as error:
    print(error)
"""


def test_the_library_defines_the_schemas_where_python_has_not():
    names = sorted(ops.REFERENCE)
    code = ALONE.format(width=len(COLUMNS), g=COLUMNS.index("g"), c_x=COLUMNS.index("c_x"))
    result = run_python(code, build.library(), *names)
    assert result.returncode == 0, result.stderr
    *schemas, refused = result.stdout.splitlines()
    assert schemas == [str(getattr(torch.ops.epskernels, name).default._schema) for name in names]
    assert "libepskernels.so" in refused and "import epskernels before it is loaded" in refused


def test_the_library_leaves_python_s_definitions():
    torch.ops.load_library(build.library())
    assert not torch._C._dispatch_find_dangling_impls()
    for schema in SCHEMAS:
        op = getattr(torch.ops.epskernels, schema.partition("(")[0]).default
        assert str(op._schema) == str(torch._C.parse_schema(f"epskernels::{schema}"))
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order} <= set(op.tags)
    x = torch.randn(2, 3)
    rows = samplers.ddim(schedule.linear(), 3).rows
    torch.library.opcheck(torch.ops.epskernels.step, (x, x, rows, torch.tensor(0)))


def test_paths_for_a_c_plus_plus_build(capsys, monkeypatch, tmp_path):
    assert cli.main(["info", "--cmakedir"]) == 0
    folder = pathlib.Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder == build.cmake_dir() and (folder / "epskernels-config.cmake").exists()
    assert build.library() == PACKAGE / "libepskernels.so"
    monkeypatch.setattr(build, "_LIBRARY", tmp_path / "libepskernels.so")
    assert cli.main(["info", "--cmakedir"]) == 1
    assert f"{tmp_path}/libepskernels.so is missing" in capsys.readouterr().err


def test_no_number_is_keyword_only_with_a_default():
    """AOTInductor's calls would fail: spec.py says why."""
    for schema in SCHEMAS:
        for argument in torch._C.parse_schema(f"epskernels::{schema}").arguments:
            number = any(word in str(argument.type) for word in ("int", "float", "bool", "number"))
            assert not (number and argument.kwarg_only and argument.has_default_value()), f"{schema}: {argument.name}"
