"""The code blocks of a markdown page, run as they stand and in their order; and the C++ example."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

import torch

import epskernels
from epskernels import build

ROOT = pathlib.Path(__file__).parents[2]


def blocks(page, *languages):
    """[(language, first line, code)] of the blocks in these languages; `page` is a path inside the checkout."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M)
    return [(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found if m[1] in languages]


def as_module(page):
    """The page's Python blocks as one file, each in the lines where it stands in the page."""
    lines = [""] * (ROOT / page).read_text().count("\n")
    for _, first, code in blocks(page, "python"):
        lines[first - 1 : first - 1 + code.count("\n")] = code.splitlines()
    return "\n".join(lines).rstrip() + "\n"


def environment():
    """Its tools are those of the Python that runs the tests, and its epskernels is theirs."""
    tools = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": tools, "PYTHONPATH": str(pathlib.Path(epskernels.__file__).parents[1])}


def build_cpp(folder, cmake_dir=None):
    """Build examples/cpp there; CalledProcessError, with what it said, where it does not."""
    configure = ["-S", ROOT / "examples" / "cpp", f"-DTORCH_DIR={torch.__path__[0]}"]
    configure.append(f"-Depskernels_DIR={cmake_dir or build.cmake_dir()}")
    for arguments in ([*configure, "-B", folder], ["--build", folder]):
        command = ["cmake", *map(str, arguments)]
        subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)


def run(page, folder):
    """Run a page's Python blocks in one namespace, which is returned, and its sh blocks in bash.

    All see `folder` as the current one, and the checkout's examples/ in it. A failure names the page and the line.
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "page"}
    with contextlib.chdir(folder):
        for language, line, code in blocks(page, "python", "sh"):
            if language == "python":
                exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)
                continue
            result = subprocess.run(["bash", "-ec", code], env=environment(), capture_output=True, text=True)
            assert result.returncode == 0, f"{page}, line {line}:\n{result.stdout}{result.stderr}"
    return names
