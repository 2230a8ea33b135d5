"""`epskernels sample`: samples of a trained model, in memory or into a directory that many processes share."""

import argparse
import functools
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import __version__, corrections, images, ops, scaling, shards
from ..corrections import check_bands
from ..files import remove_leftovers, write_whole
from ..models import Model
from ..ranks import Ranks
from ..sample import sample
from ..schedule import DiscreteSchedule
from ..seeds import Seeds, spelled
from ..seeds import parse as parse_ranges
from ..time_shift import ShiftedTable
from . import picture
from .common import (
    UsageError,
    add_sampler_arguments,
    beyond_defaults,
    first_line,
    fitted_for_another,
    lambda_value,
    load_model,
    make_table,
    model_digests,
    read_correction,
    require_weights,
    require_writable,
    tensors_digest,
)

TEXTS = {
    "help": "sample images from a trained model",
    "description": "Sample images from a trained model.",
    "epilog": "examples:\n"
    "  epskernels sample --out digits.png\n"
    "  epskernels sample --sampler ddim --steps 20 --lambda 1.004 --compare --out both.png\n"
    "  epskernels sample --lambda ADM/CIFAR-10/20/linear --steps 20 --seeds 0-255 --out samples.npz\n"
    "  epskernels sample --model my_models:edm --steps 18 --seeds 0-49999 --out samples --uint8\n"
    "  torchrun --nproc-per-node 4 -m epskernels sample --seeds 0-49999 --out samples",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GIB = 2**30


# ---- arguments ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `epskernels sample`, in the order of --help."""
    add_sampler_arguments(parser)
    _add_scaling_arguments(parser)
    parser.add_argument(
        "--time-shift",
        type=_window_and_cutoff,
        metavar="WINDOW[,CUTOFF]",
        help="each step takes, among the timesteps within WINDOW/2 of its own, the one whose noise its state has, while they are "
        "above CUTOFF (default 0): such as 30,300; in the sampler's default form (epskernels.time_shift)",
    )
    parser.add_argument(
        "--correction",
        metavar="VALUE",
        help="of the state after each step: dc:S, dcw:LOW[,HIGH] or frequency:LOW[,HIGH], such as dcw:-0.1,0.05, as "
        'epskernels.corrections makes them; JSON such as {"kind": "dcw", "low": -0.1, "schedule": "constant"}; the path of a '
        ".json that `epskernels calibrate` or Correction.save wrote; default: none",
    )
    parser.add_argument(
        "--seeds", type=parse_seeds, default="0-63", help="such as 0-63 or 1,2,5-9; default: %(default)s"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples per model call; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the state; default: %(default)s")
    parser.add_argument("--backend", choices=ops.BACKENDS, default="auto", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also sample the same seeds without scaling, correction and time shift, shown on the left",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        action="append",
        metavar="FILE",
        help=".png for a grid of images, .npz for the samples and seeds, a name without suffix for a directory that is written "
        "a batch at a time, by all processes of torchrun, and continued where a run was interrupted; may be given again",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="for other tools: a .npz holds arr_0, uint8 (N, H, W, 3), as guided-diffusion's evaluator reads it, and a directory "
        "also a folder of a PNG for each seed, as pytorch-fid, clean-fid and EDM's fid.py read it",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each process; default: torch's, and 1 for a directory written on CPUs",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """--lambda and its other spellings, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--lambda",
        dest="lambda_",
        metavar="VALUE",
        help="Epsilon Scaling, eps/lambda: a number; a number for each step, the noisiest first: 1.01,1.005,1; JSON such as "
        '{"k": 0.0025, "b": 1, "origin": "cleanest"}; SYSTEM/DATASET/STEPS[/KIND] as in the paper: ADM/CIFAR-10/20; the path of '
        "a .json that `epskernels calibrate` wrote; default: 1, none",
    )
    group.add_argument(
        "--lambda-linear",
        type=float,
        nargs=2,
        metavar=("K", "B"),
        help="the same as --lambda with JSON: lambda = K*i + B, i = 0 at the cleanest step",
    )
    group.add_argument(
        "--published",
        nargs="+",
        metavar="SETTING",
        help="the same as --lambda SYSTEM/DATASET/STEPS[/KIND]: ADM CIFAR-10 20 linear",
    )
    group.add_argument("--scaling", type=pathlib.Path, metavar="FILE", help="the same as --lambda FILE")


def parse_seeds(text: str) -> Seeds:
    """ "0-3,7" -> Seeds of 0, 1, 2, 3, 7. Raises ArgumentTypeError."""
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def _window_and_cutoff(text: str) -> dict[str, float]:
    try:
        window, _, cutoff = text.partition(",")
        return {"window": int(window), "cutoff": float(cutoff or 0)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WINDOW or WINDOW,CUTOFF, such as 30,300, got {text!r}") from None


def _read_scaling(args: argparse.Namespace) -> scaling.EpsilonScaling:
    """The EpsilonScaling of --lambda, or of one of its other spellings."""
    if args.lambda_linear:
        k, b = args.lambda_linear
        return scaling.as_scaling({"k": k, "b": b, "origin": "cleanest"}, "--lambda-linear")
    if args.published:
        if len(args.published) not in (3, 4) or not args.published[2].isdigit():
            raise UsageError(f"--published: expected SYSTEM DATASET STEPS [KIND], got {' '.join(args.published)}")
        return scaling.as_scaling("/".join(args.published), "--published")
    if args.scaling:
        return scaling.as_scaling(args.scaling, "--scaling")
    return scaling.as_scaling(1.0 if args.lambda_ is None else lambda_value(args.lambda_), "--lambda")


# ---- the command ----


def run(args: argparse.Namespace) -> None:
    """Samples, writes the files of --out, and prints the times and the digests."""
    directory = _check_arguments(args)
    try:
        ranks = Ranks()
    except ValueError as error:
        raise UsageError(error) from error
    try:
        device = ranks.device(args.device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--device: {args.device!r} cannot be used: {first_line(error)}") from error
    if ranks.size > 1 and directory is None:
        raise UsageError(f"--out: expected a directory (no suffix), which {ranks.size} processes can write to")
    threads, threads_before = args.threads, torch.get_num_threads()
    if directory and device.type == "cpu":
        threads = threads or 1  # the same bits, whatever torchrun and the machine make of it
    try:
        if threads:
            torch.set_num_threads(threads)
        with ops.use_backend(args.backend), ranks:
            sampling = _Sampling(args, device)
            _check_files(args, sampling, directory)
            _check_size(args, sampling, directory)
            if ranks.rank == 0:
                _warn_of_transfer(args, sampling.model)
            if directory is None:
                _sample_in_memory(args, sampling)
            else:
                _sample_into_directory(args, sampling, ranks, directory)
    finally:
        torch.set_num_threads(threads_before)


class _Sampling:
    """The model and the tables that the arguments name. Counts the seconds in the model, and the seconds of all."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.model, self.call = load_model(args, device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        path = self.model.schedule
        if args.time_shift and not isinstance(getattr(path, "model", path), DiscreteSchedule):
            raise UsageError(
                f"--time-shift: expected a model that is told timesteps, got one of a {type(path).__name__}"
            )
        try:
            self.scaling = _read_scaling(args)
            self.correction = None if args.correction is None else read_correction(args.correction)
            asked: dict[str, Any] = {"baseline": (scaling.constant(1.0), None)} if args.compare else {}
            asked["samples"] = self.scaling, self.correction
            self.tables = {name: make_table(args, self.model, *each).to(device) for name, each in asked.items()}
            for table in self.tables.values():
                check_bands("--correction", torch.empty(0, *self.model.shape), table.band_dims)
            if args.time_shift:
                shifted = functools.partial(ShiftedTable, **args.time_shift)
                self.tables["samples"] = make_table(args, self.model, self.scaling, self.correction, shifted).to(device)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UsageError(error.args[0] if isinstance(error, KeyError) else error) from error
        self.seed_bytes = 4 * math.prod(self.model.shape) * len(self.tables)  # on the host: samples are float32 there
        self.args, self.device, self.model_seconds, self.seconds = args, device, 0.0, 0.0
        self.image_bytes = 0  # of a seed, with --uint8

    def images(self, samples: torch.Tensor) -> np.ndarray:
        """Samples as images (N, 1 or 3, H, W) in [-1, 1], decoded a batch at a time. Raises ValueError if they are none."""
        return np.concatenate(list(self._images(samples)))

    def pixels(self, samples: torch.Tensor) -> np.ndarray:
        """The same as uint8 (N, H, W, 1 or 3)."""
        return np.concatenate([images.to_bytes(part) for part in self._images(samples)])

    def _images(self, samples: torch.Tensor) -> Iterator[np.ndarray]:
        for part in samples.split(self.args.batch):
            yield self.model.images(part.to(self.device)).cpu().numpy()

    def __call__(self, name: str, seeds: np.ndarray, progress: bool = False) -> torch.Tensor:
        """The samples of a batch of seeds, on the host."""
        start = time.perf_counter()
        dtype = DTYPES[self.args.dtype]
        samples = sample(self._timed, self.tables[name], seeds, self.model.shape, dtype=dtype, progress=progress).cpu()
        self.seconds += time.perf_counter() - start
        return samples

    def _timed(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        start = time.perf_counter()
        output = self.call(x, t)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.model_seconds += time.perf_counter() - start
        return output

    def settings(self) -> dict[str, Any]:
        """All that decides the bits of a chunk, for run.json. The backend does not: all backends have the same bits."""
        args, seeds = self.args, self.args.seeds
        on_gpu = self.device.type == "cuda"
        cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        return {
            "names": list(self.tables), "sampler": args.sampler, "steps": args.steps, "scaling": str(self.scaling),
            **beyond_defaults(args, self.model), "class": args.label,
            "guidance": args.guidance, "dtype": args.dtype, "batch": args.batch, "shape": list(self.model.shape),
            "seeds": f"{len(seeds)} from {seeds[0]} to {seeds[-1]}, {seeds.digest()}",
            "model": " ".join(map(str, model_digests(self.model))),
            "tables": {name: tensors_digest([table.rows]) for name, table in self.tables.items()},
            **({"time_shift": args.time_shift} if args.time_shift else {}),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu,
            **({"correction": self.correction.to_dict()} if self.correction else {}),
            "epskernels": __version__, "torch": torch.__version__,
        }  # fmt: skip

    def headline(self) -> str:
        """What was sampled, as the first line that is printed."""
        return f"{self._setting()}, {self._applied()}"

    def panels(self, runs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        """(the runs by their titles in a picture, the lines above them)."""
        if len(runs) == 1:
            return {self.headline(): runs["samples"]}, []
        titles = {"baseline": "without", "samples": f"with {self._applied()}"}
        return {titles[name]: images for name, images in runs.items()}, [f"{self._setting()}, the same on both sides"]

    def _setting(self) -> str:
        return f"{self.args.sampler}, {self.args.steps} steps, {len(self.args.seeds)} seeds"

    def _applied(self) -> str:
        said = [f"{name} {value:g}" for name, value in (self.args.time_shift or {}).items()]
        said = [f"correction {self.args.correction}", *said] if self.correction else said
        return ", ".join(said if said and self.scaling == scaling.constant(1.0) else [str(self.scaling), *said])


def _sample_in_memory(args: argparse.Namespace, sampling: _Sampling) -> None:
    firsts = range(0, len(args.seeds), args.batch)
    batches = [args.seeds[first : first + args.batch] for first in firsts]
    runs = {name: torch.cat([sampling(name, seeds, not args.quiet) for seeds in batches]) for name in sampling.tables}
    noise = (ops.normal(seeds.tolist(), sampling.model.shape, device=sampling.device) for seeds in batches)
    not_finite = {name: _not_finite(samples, args.seeds[:]) for name, samples in runs.items()}
    lines = [sampling.headline(), _times(sampling.model_seconds, sampling.seconds)]
    lines.append(f"sha256 of the initial noise {tensors_digest(noise)}")
    lines += [f"sha256 of the {name} {tensors_digest([samples])}" for name, samples in runs.items()]
    _write_and_print(args, sampling, lines, lambda: runs)
    _say_what_is_not_finite(args, not_finite)


def _sample_into_directory(
    args: argparse.Namespace, sampling: _Sampling, ranks: Ranks, directory: pathlib.Path
) -> None:
    """Makes what the directory lacks: each rank every size-th of the lists that rank 0 made."""
    run, missing, without_pngs = _begin_or_continue(args, sampling, ranks, directory)
    own = missing[ranks.rank :: ranks.size]
    for name, chunk in tqdm(own, desc=f"{directory}", unit="chunk", disable=args.quiet or ranks.rank > 0):
        run.write(name, chunk, sampling(name, run.seeds_of(chunk)).float().numpy())
        if args.uint8:
            _write_pngs(sampling, run, name, chunk)
    for name, chunk in without_pngs[ranks.rank :: ranks.size]:
        _write_pngs(sampling, run, name, chunk)
    if args.uint8:
        for name in run.names:
            remove_leftovers(run.directory / name, lambda file: file.endswith(".png"))
    counts = ranks.gather((len(own), sampling.model_seconds, sampling.seconds))
    run.clean()
    if counts is None:  # this is not rank 0
        return
    made, model_seconds, seconds = (sum(values) for values in zip(*counts, strict=True))
    chunks, by = len(run) * len(run.names), " ".join(str(count) for count, *_ in counts)
    lines = [
        sampling.headline(),
        f"{chunks} chunks of up to {args.batch} seeds in {directory}, {chunks - made} of them before; by rank: {by}",
        _times(model_seconds, seconds),
    ]
    not_finite: dict[str, list[int]] = {name: [] for name in run.names}

    def stored(name: str) -> Iterator[torch.Tensor]:
        """The state's dtype holds them exactly: the hash is that of the same samples in memory."""
        for seeds, array in run.chunks(name):
            samples = torch.from_numpy(array)
            yield samples.to(DTYPES[args.dtype])
            not_finite[name] += _not_finite(samples, seeds)

    lines += [f"sha256 of the {name} {tensors_digest(stored(name))}" for name in run.names]
    _write_and_print(args, sampling, lines, lambda: {name: torch.from_numpy(run.load(name)) for name in run.names})
    _say_what_is_not_finite(args, not_finite)


def _write_pngs(sampling: _Sampling, run: shards.Shards, name: str, chunk: int) -> None:
    """The chunk's samples as PNGs."""
    from PIL import Image

    samples = torch.from_numpy(run.read(name, chunk))
    for path, pixels in zip(_png_paths(run, name, chunk), sampling.pixels(samples), strict=True):
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        write_whole(path, functools.partial(image.save, format="PNG"), clean=False)


def _png_paths(run: shards.Shards, name: str, chunk: int) -> list[pathlib.Path]:
    """A file for each seed of the chunk, in a folder for the name. Their numbers have the same number of digits."""
    digits = max(6, len(str(run.seeds.max(initial=0))))
    return [run.directory / name / f"{seed:0{digits}d}.png" for seed in run.seeds_of(chunk).tolist()]


_Chunks = list[tuple[str, int]]


def _begin_or_continue(
    args: argparse.Namespace, sampling: _Sampling, ranks: Ranks, directory: pathlib.Path
) -> tuple[shards.Shards, _Chunks, _Chunks]:
    """(the directory's Shards, the chunks that it lacks, the others that lack PNGs), the same on every rank.

    Raises UsageError for another run's directory.
    """
    settings = sampling.settings()

    def begin() -> tuple[_Chunks, _Chunks]:
        run = shards.begin(directory, settings, args.seeds)
        missing, damaged = run.missing()
        _check_room("--out", directory, len(missing) * args.batch * 4 * math.prod(sampling.model.shape))
        for path in damaged:
            print(f"warning: {path} is damaged, and is made again", file=sys.stderr)
        if not args.uint8:
            return missing, []
        for name in run.names:
            require_writable("--out", run.directory / name / "begun.png")
        others = {(name, chunk) for name in run.names for chunk in range(len(run))}.difference(missing)
        return missing, [each for each in sorted(others) if not all(path.exists() for path in _png_paths(run, *each))]

    try:
        missing, without_pngs = ranks.from_first(begin)
        run = shards.Shards(directory)
        run.compare(settings, f"rank {ranks.rank}")
    except (ValueError, OSError) as error:
        raise UsageError(f"--out: {error}") from error
    return run, missing, without_pngs


# ---- checks before the work ----


def _check_arguments(args: argparse.Namespace) -> pathlib.Path | None:
    """The directory among --out, or None. Raises UsageError for what can be refused before the model is loaded."""
    if args.steps < 1 or args.batch < 1:
        raise UsageError("--steps, --batch: expected at least 1")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads: expected at least 1, got {args.threads}")
    for path in args.out or ():
        if path.suffix not in ("", ".png", ".npz"):
            raise UsageError(f"--out: expected a .png or .npz file, or a directory (no suffix), got {path}")
    directories = [path for path in args.out or () if not path.suffix]
    if len(directories) > 1:
        raise UsageError(f"--out: expected one directory, got {len(directories)}")
    if args.uint8 and not directories and not any(path.suffix == ".npz" for path in args.out or ()):
        raise UsageError("--uint8: expected an --out that is a .npz or a directory (no suffix)")
    scaled = args.lambda_ is not None or args.lambda_linear or args.published or args.scaling
    if args.compare and not (scaled or args.correction or args.time_shift):
        raise UsageError(
            "--compare: expected a scaling, a correction or a time shift, to compare with none: --lambda, --correction or "
            "--time-shift"
        )
    return directories[0] if directories else None


def _check_files(args: argparse.Namespace, sampling: _Sampling, directory: pathlib.Path | None) -> None:
    """Raises UsageError for a file that cannot be written, or that cannot hold the model's samples."""
    pngs = any(path.suffix == ".png" for path in args.out or ()) or (args.uint8 and directory is not None)
    if pngs:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise UsageError("--out: a .png needs Pillow: pip install pillow") from error
    if pngs or args.uint8:
        try:
            size = sampling.pixels(torch.zeros(1, *sampling.model.shape)).size
            sampling.image_bytes = size * len(sampling.tables) if args.uint8 else 0
        except ValueError as error:
            raise UsageError(f"--out: {error}") from error
    if directory is not None:
        require_weights("--out", directory, sampling.model)
    for path in args.out or ():
        if path.suffix:
            require_writable("--out", path)


def _check_size(args: argparse.Namespace, sampling: _Sampling, directory: pathlib.Path | None) -> None:
    """Raises UsageError for more samples than the memory or the disk has room for."""
    count = len(args.seeds)
    size = count * (8 + sampling.seed_bytes + sampling.image_bytes)  # 8: the seed itself
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    in_memory = directory is None or any(path.suffix for path in args.out)
    if in_memory and size > memory:
        raise UsageError(
            f"--seeds: {count} samples need {size / GIB:,.1f} GiB of memory, and there are {memory / GIB:,.1f} GiB; "
            "--out DIRECTORY alone writes them a batch at a time"
        )
    try:
        for path in args.out or ():
            if path.suffix == ".npz" or (path == directory and not (path / "run.json").exists()):
                _check_room("--out", path, size)
    except OSError as error:
        raise UsageError(f"--out: {error}") from error


def _check_room(option: str, path: pathlib.Path, size: int) -> None:
    """Raises UsageError where so many bytes do not fit on the disk of the path, which need not exist yet."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if size > (free := shutil.disk_usage(existing).free):
        raise UsageError(f"{option}: {path} needs {size / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free")


def _warn_of_transfer(args: argparse.Namespace, model: Model) -> None:
    """Says where lambda, or a correction, comes from a file that was fitted for something else: the file's notes tell."""
    scalings = args.scaling or (args.lambda_ if str(args.lambda_).endswith(".json") else None)
    corrected = args.correction if str(args.correction).endswith(".json") else None
    for what, path, load in (("lambda", scalings, scaling.load), ("the correction", corrected, corrections.load)):
        if path is None:
            continue
        notes = load(path)[1]
        if changed := fitted_for_another(notes, args, model):
            differences = "; ".join(f"{name} {there}, here {here}" for name, (there, here) in changed.items())
            print(f"warning: {path} was fitted for {differences}: {what} need not transfer", file=sys.stderr)
        if "weights" in notes and notes["weights"] != (digest := model_digests(model)[1]):
            others = (
                "other weights" if notes["weights"] and digest else "weights that cannot be compared with the model's"
            )
            print(f"warning: {path} was fitted for {others}: {what} need not transfer", file=sys.stderr)


# ---- what is written and printed ----


def _not_finite(samples: torch.Tensor, seeds: np.ndarray) -> list[int]:
    """The seeds whose samples hold NaN or an infinity."""
    return seeds[~samples.flatten(1).isfinite().all(1).numpy()].tolist()


def _say_what_is_not_finite(args: argparse.Namespace, not_finite: Mapping[str, list[int]]) -> None:
    """A warning. With --uint8, whose bytes look like images, a ValueError after all is written."""
    total, said = len(args.seeds), []
    for name, seeds in not_finite.items():
        if seeds:
            of = "samples" if name == "samples" else f"samples of the {name}"
            said.append(f"{len(seeds)} of {total} {of} are not finite (seeds {spelled(seeds)})")
    if said and args.uint8:
        raise ValueError(f"--uint8: expected finite samples, got others: {', '.join(said)}; NaN was written as grey")
    if said:
        print(f"warning: {', '.join(said)}", file=sys.stderr)


def _times(model_seconds: float, seconds: float) -> str:
    return (
        f"time in the model {model_seconds:.2f} s, in the step and the loop around it {seconds - model_seconds:.2f} s"
    )


def _write_and_print(
    args: argparse.Namespace,
    sampling: _Sampling,
    lines: list[str],
    load: Callable[[], Mapping[str, torch.Tensor]],
) -> None:
    """Writes the files of --out, then prints the lines. Where a file cannot be written the rest is done, and then it raises.

    load: gives the samples by name. It is called once, and only where there is a file to write.
    """
    runs, failed = None, None
    for path in args.out or ():
        if path.suffix:
            try:
                runs = load() if runs is None else runs
                _write_samples(path, sampling, runs)
                lines.append(f"wrote {path}")
            except (OSError, ValueError, MemoryError) as error:
                failed = failed or error
    print("\n".join(lines))
    if failed:
        raise failed


def _write_samples(path: pathlib.Path, sampling: _Sampling, runs: Mapping[str, torch.Tensor]) -> None:
    """By the path's suffix: a picture of the samples, or the samples and their seeds; with --uint8 their bytes."""
    if path.suffix == ".png":
        shown = {name: sampling.images(samples) for name, samples in runs.items()}
        picture.save(picture.draw(*sampling.panels(shown)), path)
        return
    arrays: dict[str, Any] = {"seeds": np.array(sampling.args.seeds)}
    for name, samples in runs.items():
        if sampling.args.uint8:
            pixels = sampling.pixels(samples)
            in_rgb = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
            arrays["arr_0" if name == "samples" else name] = in_rgb
        else:
            arrays[name] = samples.float().numpy()
    if sampling.args.uint8 and sampling.args.label is not None:
        arrays["arr_1"] = np.full(len(sampling.args.seeds), sampling.args.label)
    write_whole(path, lambda file: np.savez(file, **arrays))
