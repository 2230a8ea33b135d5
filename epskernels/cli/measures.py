"""What `epskernels calibrate --method search` makes small: a Fréchet distance in some features, or a score of the user's own.

Features are named (`features.FEATURES`) or, like a score, MODULE:FUNCTION. What a function of the user's returns is checked.
"""

import argparse
import dataclasses
import hashlib
import inspect
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import features, quality
from ..calibrate.trials import number_of, shown
from ..typing import Array
from .common import UsageError, calling, first_line, load_function

Function = Callable[[torch.Tensor], Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is searched for.

    name: what the output calls a number of it. line: says which features are taken, and why; empty for a score. score: of
    samples, float32 (N, C, H, W) on the CPU, all finite. identity: what a trial's score depends on, for the key of a cache.
    """

    name: str
    line: str
    score: Callable[[torch.Tensor], float]
    identity: list[str]


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    """--features and --score."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--features",
        metavar="NAME",
        help=f"search: what the Frechet distance is taken in: {', '.join(features.FEATURES)}, or MODULE:FUNCTION, a function "
        "of images, float32 (N, C, H, W), that returns (N, D); default: digits for models of 28 x 28 x 1, otherwise random-conv",
    )
    group.add_argument(
        "--score",
        metavar="MODULE:FUNCTION",
        help="search: a score of your own: a function of the samples, float32 (N, C, H, W) in the model's units, that returns a "
        "number, small where they are good",
    )


def own_function(args: argparse.Namespace) -> tuple[str, str, Function] | None:
    """(option, text, function) of --score or --features, where it is the user's own. Raises UsageError."""
    option, text = ("--score", args.score) if args.score is not None else ("--features", args.features)
    if text is None or (option == "--features" and text in features.FEATURES):
        return None
    function = load_function(option, text, features.FEATURES if option == "--features" else ())
    return option, text, function


def measure_of(
    args: argparse.Namespace, own: tuple[str, str, Function] | None, shape: tuple[int, ...], data: torch.Tensor
) -> Measure:
    """The measure that --score or --features names, for a model of such samples. data: real images. Raises UsageError."""
    if own is not None and own[0] == "--score":
        option, text, function = own
        return Measure(text, "", lambda samples: _score(text, _called(option, text, function, samples)), _identity(own))
    if own is not None:
        of, line, identity = _own_features(*own), f"features: {own[1]}", _identity(own)
    else:
        name = args.features or features.default(shape)
        by_default = "" if args.features else f", the default for {tuple(shape)}; --features and --score take others"
        line, identity = f"features: {name}{by_default}", ["features", name]
        of = _built_in(name)
    real = of(data)
    return Measure("Frechet distance", line, lambda samples: quality.frechet(real, of(samples)), identity)


def _own_features(option: str, text: str, function: Function) -> Callable[[torch.Tensor], Array]:
    return lambda images: _checked(text, images, _called(option, text, function, images))


def _built_in(name: str) -> Callable[[torch.Tensor], Array]:
    function = features.FEATURES[name]

    def of(images: torch.Tensor) -> Array:
        try:
            return function(images)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"--features: {name}: {first_line(error)}") from error

    return of


def _called(option: str, text: str, function: Function, images: torch.Tensor) -> Any:
    with calling(option, text):
        return function(images)


def _score(text: str, value: Any) -> float:
    found = number_of(value, f"--score: expected {text} to return")
    if math.isnan(found) or found == -math.inf:
        raise UsageError(
            f"--score: expected {text} to return a finite number, or inf for samples that are of no use, got {found}"
        )
    return found


def _checked(text: str, images: torch.Tensor, value: Any) -> Array:
    found = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    numeric = isinstance(found, np.ndarray) and found.dtype.kind in "fiu"
    if not numeric or found.ndim != 2 or len(found) != len(images) or not found.size:
        raise UsageError(
            f"--features: expected {text} to return numbers of shape ({len(images)}, D) for {len(images)} images, "
            f"got {shown(value)}"
        )
    if wrong := np.count_nonzero(~np.isfinite(found)):
        raise UsageError(f"--features: expected finite features from {text}, got {wrong} of {found.size} that are not")
    return found.astype(np.float64)


def _identity(own: tuple[str, str, Function]) -> list[str]:
    """Its name, and the digest of the file where it is written."""
    option, text, function = own
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # of an object that can be called, or built in
        source = getattr(sys.modules[text.partition(":")[0]], "__file__", None)
    digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else ""
    return [option, text, digest]
