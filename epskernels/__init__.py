"""Fused sampling steps for diffusion models, with Epsilon Scaling (arXiv 2308.15321): one pass over memory, the same bits on
every backend. See README.md and docs/architecture.md."""

from . import samplers, scaling, schedule
from .graphed import GraphedSampler
from .guidance import dynamic_threshold, guidance_rescale
from .ops import as_seeds, moments, normal, step, use_backend
from .sample import pfgmpp_prior, sample
from .scaling import EpsilonScaling, published
from .table import Table, concat

__version__ = "0.1.0"
__all__ = [
    "EpsilonScaling", "GraphedSampler", "Table", "as_seeds", "concat", "dynamic_threshold", "guidance_rescale", "moments",
    "normal", "pfgmpp_prior", "published", "sample", "samplers", "scaling", "schedule", "step", "use_backend",
]  # fmt: skip
