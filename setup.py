"""Builds csrc with CMake and Ninja. EPSKERNELS_BUILD=0 leaves it out, 1 makes a missing tool an error; by default a missing
tool leaves it out and says so: the package then runs on its pure PyTorch reference."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
NOTE = "not_built.txt"  # why the compiled kernels are missing: epskernels/build.py reads it


def find_torch():
    """Folder of the installed torch, also from inside pip's isolated build; never imported."""
    places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for place in places:
        if (pathlib.Path(place) / "torch" / "version.py").exists():
            return pathlib.Path(place) / "torch"
    return None


def torch_version(folder):
    return re.search(r"^__version__ = '(.*)'", (folder / "version.py").read_text(), re.M).group(1)


def missing_tools():
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        missing.append("a C++ compiler")
    folder = find_torch()
    if folder is None:
        missing.append("torch>=2.11 (install it first: its headers are needed)")
    elif tuple(int(part) for part in torch_version(folder).split(".")[:2]) < (2, 11):
        missing.append(f"torch>=2.11 (found {torch_version(folder)})")
    return missing


class CMakeBuild(build_ext):
    def run(self):
        package, note = self.package_path(), self.package_path() / NOTE
        for stale in [note, *package.glob("*.so")]:  # of an earlier build into the same folder
            stale.unlink(missing_ok=True)
        wanted = os.environ.get("EPSKERNELS_BUILD", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"EPSKERNELS_BUILD: expected auto, 0 or 1, got {wanted!r}")
        reason = "EPSKERNELS_BUILD=0 was set when it was installed" if wanted == "0" else ""
        if not reason and (missing := missing_tools()):
            reason = "the build lacked " + ", ".join(missing)
            if wanted == "1":
                raise SystemExit(f"EPSKERNELS_BUILD=1, but {reason}")
        if reason:
            print(f"epskernels: compiled kernels left out: {reason}", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n")
            return
        self.build_with_cmake()

    def package_path(self):
        return ROOT / "epskernels" if self.editable_mode else pathlib.Path(self.build_lib).resolve() / "epskernels"

    def build_with_cmake(self):
        import pybind11

        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        torch_dir = find_torch()
        configure = [
            "cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEPSKERNELS_VERSION={self.distribution.get_version()}",
            f"-DEPSKERNELS_TORCH_DIR={torch_dir}",
            f"-DEPSKERNELS_TORCH_VERSION={torch_version(torch_dir)}",
        ]  # fmt: skip
        subprocess.run([str(part) for part in configure], check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(["cmake", "--install", str(build_dir), "--prefix", str(self.package_path())], check=True)

    # The files are in place already: nothing for setuptools to copy or to name.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def copy_extensions_to_source(self):
        pass


setup(ext_modules=[Extension("epskernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
