"""epskernels/spec.py: C++'s header and what Python has by hand agree with it; its polynomials are the best of their degrees."""

import inspect
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from epskernels import spec
from epskernels.ops import checks, reference, transforms

ROOT = pathlib.Path(__file__).parents[2]


def test_the_build_s_header_needs_nothing_installed():
    """As CMake runs it; without site-packages there is no torch to import."""
    command = [sys.executable, "-I", "-S", str(ROOT / "epskernels" / "spec.py")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == spec.cpp_header()


def test_the_header_has_columns_terms_and_constants():
    header = spec.cpp_header()
    assert re.search(r"struct StepRow \{\s*float (.*?);", header)[1].split(", ") == list(spec.COLUMNS)
    assert {name: int(bit) for name, bit in re.findall(r"TERM_(\w+) = (\d+)", header)} == spec.TERMS
    floats = {name: float.fromhex(value) for name, value in re.findall(r"(\w+) = (-?0x[\d.a-f]+p[+-]\d+)f", header)}
    assert {name: floats[name] for name in spec.SCALARS} == spec.SCALARS
    for name, polynomial in spec.POLYNOMIALS.items():
        assert {power: floats[f"{name}_{power}"] for power in polynomial} == polynomial
    assert all(np.float32(value) == value for value in floats.values())


def test_columns_and_terms_that_files_and_programs_hold():
    """Saved tables have their columns by number, machine code its terms: a new one comes last."""
    assert len(spec.COLUMNS) == 24 and spec.COLUMNS[:4] == ("d_x", "d_f", "clip", "g")
    assert spec.TERMS["GUIDANCE"] == 1 and spec.TERMS["THRESHOLD"] == 32768 and spec.COMMON_TERMS == 127


SIGNATURES = [checks.check_step, reference.step_reference]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures_written_by_hand_have_the_inputs_in_order(function):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters] == list(spec.INPUTS)
    assert [p.name for p in parameters if p.default is None] == list(spec.OPTIONAL)


def test_the_gradient_has_the_inputs_in_order():
    assert list(inspect.signature(transforms._Step.forward).parameters)[2:] == list(spec.INPUTS)


@pytest.mark.parametrize("op", ["step", "step_m0", "step_y", "step_out", "step_"])
def test_the_ops_have_the_inputs_in_order(op):
    arguments = [argument.name for argument in getattr(torch.ops.epskernels, op).default._schema.arguments]
    assert tuple(arguments[: len(spec.INPUTS)]) == spec.INPUTS
    assert tuple(arguments[len(spec.INPUTS) :]) == {"step_out": spec.OUTPUTS, "step_": spec.OUTPUTS[1:]}.get(op, ())


# ---- polynomials ----

# By how many units in the last place the best one's coefficient differs, where it does: experiments/fit_polynomials.py says more.
DIFFERS = {"LOG": {7: 1, 8: -4}}


@pytest.fixture
def fit_polynomials(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import fit_polynomials

    return fit_polynomials


@pytest.mark.parametrize("name", spec.POLYNOMIALS)
def test_the_fit_finds_the_polynomial_again_and_none_shorter(name, fit_polynomials):
    result = fit_polynomials.compare(name)
    assert {power: round(units) for power, units in result["units"].items() if units} == DIFFERS.get(name, {})
    assert result["best"] <= result["error"] < 2**-22
    assert result["shorter"] > 2**-20
