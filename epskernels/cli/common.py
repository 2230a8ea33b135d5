"""What the commands share: the arguments that name a model and a sampler, the table they give, files, digests, messages."""

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .. import corrections, models, samplers, schedule
from ..corrections import Correction, as_correction
from ..files import check_writable
from ..scaling import EpsilonScaling
from ..table import describe
from ..typing import ModelCall

# Samplers that do not go from a seed's noise to an image.
_FOR_OTHERS = {"pfgmpp", "ddim_inverse"}
# What is sampled with where --sampler is not given.
_DEFAULT_SAMPLER = {
    schedule.DiscreteSchedule: "ddpm", schedule.KarrasSchedule: "edm_heun", schedule.FlowSchedule: "flow_euler",
}  # fmt: skip
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


# ---- messages ----


class UsageError(Exception):
    """Bad arguments: one line, exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the line after it where the first one ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])


def missing_package(error: ImportError) -> UsageError:
    """The error that says what to install."""
    if error.name is None or "pip" in str(error) or not isinstance(error, ModuleNotFoundError):
        return UsageError(first_line(error))
    return UsageError(f"{error.name} is missing: pip install diffusers safetensors pillow")


# ---- the model and its sampler ----


def offered_samplers(model: models.Model | None = None) -> list[str]:
    """The names that --sampler takes; those of them that take the model's schedule."""
    names = sorted(set(samplers.SAMPLERS) - _FOR_OTHERS)
    return names if model is None else [name for name in names if _takes(name, model)]


def _takes(name: str, model: models.Model) -> bool:
    if name == "consistency" and isinstance(model.schedule, schedule.DiscreteSchedule):
        return False  # its tables can be made, but no network that predicts noise is a consistency function
    try:
        _on_schedule(model.schedule, lambda path: samplers.SAMPLERS[name](path, 3, prediction=model.prediction))
    except (TypeError, ValueError):
        return False
    return True


def _on_schedule(path: Any, make: Callable[[Any], Any]) -> Any:
    """make(path); for timesteps and a sampler that wants noise levels, of the KarrasSchedule of those that they stand for."""
    try:
        return make(path)
    except TypeError as error:
        wanted = str(error).startswith("schedule: expected a KarrasSchedule")
        if not wanted or not isinstance(path, schedule.DiscreteSchedule):
            raise
    return make(schedule.KarrasSchedule(model=path))


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_model` and `make_table` read."""
    parser.add_argument(
        "--model",
        default=str(models.DIGITS),
        metavar="MODEL",
        help="a diffusers pipeline directory (unet/, scheduler/); or module:function, a function of yours, of the device or of "
        "nothing, that returns an epskernels.models.Model: the current folder can be imported; default: the digits that ship "
        "with the package",
    )
    parser.add_argument(
        "--sampler",
        choices=offered_samplers(),
        help="default: ddpm; for a model that is told sigma edm_heun, for a flow flow_euler",
    )
    parser.add_argument("--steps", type=int, default=50, help="sampler steps; default: %(default)s")
    parser.add_argument("--eta", type=float, help="DDIM's eta; default: 0")
    parser.add_argument("--direction", choices=("scaled", "unscaled"), help="DDIM's direction term; default: scaled")
    parser.add_argument(
        "--variance",
        choices=("fixed_small", "fixed_large", "learned_range"),
        help="DDPM's variance; default: learned_range where the model has learned one, else what its scheduler says",
    )
    parser.add_argument("--class", type=int, dest="label", metavar="N", help="class, for a model with classes")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="G", help="classifier-free guidance; default: 1, none"
    )


def load_model(args: argparse.Namespace, device: str | torch.device) -> tuple[models.Model, ModelCall]:
    """The model, and the function that `epskernels.sample` calls. Sets args.sampler where none was given. Raises UsageError."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UsageError(f"--device: {str(device)!r} cannot be used: {first_line(error)}") from error
    try:
        if _FUNCTION.fullmatch(args.model) and not os.path.isdir(args.model):
            model = _own_model(args.model, torch.device(device))
        else:
            model = models.load(args.model, device)
        args.sampler = args.sampler or _DEFAULT_SAMPLER[type(model.schedule)]
        return model, model.callable(args.label, args.guidance)
    except ImportError as error:
        raise missing_package(error) from error
    except (ValueError, OSError) as error:
        raise UsageError(error) from error


def _own_model(text: str, device: torch.device) -> models.Model:
    """What the function module:function returns for the device. Raises UsageError."""
    function = load_function(text, "--model")
    parameters = inspect.signature(function).parameters.values()
    takes = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(needed) > 1 or (needed and not takes):
        raise UsageError(f"--model: expected {text} to take a device, or nothing, it needs {', '.join(needed)}")
    model = _called(functools.partial(function, *([device] if takes else [])), f"--model: {text}")
    if not isinstance(model, models.Model):
        raise UsageError(f"--model: expected {text} to return an epskernels.models.Model, got {describe(model)}")
    if elsewhere := {str(each.device) for each in model.tensors() if each.device.type != device.type}:
        raise UsageError(
            f"--device: the weights of {text} are on {', '.join(sorted(elsewhere))}, expected {device}: let the function take "
            "the device"
        )
    model.name = model.name or text
    return model


def load_function(text: str, option: str) -> Callable[..., Any]:
    """The function that the text of an option names, module:function; the current folder can be imported. Raises UsageError."""
    if not _FUNCTION.fullmatch(text):
        raise UsageError(f"{option}: expected module:function, got {text!r}")
    name, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        found = _called(functools.partial(importlib.import_module, name), f"{option}: importing {name}")
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise UsageError(f"{option}: no module {name} in {os.getcwd()}, nor installed") from cause
        raise
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{option}: {name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{option}: expected a function, {text} is {describe(found)}")
    return found


def _called(function: Callable[[], Any], what: str) -> Any:
    """function(), which is the user's. Raises UsageError that says where it failed."""
    try:
        return function()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise UsageError(f"{what} raised {type(error).__name__}: {first_line(error)} ({where})") from error


def lambda_value(text: str) -> Any:
    """What the text of --lambda says: a number, a list of numbers, what JSON holds, or a name or path as it is."""
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"--lambda: expected JSON, got {text!r}: {error}") from None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return text
    return numbers if len(numbers) > 1 else numbers[0]


def read_correction(text: str, option: str = "--correction") -> Correction:
    """The Correction of KIND:WEIGHT[,WEIGHT], JSON, or the path of a file. Raises UsageError, ValueError and TypeError."""
    kind, colon, weights = text.partition(":")
    value: Any = text
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{option}: expected JSON, got {text!r}: {error}") from None
    elif colon and kind in corrections.KINDS:
        try:
            numbers = [float(weight) for weight in weights.split(",")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= (1 if kind == "dc" else 2):
            form = "dc:S" if kind == "dc" else f"{kind}:LOW[,HIGH]"
            raise UsageError(f"{option}: expected {form}, numbers, got {text!r}")
        value = {"kind": kind, **dict(zip(("low", "high"), numbers, strict=False))}
    elif not text.endswith(".json") and not pathlib.Path(text).exists():
        raise UsageError(
            f"{option}: expected dc:S, dcw:LOW[,HIGH], frequency:LOW[,HIGH], JSON or a .json file, got {text!r}"
        )
    made = as_correction(value, option)
    assert made is not None
    return made


def make_table(
    args: argparse.Namespace,
    model: models.Model,
    scaling: EpsilonScaling | float,
    correction: Correction | None = None,
    make: Callable[..., Any] = lambda sampler, *arguments, **options: sampler(*arguments, **options),
) -> Any:
    """The table of the sampler that the arguments name, for this model. The sampler's signature says which options it takes.

    make: what is called with the sampler and its arguments, such as time_shift.ShiftedTable; by default the sampler itself.
    Raises UsageError for an option that the sampler does not take, ValueError and TypeError as the sampler does.
    """
    sampler = samplers.SAMPLERS[args.sampler]
    takes = inspect.signature(sampler).parameters
    options: dict[str, Any] = {"scaling": scaling, "prediction": model.prediction, "guidance": args.guidance}
    if "clip" in takes:  # what keeps eps from call to call has no x_0 to hold to a range
        options["clip"] = model.clip
    if correction is not None:
        options["correction"] = correction
    for name in ("eta", "direction", "variance"):
        if getattr(args, name) is not None:
            if name not in takes:
                raise UsageError(f"--{name}: not an option of --sampler {args.sampler}")
            options[name] = getattr(args, name)
    if "variance" in takes:
        options.setdefault("variance", model.variance)
    grid: dict[str, Any] = {}
    accepts_grid = inspect.Parameter.VAR_KEYWORD in {each.kind for each in takes.values()}
    if accepts_grid and isinstance(model.schedule, schedule.DiscreteSchedule):
        grid = {"spacing": "trailing"} if args.sampler.startswith("dpmpp_") else dict(model.grid)
        if args.sampler == "ddim":
            grid["final"] = model.final

    def on(path: Any) -> Any:
        timesteps = grid if path is model.schedule else {}
        return make(sampler, path, args.steps, **options, **timesteps)

    try:
        if args.sampler == "consistency" and not _takes(args.sampler, model):
            raise TypeError("schedule: expected a KarrasSchedule of a consistency function")
        return _on_schedule(model.schedule, on)
    except (TypeError, ValueError) as error:
        if not str(error).startswith(("schedule:", "space:")) or _takes(args.sampler, model):
            raise
        kind, others = type(model.schedule).__name__, ", ".join(offered_samplers(model))
        raise UsageError(
            f"--sampler: {args.sampler} cannot sample a model with a {kind} ({error}); expected one of {others}"
        ) from error


def fitted_for(args: argparse.Namespace) -> dict[str, Any]:
    """What lambda_t depends on: it does not transfer to another sampler, or to another number of steps."""
    names = ("sampler", "steps", "eta", "direction", "variance", "label", "guidance")
    return {name: getattr(args, name) for name in names}


# ---- files ----


def require_writable(option: str, path: pathlib.Path) -> None:
    """Makes the path's folder. Raises UsageError for a path that cannot be written, before the work and not after it."""
    try:
        check_writable(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        why = "a directory" if isinstance(error, IsADirectoryError) else error
        raise UsageError(f"{option}: {path} cannot be written: {why}") from error


# ---- digests ----


def tensors_digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of all the tensors' bytes, as if they were one tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of the value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_digests(model: models.Model) -> tuple[str, str | None]:
    """(of the network's configuration, without the path that it came from; of all its weights, or None where it says none).

    Of a model that has a name, the configuration is that, and what its modules are made of.
    """
    weights = [value for each in model.weights for value in _state(each)]
    told: Any = _configuration(model.network)
    if model.name:
        modules = [each for each in model.weights if isinstance(each, torch.nn.Module)]
        parts = [(name, part) for each in modules for name, part in each.named_modules()]
        told = [model.name, [[name, type(part).__qualname__, _configuration(part)] for name, part in parts]]
    return json_digest(told), tensors_digest(weights) if weights else None


def _configuration(part: Any) -> dict[str, Any]:
    """As diffusers' networks have it; empty for others."""
    config = getattr(part, "config", None)
    return (
        {key: value for key, value in config.items() if not key.startswith("_")} if isinstance(config, Mapping) else {}
    )


def _state(weights: torch.nn.Module | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(weights, torch.Tensor):
        return [weights]
    return [value for value in weights.state_dict().values() if isinstance(value, torch.Tensor)]


def require_weights(option: str, path: pathlib.Path, model: models.Model) -> None:
    """Raises UsageError where nothing tells the model from another: what is there may then be another's."""
    if not model.weights:
        raise UsageError(
            f"{option}: {path} is continued by a model of the same weights, and {model.name} says none: Model(..., weights=...)"
        )
