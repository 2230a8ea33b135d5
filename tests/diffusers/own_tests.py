"""diffusers' own scheduler tests, with the classes here in place of theirs: all that pass with theirs are to pass.

    python tests/diffusers/own_tests.py DIRECTORY [pytest's options]

DIRECTORY: a checkout of diffusers, of the version that is installed. With THEIRS=1 its own classes run, for comparison. Tests
that fetch models need a network; those of compatible classes need torchsde. At the end stands how many pass for each class.
"""

import collections
import os
import pathlib
import sys

import diffusers
import pytest

from epskernels.diffusers import FUSED


def main(directory, *options):
    folder = pathlib.Path(directory) / "tests" / "schedulers"
    names = [path for path in folder.glob("test_scheduler*.py") if _tested(path) or path.stem == "test_schedulers"]
    if not names:
        raise SystemExit(f"{directory}: expected a checkout of diffusers, with tests/schedulers")
    if os.environ.get("THEIRS") != "1":
        for theirs, ours in FUSED.items():
            setattr(diffusers, theirs.__name__, ours)
            setattr(diffusers.schedulers, theirs.__name__, ours)
    os.chdir(directory)
    sys.path.insert(0, ".")
    asked, passed = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={directory}"], Passed()
    status = pytest.main([*asked, *map(str, sorted(names)), *options], plugins=[passed])
    for path in sorted(names):
        print(f"{', '.join(_tested(path)) or path.stem}: {passed.of_file[path.name]} passed")
    return status


class Passed:
    """How many tests of each file passed; those of diffusers' base class, which each file imports, are left out."""

    def __init__(self):
        self.of_file = collections.Counter()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and "::SchedulerCommonTest::" not in report.nodeid:
            self.of_file[pathlib.Path(report.nodeid.split("::")[0]).name] += 1


def _tested(path):
    """The schedulers, of those that have a twin, that a file of diffusers' tests is of."""
    text = path.read_text()
    names = sorted(theirs.__name__ for theirs in FUSED)
    return [name for name in names if f"scheduler_classes = ({name},)" in text or f"scheduler_class = {name}\n" in text]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
