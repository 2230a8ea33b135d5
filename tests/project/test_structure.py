"""The package's modules and functions are short, and keep what is private to themselves; the list of faults fits them."""

import ast

import pytest

from .. import mutants
from ..support.markdown_examples import ROOT

PACKAGE = ROOT / "epskernels"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 600, 60
# Longer functions, and why: their docstrings say it too.
LONG = {
    "ops/gradient.py::step_gradients": "it follows the reference term by term; most terms need what those before have made",
    "ops/triton_kernels.py::step_kernel": "a part of it would have some thirty arguments, of which Triton inlines each again",
}


def parsed(file):
    return ast.parse((PACKAGE / file).read_text())


def body_lines(function):
    """Without the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("file", FILES)
def test_modules_and_functions_are_short(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= LINES_OF_A_MODULE
    long = {f"{file}::{each.name}" for each in functions(parsed(file)) if body_lines(each) > LINES_OF_A_FUNCTION}
    assert long == {name for name in LONG if name.startswith(f"{file}::")}


@pytest.mark.parametrize("name", LONG)
def test_a_long_function_says_why(name):
    file, _, function = name.partition("::")
    (found,) = (each for each in functions(parsed(file)) if each.name == function)
    assert "One function" in ast.get_docstring(found)


@pytest.mark.parametrize("file", FILES)
def test_what_is_private_stays_in_its_module(file):
    """No `from .module import _name`, and no `module._name` of a module of the package."""
    tree, modules, private = parsed(file), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            private += [alias.name for alias in node.names if is_private(alias.name)]
            modules |= {alias.asname or alias.name for alias in node.names if is_module(file, node, alias.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private += [f"{node.value.id}.{node.attr}"] if is_private(node.attr) else []
    assert not private


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_module(file, node, name):
    folder = (PACKAGE / file).parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


# ---- the list of faults: one that no longer fits the sources is planted nowhere ----

LIST = mutants.read_list()


def test_every_text_stands_once_in_its_file():
    wrong = []
    for mutant in LIST:
        try:
            mutant.planted((mutants.ROOT / mutant.file).read_text())
        except ValueError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def test_every_fault_in_python_can_be_compiled():
    """A syntax error is noticed by any test, and shows nothing."""
    for mutant in LIST:
        if mutant.file.endswith(".py"):
            compile(mutant.planted((mutants.ROOT / mutant.file).read_text()), mutant.file, "exec")


def test_every_fault_has_a_name_of_its_own_and_tests_that_are_there():
    assert len({(mutant.file, mutant.name) for mutant in LIST}) == len(LIST)
    missing = {name for mutant in LIST for name in mutant.tests if not (mutants.ROOT / "tests" / name).is_file()}
    assert not missing


@pytest.mark.parametrize("text", ["a = 2", "a = 1; a = 1"], ids=["nowhere", "twice"])
def test_a_text_that_does_not_stand_once_is_refused(text):
    mutant = mutants.Mutant("file.py", "one more", "a = 1", "a = 2", ("ops/test_spec.py",), "", "", "")
    assert mutant.planted("a = 1\n") == "a = 2\n"
    with pytest.raises(ValueError, match="file.py: one more: expected once, found . times"):
        mutant.planted(text)
