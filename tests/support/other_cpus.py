"""The CPU kernel as other compilers make it, and for Arm: each a kernel of the tests (kernels.py) where its tools are installed.

CMakeLists.txt is configured for the compiler, so that its own choice of instruction sets and flags is what is tested. The kernel
runs in a process of its own, for Arm under qemu; other_cpus.cpp is both that process and what calls it from here.
"""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import filelock
import torch

from epskernels import _C, ops, spec
from epskernels.ops import registration

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
FOLDER = ROOT / "build" / "tests"
TORCH = pathlib.Path(torch.__file__).parent
LIBRARY = "epskernels_other"


class Other(typing.NamedTuple):
    """A compiler, what it compiles for, and which of the instruction sets that come of it runs."""

    build: str  # the folder's name
    compiler: tuple
    capability: str = "generic"

    @property
    def arm(self):
        return "arm" in self.build

    @property
    def folder(self):
        return FOLDER / self.build

    @property
    def command(self):
        """Starts the kernel's process."""
        return f"{'qemu-aarch64 ' if self.arm else ''}'{self.folder}/server' {self.capability}"

    def why_missing(self):
        """What this machine lacks to run it, or None."""
        tools = [self.compiler[0]] + ["aarch64-linux-gnu-ld", "qemu-aarch64"] * self.arm + ["cmake", "ninja"]
        missing = [tool for tool in tools if not find(tool)]
        if missing:
            return f"not on this machine: {', '.join(missing)} (CONTRIBUTING.md names the packages)"
        if not self.arm and self.capability not in _C.cpu_capabilities():
            return f"this processor has no {self.capability}"
        return None


CLANG_ARM = ("clang++", "--target=aarch64-linux-gnu")
OTHERS = {
    "arm_gcc": Other("arm_gcc", ("aarch64-linux-gnu-g++",)),
    "arm_clang": Other("arm_clang", CLANG_ARM),
    **{f"clang_{name}": Other("clang", ("clang++",), name) for name in ("generic", "avx2", "avx512")},
}


def find(tool):
    """In the environment that the tests run in, as setup.py looks for it, or on the PATH."""
    return shutil.which(tool, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(tool)


def run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, **options)


def torch_for_arm(other):
    """This torch's headers, beside a library for Arm with nothing in it: enough to compile and to link."""
    folder = other.folder / "torch"
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "include").unlink(missing_ok=True)
    (folder / "include").symlink_to(TORCH / "include")
    run(*other.compiler, "-shared", "-nostdlib", "-x", "c++", os.devnull, "-o", folder / "lib" / "libtorch_cpu.so")
    return folder


def configure(other):
    """The project's CMake, as on a machine with this compiler and processor."""
    import pybind11

    compiler, *target = other.compiler
    cmake = [find("cmake"), "-S", ROOT, "-B", other.folder / "cmake", "-G", "Ninja", "--log-level=WARNING",
             f"-DCMAKE_MAKE_PROGRAM={find('ninja')}", f"-DCMAKE_CXX_COMPILER={find(compiler)}",
             "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]  # fmt: skip
    torch_folder = TORCH
    if other.arm:
        torch_folder = torch_for_arm(other)
        # As on a host of this kind: Python is not looked for as on another machine.
        host = other.folder / "host.cmake"
        host.write_text("set(CMAKE_CROSSCOMPILING OFF)\n")
        cmake += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_PROJECT_INCLUDE={host}"]
    cmake += [f"-DCMAKE_CXX_COMPILER_TARGET={each.removeprefix('--target=')}" for each in target]
    run(*cmake, f"-DEPSKERNELS_TORCH_DIR={torch_folder}")


def build(other, *targets):
    run(find("cmake"), "--build", other.folder / "cmake", "--target", *targets)


def link_server(other, objects, server):
    """The process of other_cpus.cpp, with these objects of the CPU kernel."""
    include = other.folder / "cmake" / "include"
    x86 = [] if other.arm else ["-DEPSKERNELS_X86"]
    capability = other.folder / "cmake" / "CMakeFiles" / "epskernels_cpu.dir" / "csrc" / "cpu_capability.cpp.o"
    run(*other.compiler, "-std=c++20", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-DEPSKERNELS_SERVER", *x86,
        "-I", ROOT / "csrc", "-I", include, SOURCE, capability, *objects, "-o", server)  # fmt: skip


def kernel_objects(other):
    return sorted(other.folder.glob("cmake/CMakeFiles/step_cpu_*.dir/csrc/step_cpu.cpp.o"))


def is_older(target):
    read = (SOURCE, pathlib.Path(__file__), ROOT / "CMakeLists.txt", pathlib.Path(spec.__file__))
    newest = max(path.stat().st_mtime for path in (*read, *(ROOT / "csrc").iterdir()))
    return not target.exists() or target.stat().st_mtime < newest


@functools.cache
def build_server(other):
    """Compiled where a source has changed."""
    server = other.folder / "server"
    other.folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(other.folder / "lock"):  # between the processes of a test run
        if is_older(server):
            configure(other)
            kernels = ["generic"] if other.arm else ["generic", "avx2", "avx512"]
            build(
                other,
                *(f"step_cpu_{name}" for name in kernels),
                "CMakeFiles/epskernels_cpu.dir/csrc/cpu_capability.cpp.o",
            )
            link_server(other, kernel_objects(other), server)


def compile_client(target):
    (target.parent / "spec.h").write_text(spec.cpp_header())
    include = TORCH / "include"
    run("c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wl,-Bsymbolic",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DEPSKERNELS_LIBRARY={LIBRARY}", "-isystem", include,
        "-isystem", include / "torch" / "csrc" / "api" / "include", "-I", ROOT / "csrc", "-I", target.parent,
        ROOT / "csrc" / "ops_cpu.cpp", SOURCE, "-L", TORCH / "lib", "-ltorch_cpu", "-o", target)  # fmt: skip


@functools.cache
def client():
    """csrc/ops_cpu.cpp over kernels in other processes: its ops, and its C functions."""
    target = FOLDER / LIBRARY / f"lib{LIBRARY}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_suffix(".lock")):
        if is_older(target):
            compile_client(target)
    library = torch.library.Library(LIBRARY, "DEF")
    for schema in spec.SCHEMAS:
        library.define(schema)
    for name, function in ops.REFERENCE.items():  # as for the package's own ops, what no kernel takes
        library.impl(name, function, "CompositeExplicitAutograd")
    registration.register_negative(library, getattr(torch.ops, LIBRARY))
    torch.ops.load_library(target)
    return library, getattr(torch.ops, LIBRARY), ctypes.CDLL(str(target))


def use(command):
    """Calls go to the process that this command starts."""
    client()[2].use_server(os.fsencode(command))


def overload(name, op):
    """The op with this kernel: one of OTHERS."""
    build_server(OTHERS[name])
    function = getattr(client()[1], op).default

    def call(*args, **kwargs):
        use(OTHERS[name].command)
        return function(*args, **kwargs)

    return call


def normal_elements(seed, draw, stream, begin, count):
    """As _C.normal_elements, with the kernel in use."""
    out = torch.empty(count)
    words = (ctypes.c_uint64(seed), ctypes.c_uint32(draw), ctypes.c_uint32(stream), ctypes.c_int64(begin))
    assert client()[2].other_normals(*words, ctypes.c_int64(count), ctypes.c_void_p(out.data_ptr())), (
        "its process ended"
    )
    return out
