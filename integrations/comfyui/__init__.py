"""epskernels in ComfyUI: samplers of one launch a step, noise by sample, and Epsilon Scaling.

ComfyUI loads this folder from its custom_nodes; epskernels is installed beside ComfyUI. README.md says how.
"""

import importlib
import importlib.util
import pathlib
import re

HOW = "in ComfyUI's Python environment, in a checkout of epskernels: pip install --no-deps ."


def _check_installation():
    """Raises ImportError, in one line, if a package is missing, hidden or too old, or ComfyUI is."""
    found = importlib.util.find_spec("epskernels")
    if found is None:
        raise ImportError(f"epskernels is not installed; {HOW}")
    here = pathlib.Path(__file__).resolve().parent
    if found.origin and pathlib.Path(found.origin).resolve().parent == here:
        raise ImportError(
            f"the folder {here} hides the package epskernels, whose name it has; rename it to epskernels-comfyui"
        )
    _check_version("torch", (2, 11), "update ComfyUI's torch")
    _check_version("epskernels", (0, 1), HOW)
    try:
        latest = importlib.import_module("comfy_api.latest")
    except ImportError:
        latest = None
    if not hasattr(latest, "ComfyExtension"):
        raise ImportError("these nodes need a ComfyUI with comfy_api.latest.ComfyExtension (V3 nodes); update ComfyUI")


def _check_version(package, needed, how):
    version = importlib.import_module(package).__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < needed:
        wanted = ".".join(str(part) for part in needed)
        raise ImportError(f"these nodes need {package} {wanted} or newer, and {version} is installed; {how}")


_check_installation()

from .nodes import comfy_entrypoint  # noqa: E402

__all__ = ["comfy_entrypoint"]
