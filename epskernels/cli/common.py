"""What the commands share: the arguments that name a model and a sampler, the table they give, files, digests, messages."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import operator
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from .. import corrections, models, samplers, schedule
from ..corrections import Correction, as_correction
from ..files import check_writable
from ..scaling import EpsilonScaling
from ..table import describe
from ..typing import ModelCall

_FOR_OTHERS = {"pfgmpp", "ddim_inverse"}  # samplers that do not go from a seed's noise to an image
# What is sampled with by default.
_DEFAULT_SAMPLERS = {
    schedule.DiscreteSchedule: "ddpm", schedule.KarrasSchedule: "edm_heun", schedule.FlowSchedule: "flow_euler",
}  # fmt: skip
_OWN_OPTIONS = ("eta", "direction", "variance")  # of some samplers
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_FILE = re.compile(r"(?:.*/)?(?P<module>[\w.]*)\.py:(?P<function>[\w.]+)")  # what is taken for a function's name


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


# ---- functions of the user's ----


def load_function(option: str, text: str, names: Iterable[str] = ()) -> Callable[..., Any]:
    """The function that an option's text names, MODULE:FUNCTION; the current folder is looked in first, as in `python -m`.

    names: what else the option takes. Raises UsageError.
    """
    if file := _FILE.fullmatch(text):
        said = "{module}:{function}".format(**file.groupdict())
        raise UsageError(f"{option}: expected a module's name, such as {said}, without .py, got {text!r}")
    if not _FUNCTION.fullmatch(text):
        others = f"one of {', '.join(names)}, or " if names else ""
        raise UsageError(f"{option}: expected {others}MODULE:FUNCTION, such as mymodule:myfunction, got {text!r}")
    name, _, path = text.partition(":")
    if sys.path[0] != os.getcwd():  # until the command ends: a function may import when it is called
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UsageError(f"{option}: no module {missing!r} in {os.getcwd()} or among the installed ones") from error
        raise UsageError(f"{option}: {name} cannot be imported: {_raised(error)}") from error
    try:
        found = operator.attrgetter(path)(found)
    except AttributeError:
        where = getattr(found, "__file__", "built in")
        raise UsageError(f"{option}: {name} has no {path!r} ({where})") from None
    if not callable(found):
        raise UsageError(f"{option}: expected {text} to be a function, got {describe(found)}")
    return found


@contextlib.contextmanager
def calling(option: str, text: str) -> Iterator[None]:
    """Around a call of the user's function: says in one line what it raised, and where. Raises UsageError."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{option}: {text} raised {_raised(error)}") from error


def _raised(error: BaseException) -> str:
    """The error and where it was raised."""
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError):  # which says its place itself
        return said
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({place.filename}, line {place.lineno})"


# ---- the model and its sampler ----


def offered_samplers() -> list[str]:
    """The names that --sampler takes."""
    return sorted(set(samplers.SAMPLERS) - _FOR_OTHERS)


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_model` and `make_table` read."""
    parser.add_argument(
        "--model",
        default=str(models.DIGITS),
        help="a diffusers pipeline directory (unet/, scheduler/), or MODULE:FUNCTION, a function of yours that takes the device "
        "and returns an epskernels.models.Model; default: the digits that ship with the package",
    )
    parser.add_argument(
        "--sampler",
        choices=offered_samplers(),
        help="default: ddpm; edm_heun for a model that is told sigma, flow_euler for a flow",
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
    """The model, and the function that `epskernels.sample` calls. Sets args.sampler, if it is None. Raises UsageError."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UsageError(f"--device: {str(device)!r} cannot be used: {first_line(error)}") from error
    try:
        if (_FUNCTION.fullmatch(args.model) or _FILE.fullmatch(args.model)) and not os.path.isdir(args.model):
            model = _own_model(args.model, torch.device(device))
        else:
            model = models.load(args.model, device)
        args.sampler = args.sampler or next(
            name for kind, name in _DEFAULT_SAMPLERS.items() if isinstance(model.schedule, kind)
        )
        return model, model.callable(args.label, args.guidance)
    except ImportError as error:
        raise missing_package(error) from error
    except (ValueError, OSError) as error:
        raise UsageError(error) from error


def _own_model(text: str, device: torch.device) -> models.Model:
    """The Model that the function module:function returns for the device. Raises UsageError."""
    function = load_function("--model", text)
    with calling("--model", f"{text}(device)"):
        model = function(device)
    if not isinstance(model, models.Model):
        raise UsageError(f"--model: expected {text} to return an epskernels.models.Model, got {describe(model)}")
    for each in model.tensors():
        if each.device.type != device.type:
            raise UsageError(f"--model: expected {text} to put its weights on {device}, got a tensor on {each.device}")
    model.name = model.name or text
    return model


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
    return dataclasses.replace(made, sampler=None, steps=None)  # `sample` says itself what the file was fitted for


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
    sampler, takes = samplers.SAMPLERS[args.sampler], _takes(args)
    options: dict[str, Any] = {"scaling": scaling, "prediction": model.prediction, "guidance": args.guidance}
    if "clip" in takes:  # what keeps eps from call to call has no x_0 to hold to a range
        options["clip"] = model.clip
    if correction is not None:
        options["correction"] = correction
    for name in _OWN_OPTIONS:
        if getattr(args, name) is not None and name not in takes:
            raise UsageError(f"--{name}: not an option of --sampler {args.sampler}")
    options |= _own_options(args, model)
    grid, discrete = _grid_options(args, model), isinstance(model.schedule, schedule.DiscreteSchedule)
    try:
        return make(sampler, model.schedule, args.steps, **options, **grid)
    except (TypeError, ValueError) as error:
        said = str(error)
        if not said.startswith(("schedule:", "space:")):
            raise
        # Samplers of noise levels take those of the timesteps; a network that predicts noise is no consistency function.
        if not discrete or args.sampler == "consistency" or "expected a KarrasSchedule" not in said:
            raise UsageError(f"--sampler: {args.sampler} does not fit the model: {said}") from error
    return make(sampler, schedule.KarrasSchedule(model=model.schedule), args.steps, **options)


def _takes(args: argparse.Namespace) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(samplers.SAMPLERS[args.sampler]).parameters


def _defaults(args: argparse.Namespace, model: models.Model) -> dict[str, Any]:
    """Of the options of its own that the sampler takes."""
    defaults = {name: each.default for name, each in _takes(args).items() if name in _OWN_OPTIONS}
    return defaults | ({"variance": model.variance} if "variance" in defaults else {})


def _own_options(args: argparse.Namespace, model: models.Model) -> dict[str, Any]:
    """Those as they hold, given or not."""
    given = {name: getattr(args, name) for name in _OWN_OPTIONS}
    defaults = _defaults(args, model)
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def _grid_options(args: argparse.Namespace, model: models.Model) -> dict[str, Any]:
    """Those of DiscreteSchedule.grid."""
    accepts_grid = inspect.Parameter.VAR_KEYWORD in {each.kind for each in _takes(args).values()}
    if not (accepts_grid and isinstance(model.schedule, schedule.DiscreteSchedule)):
        return {}
    grid = {"spacing": "trailing"} if args.sampler.startswith("dpmpp_") else dict(model.grid)
    return grid | ({"final": model.final} if args.sampler == "ddim" else {})


def beyond_defaults(args: argparse.Namespace, model: models.Model) -> dict[str, Any]:
    """The sampler's own options that were given and are not what holds anyway; None for the others."""
    defaults = _defaults(args, model)
    return {name: None if (given := getattr(args, name)) == defaults.get(name) else given for name in _OWN_OPTIONS}


def fitted_for(args: argparse.Namespace, model: models.Model) -> dict[str, Any]:
    """What lambda_t depends on, as it holds, given or not: it does not transfer to another sampler, or number of steps."""
    own = dict.fromkeys(_OWN_OPTIONS) | _own_options(args, model)
    asked = {"sampler": args.sampler, "steps": args.steps, **own, "label": args.label, "guidance": args.guidance}
    return asked | _grid_options(args, model)


def fitted_for_another(
    notes: Mapping[str, Any], args: argparse.Namespace, model: models.Model
) -> dict[str, tuple[Any, Any]]:
    """What differs between the notes of a file and what is asked here: (there, here) by name. None says nothing of an option of
    the sampler's own in older files: its default held. With another sampler, its options are others anyway."""
    here = fitted_for(args, model)
    there = {name: notes[name] for name in here if name in notes}
    if there.get("sampler", args.sampler) == args.sampler:
        defaults = _defaults(args, model)
        there = {name: defaults.get(name) if value is None else value for name, value in there.items()}
    else:
        there = {name: there[name] for name in ("sampler", "steps", "label", "guidance") if name in there}
    return {name: (value, here[name]) for name, value in there.items() if value != here[name]}


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
    """(of what the model says of itself, without the path that it came from; of its weights, None if it has none)."""
    config = getattr(model.network, "config", {})
    told = (
        {key: value for key, value in config.items() if not key.startswith("_")} if isinstance(config, Mapping) else {}
    )
    weights = [
        value
        for each in model.weights
        for value in ([each] if isinstance(each, torch.Tensor) else each.state_dict().values())
        if isinstance(value, torch.Tensor)
    ]
    return json_digest([model.name, told] if model.name else told), tensors_digest(weights) if weights else None


def require_weights(option: str, path: pathlib.Path, model: models.Model) -> None:
    """Raises UsageError if nothing tells the model from another: what the path holds may then be another's."""
    if not model.weights:
        raise UsageError(
            f"{option}: {path} can be continued by the same weights alone, and {model.name} names none: Model(..., weights=...)"
        )
