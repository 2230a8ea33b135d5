"""Names of the types that several modules use."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, SupportsIndex, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Array", "Backend", "Device", "FilePath", "Floats", "HasSample", "Index", "ModelCall", "ModelOutput", "Outputs", "SeedsLike",
    "Shape", "Steps",
]  # fmt: skip

Array = NDArray[np.float64]
Backend = Literal["auto", "cpu", "cuda", "triton", "reference"]
Device = str | torch.device
Floats = TypeVar("Floats", Array, Tensor)  # float64, either of the two
Index = int | np.integer | Tensor  # which row of a table
FilePath = str | os.PathLike[str]
SeedsLike = Tensor | Iterable[SupportsIndex]  # what as_seeds takes
Shape = tuple[int, ...] | list[int]  # of one sample
Steps = int | np.integer | str | Sequence[int] | NDArray[np.integer]  # what DiscreteSchedule.timesteps takes


class HasSample(Protocol):
    """What diffusers' networks return."""

    @property
    def sample(self) -> Tensor:
        """f."""
        ...


# f, or f and u: what a model returns, and a model as the sampling loops call it, with x and t.
ModelOutput = Tensor | HasSample | tuple[Tensor | HasSample, Tensor | HasSample | None]
ModelCall = Callable[[Tensor, Tensor], ModelOutput]
Outputs = tuple[Tensor, Tensor | None, Tensor | None]  # f, u and v, as Trajectory.call returns them
