"""Builds csrc with CMake and Ninja. EPSKERNELS_BUILD=0 leaves it out, 1 makes a missing tool an error; by default a missing
tool leaves it out and says so: the package then runs on its pure PyTorch reference, and its wheel is py3-none-any.
EPSKERNELS_CUDA is the same for the CUDA kernel, which needs nvcc but no GPU; by default it is left out beside a torch without
CUDA too, where it could not run and would take minutes. EPSKERNELS_CUDA_ARCHITECTURES says what to compile it for, as CMake
spells it."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
# CMake and Ninja of the environment that builds come before the system's.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
# Why the compiled kernels, or that for CUDA alone, are missing: epskernels/build.py reads them.
NOTE, CUDA_NOTE = "not_built.txt", "not_built_cuda.txt"


def find_torch():
    """Folder of the installed torch, also from inside pip's isolated build; never imported."""
    places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for place in places:
        if (pathlib.Path(place) / "torch" / "version.py").exists():
            return pathlib.Path(place) / "torch"
    return None


def torch_version(folder):
    return re.search(r"^__version__ = '(.*)'", (folder / "version.py").read_text(), re.M).group(1)


def torch_has_cuda(folder):
    return re.search(r"^cuda\b.*= None$", (folder / "version.py").read_text(), re.M) is None


def missing_tools():
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        missing.append("a C++ compiler")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any((pathlib.Path(folder) / "Python.h").exists() for folder in headers):
        missing.append(f"Python.h of Python {sysconfig.get_python_version()} (package python3-dev or python3-devel)")
    folder = find_torch()
    if folder is None:
        missing.append(
            "torch>=2.11 (its headers are needed: install it first; with uv and build, --no-build-isolation too)"
        )
    elif tuple(int(part) for part in torch_version(folder).split(".")[:2]) < (2, 11):
        missing.append(f"torch>=2.11 (found {torch_version(folder)})")
    return missing


def find_nvcc():
    places = [os.environ.get("CUDACXX"), "nvcc"]
    places += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def build_folder():
    """Where CMake works: one for each processor, Python and compiler that CXX names, since CMake keeps the first that it sees."""
    named = re.sub(r"[^\w.+]+", "-", os.environ.get("CXX", ""))
    parts = ["cmake", sysconfig.get_platform(), sys.implementation.cache_tag, named]
    return ROOT / "build" / "-".join(part for part in parts if part)


def cuda_architectures(nvcc):
    """Machine code for each generation of data-centre GPUs that this nvcc knows, and PTX of the newest for all later ones."""
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = tuple(int(part) for part in re.search(r"release (\d+)\.(\d+)", said).groups())
    return "80-real;90-real;100" if version >= (12, 8) else "80-real;90"


def reason_against(switch, missing, useless=None):
    """Why a part is not built, or None; SystemExit where the switch insists on it. useless: why it would be of no use."""
    wanted = os.environ.get(switch) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{switch}: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return f"{switch}=0 was set when it was installed"
    if missing and wanted == "1":
        raise SystemExit(f"{switch}=1, but the build lacked {', '.join(missing)}")
    if missing:
        return f"the build lacked {', '.join(missing)}"
    return useless if wanted == "auto" else None


class CMakeBuild(build_ext):
    def run(self):
        package = self.package_path()
        for stale in [*package.glob("*built*.txt"), *package.glob("*.so")]:  # of an earlier build into the same folder
            stale.unlink(missing_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        if reason := reason_against("EPSKERNELS_BUILD", missing_tools()):
            self.leave_out(NOTE, reason)
            return
        nvcc, torch = find_nvcc(), find_torch()
        useless = f"torch {torch_version(torch)} has no CUDA to run it; EPSKERNELS_CUDA=1 compiles it all the same"
        useless = None if torch_has_cuda(torch) else useless
        reason = reason_against("EPSKERNELS_CUDA", [] if nvcc else ["nvcc"], useless)
        if not reason:
            try:
                self.build_with_cmake(nvcc)
                return
            except subprocess.CalledProcessError:
                if os.environ.get("EPSKERNELS_CUDA") == "1":
                    raise SystemExit(
                        "EPSKERNELS_CUDA=1, but its compilation failed, as said above; 0 leaves it out"
                    ) from None
                reason = "its compilation failed; EPSKERNELS_CUDA=1 makes that an error"
        self.build_with_cmake(None)
        self.leave_out(CUDA_NOTE, reason)

    def leave_out(self, note, reason):
        print(f"epskernels: left out ({note}): {reason}", file=sys.stderr)
        (self.package_path() / note).write_text(reason + "\n")

    def package_path(self):
        in_place = self.editable_mode or self.inplace
        return (ROOT if in_place else pathlib.Path(self.build_lib).resolve()) / "epskernels"

    def build_with_cmake(self, nvcc):
        import pybind11

        build_dir = build_folder()
        torch_dir = find_torch()
        configure = [
            "cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEPSKERNELS_VERSION={self.distribution.get_version()}",
            f"-DEPSKERNELS_TORCH_DIR={torch_dir}",
            f"-DEPSKERNELS_TORCH_VERSION={torch_version(torch_dir)}",
            "-DEPSKERNELS_CUDA_ARCHITECTURES=",
        ]  # fmt: skip
        if nvcc:
            architectures = os.environ.get("EPSKERNELS_CUDA_ARCHITECTURES") or cuda_architectures(nvcc)
            configure[-1] += architectures
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
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


class Wheel(bdist_wheel):
    def get_tag(self):
        """Without kernels it is for any machine, and no one takes it for one that has them."""
        without = (self.get_finalized_command("build_ext").package_path() / NOTE).exists()
        return ("py3", "none", "any") if without else super().get_tag()


setup(
    ext_modules=[Extension("epskernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
