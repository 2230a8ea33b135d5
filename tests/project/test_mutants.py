"""The list of faults fits the sources as they are: one that no longer does is planted nowhere."""

import pytest

from .. import mutants

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
