"""Fused sampling steps for diffusion models, with Epsilon Scaling (arXiv 2308.15321): one pass over memory, the same bits on
every backend. See README.md and docs/architecture.md."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import corrections, diffusers, samplers, scaling, schedule, time_shift
from .build import FallbackWarning
from .corrections import Correction
from .graphed import GraphedSampler
from .guidance import dynamic_threshold, guidance_rescale
from .ops import as_seeds, moments, normal, step, use_backend
from .published_settings import published
from .sample import pfgmpp_prior, sample
from .scaling import EpsilonScaling
from .table import Table, concat

__version__ = "0.1.0"
__all__ = [
    "Correction", "EpsilonScaling", "FallbackWarning", "GraphedSampler", "Table", "as_seeds", "concat", "corrections",
    "diffusers", "dynamic_threshold", "guidance_rescale", "moments", "normal", "pfgmpp_prior", "published", "sample",
    "samplers", "scaling", "schedule", "step", "time_shift", "use_backend",
]  # fmt: skip

# Imported at first use: they are there without an import of their own, and what they need is read by those who use them. Of
# `diffusers`, which a saved pipeline must find among what is imported, that is so of its names.
_AT_FIRST_USE = ("calibrate", "exposure", "features", "images", "k_diffusion", "models", "quality")
if TYPE_CHECKING:
    from . import calibrate, exposure, features, images, k_diffusion, models, quality  # noqa: F401


def __getattr__(name: str) -> ModuleType:
    if name in _AT_FIRST_USE:
        try:
            return importlib.import_module(f"{__name__}.{name}")  # and so an attribute: this is not asked again
        except ModuleNotFoundError as error:  # hasattr and help go on without what an extra brings
            raise AttributeError(f"{__name__}.{name} needs {error.name}, which is not installed") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_AT_FIRST_USE} - {"TYPE_CHECKING", "ModuleType", "importlib"})
