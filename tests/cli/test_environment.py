"""EPSKERNELS_* variables, and the package's logger: what a program finds that imports it. In processes of their own."""

import collections
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import epskernels
from epskernels import _C, build

STEP = """
import epskernels, torch
x, row = torch.ones(2, 3, 4, 4), torch.zeros(1, 24)
row[0, 3] = row[0, 4] = 1
"""


# Imports torch, which takes most of a process's second, and forks for each program.
SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    out, err, environment, code = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate((os.devnull, out, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(environment)
        status = 1
        try:
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Done = collections.namedtuple("Done", "stdout stderr")


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """Runs code in a process that has imported nothing of this package: what it wrote, (stdout, stderr)."""

    def run(code, **variables):
        without = {name: value for name, value in os.environ.items() if not name.startswith("EPSKERNELS_")}
        paths = tmp_path / "out", tmp_path / "err"
        for path in paths:
            path.write_text("")
        server.stdin.write(json.dumps([*map(str, paths), without | variables, code]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        done = Done(*(path.read_text() for path in paths))
        assert status == "0", done.stderr
        return done

    return run


# ---- variables ----

EXPECTED_BY_NAME = {
    "EPSKERNELS_BACKEND": build.BACKENDS,
    "EPSKERNELS_FALLBACK": ("warn", "error"),
    "EPSKERNELS_LOG": ("debug", "0", "1"),
    "EPSKERNELS_CHECK_ROWS": ("0", "1"),
    "EPSKERNELS_CPU_CAPABILITY": tuple(_C.cpu_capabilities()),
}
NAMES, EXPECTED = tuple(EXPECTED_BY_NAME), tuple(EXPECTED_BY_NAME.values())
CALLS = {
    "step": "epskernels.step(x, x, row, 0)",
    "step on a backend": "epskernels.step(x, x, row, 0, backend='reference')",
    "moments": "epskernels.moments(x)",
    "normal": "epskernels.normal([1], (3,))",
    "sample": "epskernels.sample(lambda x, t: x, epskernels.samplers.ddim(epskernels.schedule.linear(), 2), [1], (3,))",
    "a scheduler's step": "epskernels.ops.step_results(1, plain=True)(x, x, row, torch.tensor(0))",
    "in a context": "exec('with epskernels.use_backend(\"cpu\"):\\n    epskernels.moments(x)')",
}
TRIED = STEP + "from epskernels import build\nfaults = build.environment_faults()\nprint(*faults, sep='\\n')\n"
for call in CALLS.values():
    TRIED += f"try:\n    {call}\n    print('ran')\nexcept RuntimeError as error:\n    print(error)\n"


@pytest.mark.parametrize("name, expected", [*zip(NAMES, EXPECTED, strict=True)], ids=NAMES)
@pytest.mark.parametrize(
    "value", ["nonsense", *(pytest.param(value, marks=pytest.mark.deep) for value in ("2", "Cpu,cuda"))]
)
def test_nonsense_lets_the_package_in_and_no_call_run(run, name, expected, value):
    fault = f"{name}: expected one of {expected}, got {value!r}"
    done = run(TRIED, **{name: value})
    assert done.stdout.splitlines() == [fault, *[f"epskernels: {fault}"] * len(CALLS)]
    assert done.stderr == ""


def test_all_faults_are_told_at_once(run):
    done = run(TRIED, **dict.fromkeys(NAMES, "nonsense"))
    faults = [f"{name}: expected one of {values}, got 'nonsense'" for name, values in zip(NAMES, EXPECTED, strict=True)]
    assert done.stdout.splitlines() == [*faults, *["epskernels: " + "; ".join(faults)] * len(CALLS)]


@pytest.mark.skipif(not build.why_missing("cuda"), reason="the CUDA kernel runs here")
def test_a_backend_that_is_missing(run):
    done = run(TRIED, EPSKERNELS_BACKEND="cuda")
    fault = f"EPSKERNELS_BACKEND: backend 'cuda' is missing: {build.why_missing('cuda')}"
    assert done.stdout.splitlines() == [fault, *[f"epskernels: {fault}"] * len(CALLS)]


def test_an_empty_variable_is_none(run):
    done = run(TRIED, **dict.fromkeys(NAMES, ""))
    assert done.stdout.splitlines() == ["", *["ran"] * len(CALLS)] and done.stderr == ""
    assert run(STEP + "print(epskernels._C.cpu_capability())", EPSKERNELS_CPU_CAPABILITY="").stdout == (
        run(STEP + "print(epskernels._C.cpu_capability())").stdout
    )


@pytest.mark.parametrize("name, value", [*zip(NAMES, ("reference", "error", "debug", "1", "generic"), strict=True)])
def test_what_is_expected_runs(run, name, value):
    assert run(TRIED, **{name: value}).stdout.splitlines() == ["", *["ran"] * len(CALLS)]


def test_this_process_has_no_faults():
    assert build.environment_faults() == []


# ---- kernels that are missing ----

# As in an installation that was built without a compiler. Without the module nothing registers the kernels.
WITHOUT = "import sys\nsys.modules['epskernels._C'] = None\n" + STEP
# Every way to a kernel; the compiled graph is called twice: what a first call has found must not let the second one by.
COMPILED = "torch.compile(lambda x: epskernels.step(x, x, row, 0), fullgraph=True, backend='aot_eager')"
UNASKED = {
    "step": "epskernels.step(x, x, row, 0)",
    "step, again": "epskernels.step(x, x, row, 0)",
    "into a tensor": "epskernels.step(x, x, row, 0, out=out)",
    "normal": "epskernels.normal([1], (3,))",
    "moments": "epskernels.moments(x)",
    "the op": "torch.ops.epskernels.step(x, x, row, torch.tensor(0))",
    "the op in place": "torch.ops.epskernels.step_(out, x, row, torch.tensor(0))",
    "a scheduler's step": "epskernels.ops.step_results(1, plain=True)(x, x, row, torch.tensor(0))",
    "a gradient": "epskernels.step(x.clone().requires_grad_(), x, row, 0)",
    "compiled": "graph(x)",
    "compiled, again": "graph(x)",
    "exported": "torch.export.export(Step(), (x,)).module()(x)",
    "auto": "epskernels.step(x, x, row, 0, backend='auto')",
}
ASKED = {
    "the argument": "epskernels.step(x, x, row, 0, backend='reference')",
    "the context": "exec('with epskernels.use_backend(\"reference\"):\\n    epskernels.step(x, x, row, 0)')",
}
TRY_ALL = f"""
class Step(torch.nn.Module):
    def forward(self, x):
        return epskernels.step(x, x, row, 0)

out, graph = torch.full_like(x, 7), {COMPILED}
for call in {[*UNASKED.values(), *ASKED.values()]}:
    try:
        exec(call)
        print("ran")
    except Exception as error:
        print(type(error).__name__, error)
print(out.unique().tolist())
"""
REFUSED = (
    "RuntimeError epskernels: EPSKERNELS_FALLBACK=error, and only the pure PyTorch reference could run on cpu tensors: "
)
RAN = ["ran"] * len(ASKED)


def test_a_missing_kernel_is_told_once_by_default(run):
    done = run(WITHOUT + TRY_ALL)
    assert done.stdout.splitlines() == ["ran"] * len(UNASKED) + RAN + ["[1.0]"]
    assert done.stderr.count("FallbackWarning: epskernels runs its pure PyTorch reference, slower, on cpu tensors") == 1


def test_a_missing_kernel_is_an_error_where_the_environment_says_so(run):
    """For every way to it; a reference that is asked for runs."""
    done = run(WITHOUT + TRY_ALL, EPSKERNELS_FALLBACK="error")
    *said, out = done.stdout.splitlines()
    assert [line.startswith(REFUSED + "the compiled kernels are missing (") for line in said[: len(UNASKED)]] == (
        [True] * len(UNASKED)
    ), done.stdout
    assert said[len(UNASKED) :] == RAN and out == "[7.0]" and "FallbackWarning" not in done.stderr


def test_a_bad_argument_is_told_before_a_missing_kernel(run):
    code = "try:\n    epskernels.step(x, x[:1], row, 0)\nexcept RuntimeError as error:\n    print(error)\n"
    done = run(WITHOUT + code)
    assert done.stdout.startswith("epskernels: f: expected shape (2, 3, 4, 4)") and done.stderr == ""
    assert run(WITHOUT + code, EPSKERNELS_FALLBACK="error") == done


def test_a_missing_kernel_is_an_error_where_a_filter_says_so(run):
    """At each call, and before anything is written."""
    code = "import warnings\nwarnings.simplefilter('error', epskernels.FallbackWarning)\n"
    *said, out = run(WITHOUT + code + TRY_ALL).stdout.splitlines()
    start = "FallbackWarning epskernels runs its pure PyTorch reference"
    assert [line.startswith(start) for line in said[: len(UNASKED)]] == [True] * len(UNASKED), said
    assert said[len(UNASKED) :] == RAN and out == "[7.0]"


def test_where_the_process_asks_for_the_reference_the_ops_have_it_too(run):
    done = run(WITHOUT + TRY_ALL, EPSKERNELS_FALLBACK="error", EPSKERNELS_BACKEND="reference")
    assert done.stdout.splitlines() == ["ran"] * len(UNASKED) + RAN + ["[1.0]"]


@pytest.mark.parametrize(
    "variables, fault",
    [
        ({"EPSKERNELS_BACKEND": "cpu"}, "EPSKERNELS_BACKEND: backend 'cpu' is missing: the compiled kernels are missing ("),
        ({"EPSKERNELS_FALLBACK": "eror"}, "EPSKERNELS_FALLBACK: expected one of ('warn', 'error'), got 'eror'"),
    ],
    ids=["a backend that is missing", "a typing error"],
)  # fmt: skip
def test_where_a_kernel_is_missing_the_ops_heed_a_wrong_variable(run, variables, fault):
    *said, out = run(WITHOUT + TRY_ALL, **variables).stdout.splitlines()
    told = [line for line in said if line.startswith(f"RuntimeError epskernels: {fault}")]
    assert len(told) == len(UNASKED) + len(ASKED) - 2, (
        said
    )  # the compiled calls raise Dynamo's error, which tells it too
    assert "ran" not in said and out == "[7.0]"


def test_other_kinds_of_devices_are_refused_too(run):
    """No kernel is made for them, and this torch has no such tensors: what their calls would ask is asked here."""
    code = STEP + "from epskernels.ops import registration\n"
    code += "try:\n    registration._functions_for('mps')\nexcept RuntimeError as error:\n    print(error)\n"
    said = run(code, EPSKERNELS_FALLBACK="error").stdout
    assert "could run on mps tensors: this version has no kernel for it\n" in said
    assert run(code).stdout == ""


@pytest.mark.parametrize(
    "names, variables, expected",
    [
        ((), {}, None),
        (("cpu",), {"EPSKERNELS_BACKEND": "auto"}, None),
        (("cpu",), {"EPSKERNELS_BACKEND": "cpu", "EPSKERNELS_FALLBACK": "error"}, None),
        (("cpu",), {"EPSKERNELS_BACKEND": "reference"},
         "EPSKERNELS_BACKEND: expected one of ('auto', 'cpu'), got 'reference'"),
        (("cpu",), {"EPSKERNELS_LOG": "loud"}, "EPSKERNELS_LOG: expected one of ('debug', '0', '1'), got 'loud'"),
    ],
)  # fmt: skip
def test_require(names, variables, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        build.require(*names)
    else:
        with pytest.raises(RuntimeError, match=re.escape(f"epskernels: {expected}") + "$"):
            build.require(*names)


def test_require_tells_all_that_is_missing(monkeypatch):
    monkeypatch.setitem(build._why, "cpu", "not built")
    monkeypatch.setitem(build._why, "cuda", "no nvcc")
    with pytest.raises(RuntimeError, match="^epskernels: cpu: not built; cuda: no nvcc"):
        build.require("cpu", "cuda")
    with pytest.raises(RuntimeError, match="^epskernels: cpu: not built$"):
        build.require()


@pytest.mark.parametrize("name", ["gpu", "reference", "auto", "cpu,cuda"])
def test_a_backend_that_no_installation_lacks_or_has_is_refused(name):
    expected = re.escape(f"backend: expected one of {build.KERNELS}, got {name!r}")
    for ask in (build.why_missing, build.require):
        with pytest.raises(ValueError, match=expected):
            ask(name)


def test_the_log_names_the_reference_from_the_first_call_on(run):
    done = run(WITHOUT + "epskernels.step(x, x, row, 0)\n", EPSKERNELS_LOG="1")
    assert "step on cpu runs on the reference, by default\n" in done.stderr


# ---- the logger ----

LINE = "step on cpu runs on the CPU kernel"
LOGGED = STEP + "import logging\nepskernels.step(x, x, row, 0)\n"


def test_an_import_leaves_logging_alone(run):
    code = """
import logging
epskernels.step(x, x, row, 0)
root, own = logging.getLogger(), logging.getLogger("epskernels")
print(root.handlers, own.handlers, root.level, own.level, own.propagate)
logging.basicConfig(level=logging.INFO)  # does nothing where the root logger has a handler already
print(len(root.handlers), root.level)
"""
    done = run(STEP + code)
    assert done.stdout.splitlines() == ["[] [] 30 0 True", "1 20"] and done.stderr == ""


def test_debug_leaves_the_root_logger_alone(run):
    done = run(LOGGED + "print(logging.getLogger().handlers, logging.getLogger('another').isEnabledFor(10))",
               EPSKERNELS_LOG="debug")  # fmt: skip
    assert done.stdout == "[] False\n"
    assert done.stderr.count(LINE) == 1 and done.stderr.count("DEBUG:epskernels:cpu kernel: loaded\n") == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_no_line_comes_twice(run, when, level):
    """A program's own handlers take the lines if they take DEBUG; else the package's does."""
    config = "import logging\nlogging.basicConfig(format='ROOT %(message)s')\n"
    config += f"logging.root.handlers[0].setLevel('{level}')\n"
    step = "epskernels.step(x, x, row, 0)\n"
    done = run((config + STEP if when == "before" else STEP + config) + step, EPSKERNELS_LOG="debug")
    assert done.stderr.count(LINE) == 1
    assert ("ROOT " + LINE in done.stderr) == (level == "DEBUG")


def test_the_level_is_asked_for_at_run_time(caplog):
    x, rows = epskernels.normal([1], (3, 4)), epskernels.samplers.ddim(epskernels.schedule.linear(), 4).rows

    def said():
        caplog.clear()
        epskernels.step(x, x, rows, 0)
        epskernels.ops.step_results(1, plain=True)(x, x, rows, torch.tensor(0))
        epskernels.moments(x)
        epskernels.normal([1], (3,))
        return [record.message.split()[0] for record in caplog.records]

    assert said() == []
    for logger in ("epskernels", None):  # its own level, or the one that it inherits
        with caplog.at_level("DEBUG", logger):
            assert said() == ["step", "step", "moments", "normal"]
        assert said() == []


def test_a_warning_is_seen_where_no_logging_is_set_up(run):
    """So the logger has no NullHandler, which would end it there."""
    assert run(STEP + "epskernels.ops.log.log.warning('seen')").stderr == "seen\n"
