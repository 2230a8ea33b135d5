"""The step as one op: checks, backends, registration, gradient, and the functions that users call.

checks               what arguments must be, for the backends written in Python
reference            the specification, in eager PyTorch; reference_backend: as a backend
triton_kernels       the step in Triton; triton_backend: its launches
registration         torch.ops.epskernels.*: schemas, fake kernels, what runs where no kernel was compiled
backends             the choice of backend
gradient             the backward pass; transforms: autograd and torch.func around the ops
api                  the public functions
"""

from ..build import BACKENDS
from .api import as_seeds, moments, normal, rows_and_index, step, step_results
from .backends import use_backend
from .checks import DTYPES, fail
from .reference_backend import REFERENCE

__all__ = [
    "BACKENDS", "DTYPES", "REFERENCE", "as_seeds", "fail", "moments", "normal", "rows_and_index", "step", "step_results",
    "use_backend",
]  # fmt: skip
