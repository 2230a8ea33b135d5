"""`epskernels info`: versions, compiled parts, backends, and why one is missing."""

import argparse
import importlib.metadata
import os
import pathlib
import platform

import torch

from .. import __version__, build
from .common import first_line

TEXTS = {
    "help": "versions, compiled parts, backends, and why one is missing",
    "epilog": "example, at the start of a service:\n  epskernels info --require cpu,cuda",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `epskernels info`."""
    parser.add_argument("--cmakedir", action="store_true", help="print only the folder for CMake's -Depskernels_DIR")
    parser.add_argument(
        "--require",
        type=_backends,
        default=(),
        metavar="BACKENDS",
        help="of cpu, cuda and triton, with commas between: exit status 1 where one of them cannot run, a variable "
        "EPSKERNELS_* is wrong, or EPSKERNELS_BACKEND forces another",
    )


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in build.KERNELS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(build.KERNELS)}, got {','.join(unknown)!r}")
    return names


def run(args: argparse.Namespace) -> None:
    """Prints what is installed and what is wrong with it. Works in any environment, also a wrong one."""
    if args.cmakedir:
        print(build.cmake_dir())
    else:
        _print_versions()
        _print_compiled_parts()
        _print_gpus()
        _print_backends()
        _print_environment()
    if args.require:
        build.require(*args.require)


def _print_versions() -> None:
    print(f"epskernels {__version__}, in {pathlib.Path(build.__file__).parent}")
    names = {
        "numpy": ("numpy",),
        "triton": ("triton", "pytorch-triton-rocm", "triton-rocm"),
        "diffusers": ("diffusers",),
    }
    others = ", ".join(f"{name} {_version(*distributions)}" for name, distributions in names.items())
    print(f"python {platform.python_version()}, torch {torch.__version__}, {others}")


def _version(*distributions: str) -> str:
    """Of the first that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _print_compiled_parts() -> None:
    extension = build.extension()
    if extension:
        details = ", ".join(f"{key} {value}" for key, value in extension.build_info().items())
        print(f"compiled: {extension.__file__}\n  {details}")
        print(f"cpu capability: {extension.cpu_capability()} of {', '.join(extension.cpu_capabilities())}, ", end="")
        print(f"{torch.get_num_threads()} threads")
        print(f"for programs without Python: {build.library()}, epskernels_DIR={build.cmake_dir()}")
    print(f"cuda kernel: {build.cuda_targets() or 'not compiled'}")


def _print_gpus() -> None:
    for i in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(i)
            of_nvidia = f"sm_{properties.major}{properties.minor}"
            print(f"GPU {i}: {properties.name}, {of_nvidia if torch.version.hip is None else properties.gcnArchName}")
        except RuntimeError as error:
            print(f"GPU {i}: {first_line(error)}")


def _print_backends() -> None:
    print("backends:")
    for name in build.KERNELS:
        print(f"  {name:<10} {build.why_missing(name) or 'available'}")
    print("  reference  pure PyTorch, any device: the specification")
    on_cpu, on_gpu = build.default_for("cpu"), build.default_for("cuda")
    if os.environ.get("EPSKERNELS_FALLBACK") == "error":
        on_cpu, on_gpu = (name.replace("reference", "nothing") for name in (on_cpu, on_gpu))
    of_amd = "" if torch.version.hip is None else ", which ROCm's are"
    print(f"by default: {on_cpu} for CPU tensors, {on_gpu} for CUDA tensors{of_amd}")


def _print_environment() -> None:
    variables = {"EPSKERNELS_BACKEND": "(not set)"} | dict(os.environ)
    for name in sorted(name for name in variables if name.startswith("EPSKERNELS_")):
        print(f"{name}={variables[name]}")
    for fault in build.environment_faults():
        print(f"wrong: {fault}")
