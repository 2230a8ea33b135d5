"""diffusers' own scheduler tests, with the classes here in place of theirs: all that pass with theirs are to pass.

    python tests/diffusers/own_tests.py DIRECTORY [pytest's options]

DIRECTORY: a checkout of diffusers, of the version that is installed. With THEIRS=1 its own classes run, for comparison. Tests
that fetch models need a network; those of compatible classes need torchsde.
"""

import os
import pathlib
import sys

import diffusers
import pytest

from epskernels.diffusers import FUSED


def main(directory, *options):
    folder = pathlib.Path(directory) / "tests" / "schedulers"
    names = [
        path for path in folder.glob("test_scheduler*.py") if _tests_one_of_ours(path) or path.stem == "test_schedulers"
    ]
    if not names:
        raise SystemExit(f"{directory}: expected a checkout of diffusers, with tests/schedulers")
    if os.environ.get("THEIRS") != "1":
        for theirs, ours in FUSED.items():
            setattr(diffusers, theirs.__name__, ours)
            setattr(diffusers.schedulers, theirs.__name__, ours)
    os.chdir(directory)
    sys.path.insert(0, ".")
    return pytest.main(
        ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={directory}", *map(str, sorted(names)), *options]
    )


def _tests_one_of_ours(path):
    tested = {theirs.__name__ for theirs in FUSED}
    text = path.read_text()
    return any(f"scheduler_classes = ({name},)" in text or f"scheduler_class = {name}\n" in text for name in tested)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
