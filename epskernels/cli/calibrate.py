"""`epskernels calibrate`: finds lambda_t, or a correction, for a model and a sampler, from real images, and writes it."""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import calibrate, corrections, exposure, images, scaling
from ..corrections import Correction
from ..models import Model
from ..sample import sample
from ..scaling import EpsilonScaling
from ..table import Table
from ..typing import ModelCall
from .common import (
    UsageError,
    add_sampler_arguments,
    beyond_defaults,
    fitted_for,
    json_digest,
    lambda_value,
    load_model,
    make_table,
    missing_package,
    model_digests,
    require_weights,
    require_writable,
    tensors_digest,
)
from .measures import Measure, add_measure_arguments, measure_of, own_function

TEXTS = {
    "help": "find lambda_t, or a correction, for a model and a sampler",
    "description": "Find lambda_t for a model and a sampler, from real images; write it for `epskernels sample --lambda`. With "
    "--correction: the weights of a correction of the sampler's states.",
    "epilog": "examples:\n"
    "  epskernels calibrate --sampler ddim --steps 20 --data mnist --out lambda.json --plots exposure\n"
    "  epskernels calibrate --method search --bounds 0.97 1.03 --trials 8 --data mnist --out lambda.json\n"
    "  epskernels calibrate --method search --score mymodule:myfunction --out lambda.json\n"
    "  epskernels calibrate --correction dcw --sampler ddim --steps 20 --data mnist --out correction.json\n"
    "  epskernels sample --sampler ddim --steps 20 --correction correction.json --compare --out both.png\n"
    "  epskernels sample --sampler ddim --steps 20 --lambda lambda.json --compare --out both.png",
}
_LOWEST = {"steps": 1, "images": 2, "batch": 1, "trials": 2, "samples": 2, "seed": 0}
_METHOD_OF = {
    "fit": "norms", "skip": "norms", "bounds": "search", "k_bounds": "search", "trials": "search", "cache": "search",
    "features": "search", "score": "search",
}  # fmt: skip  # the only one that takes it
# What --correction searches: the weights at which it changes nothing, in the order of the search, and the options that it takes.
_SEARCHED: dict[str, tuple[Callable[..., Any], dict[str, float], tuple[str, ...]]] = {
    "dc": (corrections.dc, {"s": 0.0}, ("schedule", "target")),
    "dcw": (corrections.dcw, {"low": 0.0, "high": 0.0}, ("schedule", "target")),
    "frequency": (corrections.frequency, {"low": 1.0, "high": 1.0}, ("schedule",)),
    "tsr": (scaling.tsr, {"k": 1.0}, ("sigma",)),
}
_TRIALS = 8  # for each weight
_NORMS_CANNOT = (
    "norms tell how far the sampler's predictions are from training, not which lambda gives the best samples: compare them with "
    "lambda 1, or take --method search"
)


# ---- arguments ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `epskernels calibrate`, in the order of --help."""
    add_sampler_arguments(parser)
    parser.add_argument(
        "--data",
        help="real images: a directory of image files, or of one for each class; larger ones are cropped to their centre and "
        "resized; a .npy or .npz (N, C, H, W), or uint8 (N, H, W, C), such as arr_0 of guided-diffusion; or mnist. With --class: "
        "those of the class. For a model with a decode: its latents, in a .npy or .npz. A search by --score alone does without",
    )
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many of them; default: %(default)s")
    _add_method_arguments(parser)
    _add_correction_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first image and sample; default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="samples per model call; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument(
        "--plots",
        type=pathlib.Path,
        metavar="STEM",
        help="also measure the exposure bias without scaling: STEM.json, STEM.png, and STEM-lambda.png",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=("norms", "search"),
        help="norms: match those of training, one run; search: trials, by a Frechet distance or your own score; "
        "default: norms, with --correction search",
    )
    parser.add_argument(
        "--fit", choices=("array", "by_level", *calibrate.FITS), help="form of lambda_t by norms; default: array"
    )
    parser.add_argument(
        "--skip",
        type=int,
        metavar="N",
        help="cleanest steps without lambda_t, or that the fit leaves out; default: a quarter",
    )
    bounds: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    parser.add_argument(
        "--bounds",
        **bounds,
        help="search: of b, default 0.97 1.03; or of each weight of the --correction, default: wide",
    )
    parser.add_argument(
        "--k-bounds", **bounds, help="search: of k; lambda is then a line, and --bounds are for its middle"
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"search: default: {_TRIALS}, and as many for the second weight of a --correction",
    )
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="search: in a trial; default: %(default)s"
    )
    parser.add_argument("--cache", type=pathlib.Path, metavar="FILE", help="search: a .json of trials, to go on from")
    add_measure_arguments(parser)


def _add_correction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--correction",
        choices=_SEARCHED,
        help="search its weights, in both directions: dc: of x' - m0; dcw: of its low band, then of its high band beside that; "
        "frequency: factors of x' by band; tsr: k of scaling.tsr, which is a lambda",
    )
    parser.add_argument(
        "--schedule",
        choices=corrections.SCHEDULES,
        help="of the weights; default: dcw sigma, dc and frequency constant",
    )
    parser.add_argument(
        "--target", choices=corrections.TARGETS, help="dc, dcw: what x' is compared with; default: m0, as published"
    )
    parser.add_argument("--sigma", type=float, help="tsr: standard deviation of the data; default: 1")
    parser.add_argument(
        "--lambda",
        dest="lambda_",
        metavar="VALUE",
        help="the lambda beside the --correction, as in `epskernels sample`",
    )


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what can be refused before the model and the images are loaded. Sets the method and the trials."""
    if args.method == "norms" and args.correction:
        raise UsageError("--correction: not an option of --method norms: its weights are found by trials")
    args.method = args.method or ("search" if args.correction else "norms")
    _check_correction_arguments(args)
    for name, lowest in _LOWEST.items():
        if getattr(args, name) is not None and getattr(args, name) < lowest:
            raise UsageError(f"--{name}: expected at least {lowest}, got {getattr(args, name)}")
    if (highest := 2**63 - max(args.images, args.samples)) < args.seed:
        raise UsageError(
            f"--seed: expected at most {highest}, since images and samples count up from it, got {args.seed}"
        )
    if args.out.suffix != ".json":
        raise UsageError(f"--out: expected a .json file, got {args.out}")
    for name, method in _METHOD_OF.items():
        if method != args.method and getattr(args, name) is not None:
            instead = "; a search for a line takes --k-bounds" if name == "fit" else ""
            raise UsageError(f"--{name.replace('_', '-')}: not an option of --method {args.method}{instead}")
    if args.data is None and (args.score is None or args.plots is not None):
        raise UsageError(
            "--data: expected real images, such as a directory of them; a search by --score alone does without"
        )
    if args.trials is None:
        args.trials = _TRIALS * len(_SEARCHED[args.correction][1] if args.correction else [0])


def _check_correction_arguments(args: argparse.Namespace) -> None:
    takes = ("lambda_", *_SEARCHED[args.correction][2]) if args.correction else ()
    takes = tuple(name for name in takes if (args.correction, name) != ("tsr", "lambda_"))  # it is a lambda itself
    refused = [name for name in ("lambda_", "schedule", "target", "sigma") if name not in takes]
    for name in (*refused, *(["k_bounds"] if args.correction else [])):
        if getattr(args, name) is not None:
            of = f"--correction {args.correction}" if args.correction else "a calibration without --correction"
            raise UsageError(f"--{name.strip('_').replace('_', '-')}: not an option of {of}")


# ---- the command ----


@dataclasses.dataclass(frozen=True)
class _Task:
    """What lambda_t or a correction is found for, and from what.

    call: the model, as `sample` calls it. data: real images (N, C, H, W), none without --data. beside: the lambda of
    --lambda. table: the sampler's, with a candidate: a scaling, or a correction and the lambda beside it.
    """

    args: argparse.Namespace
    model: Model
    call: ModelCall
    data: torch.Tensor
    beside: EpsilonScaling

    def table(self, candidate: EpsilonScaling | Correction | None = None) -> Table:
        scaled = candidate if isinstance(candidate, EpsilonScaling) else self.beside
        correction = candidate if isinstance(candidate, Correction) else None
        return make_table(self.args, self.model, scaled, correction=correction).to(self.args.device)


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a method found.

    notes: for its file. lines: to print. plot: draws lambda_t into a file; None for a search.
    """

    best: EpsilonScaling | Correction
    notes: dict[str, Any]
    lines: list[str]
    plot: Callable[[pathlib.Path], None] | None = None


def run(args: argparse.Namespace) -> None:
    """Writes the scaling or the correction. Its notes say what it was fitted for, so that `sample` can warn of another use."""
    _check_arguments(args)
    own = own_function(args)
    task = _load_task(args)
    plots = _plot_paths(args)
    _check_files(args, plots)
    if args.cache:
        require_weights("--cache", args.cache, task.model)
    config, weights = model_digests(task.model)
    if args.method == "search":
        measure = measure_of(args, own, task.model.shape, task.data)
        result = _search(task, measure, _cache_key(task, measure, config, weights))
    else:
        result = _match_norms(task)
    result.best.save(
        args.out,
        **fitted_for(args, task.model),
        weights=weights,
        method=args.method,
        images=len(task.data),
        data=args.data,
        seed=args.seed,
        **result.notes,
    )
    print("\n".join([*result.lines, f"wrote {args.out}"]))
    if plots:
        _measure_exposure(task, plots)
        if result.plot:
            result.plot(plots[2])
        print(f"wrote {args.plots}.json and plots")


def _load_task(args: argparse.Namespace) -> _Task:
    """Loads the model and the images, and tries the sampler. Raises UsageError."""
    model, call = load_model(args, args.device)
    try:
        beside = scaling.as_scaling(1.0 if args.lambda_ is None else lambda_value(args.lambda_), "--lambda")
        data = torch.empty(0, *model.shape)
        if args.data is not None:
            bounded = model.decode is None
            data = torch.from_numpy(images.load(args.data, model.shape, args.images, label=args.label, bounded=bounded))
        task = _Task(args, model, call, data, beside)
        task.table()
    except ImportError as error:
        raise missing_package(error) from error
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(error) from error
    return task


# ---- files ----


def _plot_paths(args: argparse.Namespace) -> list[pathlib.Path]:
    """The files of --plots: the measurements, their figure, and the figure of lambda_t, which a search has not."""
    if args.plots is None:
        return []
    if not args.plots.name:
        raise UsageError(f"--plots: expected the stem of files' names, got {args.plots}")
    try:
        exposure.figures(1)
    except ImportError as error:
        raise UsageError(f"--plots: {error}") from error
    ends = (".json", ".png") if args.method == "search" else (".json", ".png", "-lambda.png")
    return [args.plots.with_name(f"{args.plots.name}{end}") for end in ends]


def _check_files(args: argparse.Namespace, plots: list[pathlib.Path]) -> None:
    """Raises UsageError where two options name one file, or where one cannot be written."""
    option_of: dict[pathlib.Path, str] = {}
    for option, paths in (("--out", [args.out]), ("--cache", [args.cache] if args.cache else []), ("--plots", plots)):
        for path in paths:
            if option_of.setdefault(path.resolve(), option) != option:
                raise UsageError(f"{option}: {path} is the file of {option_of[path.resolve()]} already")
            require_writable(option, path)


def _measure_exposure(task: _Task, plots: list[pathlib.Path]) -> None:
    """Measures the exposure bias without scaling, and writes the numbers and their figure."""
    args = task.args
    measured = exposure.measure(
        task.call, task.table(), task.data, seed=args.seed, batch=args.batch, progress=not args.quiet
    )
    measured.save(plots[0])
    measured.plot(plots[1])


# ---- by norms ----


def _match_norms(task: _Task) -> _Result:
    """lambda_t by the norms of the model's output, in one run."""
    args = task.args
    steps = int(calibrate.steps_of(task.table)[1].max()) + 1
    kind, skip = _checked_fit(args, len(task.data), steps)
    matched = calibrate.match_norms(
        task.call, task.table, task.data, seed=args.seed, batch=args.batch, progress=not args.quiet
    )
    lines = []
    for name, degree in calibrate.FITS.items():
        if degree < steps - skip:
            fitted = calibrate.fit(matched.lambda_t, name, skip)
            lines.append(f"{name}: {', '.join(f'{c:.5g}' for c in fitted.coefficients)}; R^2 {fitted.r2:.3f}")
    lines.append(_NORMS_CANNOT)
    return _Result(
        best=matched.scaling(kind, skip),
        notes={"lambda_t": matched.lambda_t.tolist(), "standard_error": matched.standard_error.tolist()},
        lines=lines,
        plot=lambda path: matched.plot(path, args.fit, skip),
    )


def _checked_fit(args: argparse.Namespace, count: int, steps: int) -> tuple[str, int]:
    """(--fit, --skip), with their defaults. Raises UsageError, before the work, for what lambda_t of so many steps refuses."""
    ones = np.ones(steps)
    unmatched = calibrate.Matched(args.sampler, count, ones, ones, ones, ones, np.arange(float(steps)))
    kind, skip = args.fit or "array", unmatched.skip if args.skip is None else args.skip
    try:
        unmatched.scaling(kind, skip)
    except ValueError as error:
        raise UsageError(f"--fit, --skip: {error}") from error
    return kind, skip


# ---- by search ----


def _search(task: _Task, measure: Measure, key: str) -> _Result:
    """lambda or a correction by trials: what makes the measure of the samples smallest."""
    args, model = task.args, task.model
    seeds = range(args.seed, args.seed + args.samples)

    def score(candidate: EpsilonScaling | Correction) -> float:
        table = task.table(candidate)
        batches = [seeds[first : first + args.batch] for first in range(0, len(seeds), args.batch)]
        samples = torch.cat([sample(task.call, table, batch, model.shape).cpu() for batch in batches])
        return measure.score(samples) if samples.isfinite().all() else np.inf

    b_bounds = args.bounds or (0.97, 1.03)
    options = {"trials": args.trials, "cache": args.cache, "key": key, "progress": not args.quiet}
    try:
        if args.correction:
            start = _SEARCHED[args.correction][1]
            bounds = dict.fromkeys(start, args.bounds) if args.bounds else None
            found = calibrate.search_weights(score, _correction_maker(args), start, bounds=bounds, **options)
        elif args.k_bounds:
            found = calibrate.search(score, (args.k_bounds, b_bounds), steps=args.steps, **options)
        else:
            found = calibrate.search(score, b_bounds, **options)
    except (ValueError, ImportError) as error:
        raise UsageError(error) from error
    what = "correction" if args.correction else "scaling"
    notes: dict[str, Any] = {
        "measure": measure.line or measure.name,
        "score": found.score,
        f"score without {what}": _finite_or_none(found.baseline),
        "trials": [[*weights, _finite_or_none(trial)] for *weights, trial in found.trials],
    }
    if args.lambda_ is not None:
        notes["lambda"] = task.beside.to_dict()
    weights = ", ".join(f"{name} {value:.5g}" for name, value in found.weights.items())
    label = f"{args.correction}, {weights}" if args.correction else found.scaling.label
    said = f"{measure.name} {found.score:.5g} of {args.samples} samples, {found.baseline:.5g} without"
    return _Result(found.best, notes, [*filter(None, [measure.line]), f"{label}: {said}"])


def _correction_maker(args: argparse.Namespace) -> Callable[..., Any]:
    """The function of the weights that --correction names, with the options given."""
    make, _, takes = _SEARCHED[args.correction]
    return functools.partial(make, **{name: getattr(args, name) for name in takes if getattr(args, name) is not None})


def _cache_key(task: _Task, measure: Measure, config: str, weights: str | None) -> str:
    """All that a trial's score depends on: --cache of another key is refused."""
    args = task.args
    return json_digest(
        {
            **{name: getattr(args, name) for name in ("sampler", "steps", "label", "guidance")},
            **beyond_defaults(args, task.model),
            "samples": args.samples,
            "seed": args.seed,
            "network": config,
            "weights": weights,
            "rows": tensors_digest([task.table().rows]),
            "correction": [getattr(args, name) for name in ("correction", "schedule", "target", "sigma")],
            "data": tensors_digest([task.data]),
            "measure": measure.identity,
        }
    )


def _finite_or_none(score: float) -> float | None:
    """As JSON can say it."""
    return score if np.isfinite(score) else None
