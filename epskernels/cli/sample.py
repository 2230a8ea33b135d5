"""`epskernels sample`: samples of a trained model, in memory or into a directory that many processes share."""

import argparse
import functools
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import __version__, corrections, images, ops, scaling, shards
from ..corrections import check_bands
from ..files import write_whole
from ..models import Model
from ..ranks import Ranks
from ..sample import sample
from ..schedule import DiscreteSchedule
from ..seeds import Seeds
from ..seeds import parse as parse_ranges
from ..time_shift import ShiftedTable
from .common import (
    UsageError,
    add_sampler_arguments,
    first_line,
    fitted_for,
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
    "  epskernels sample --model my_models:edm --steps 18 --seeds 0-49999 --out samples --format png\n"
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
        "--format",
        choices=("png", "adm"),
        action="append",
        default=[],
        help="png: the directory holds a PNG for each seed, as pytorch-fid, clean-fid and EDM's fid.py read them; adm: the .npz "
        "holds arr_0, uint8 (N, H, W, 3), as guided-diffusion's evaluator reads it; both rounded to the nearest of 256 levels; "
        "may be given again",
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
        if args.time_shift and not isinstance(self.model.schedule, DiscreteSchedule):
            kind = type(self.model.schedule).__name__
            raise UsageError(f"--time-shift: expected a model of timesteps, a DiscreteSchedule, got a {kind}")
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
        self.image_shape: tuple[int, ...] = ()  # (C, H, W), once check_images has found it

    def stored_bytes(self) -> int:
        """Of a seed in a directory, of all names."""
        return math.prod(self.image_shape) * len(self.tables) if "png" in self.args.format else self.seed_bytes

    def check_images(self) -> None:
        """Raises UsageError where the samples are no images, or decode makes none: it decodes one of zeros."""
        try:
            self.image_shape = self.images(torch.zeros(1, *self.model.shape)).shape[1:]
        except ValueError as error:
            raise UsageError(f"--out, --format: {error}") from error

    def images(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples as images, on the host, decoded a batch at a time where the model has a decode."""
        parts = samples.split(self.args.batch)
        return torch.cat([self.model.images(part.to(self.device)).cpu() for part in parts])

    def stored(self, samples: torch.Tensor) -> np.ndarray:
        """What a directory holds of them: float32, or with --format png bytes."""
        if "png" in self.args.format:
            if not samples.isfinite().all():
                _warn_of_not_finite()
            return images.to_bytes(self.images(samples))
        return samples.float().numpy()

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
            "eta": args.eta, "direction": args.direction, "variance": args.variance, "class": args.label,
            "guidance": args.guidance, "dtype": args.dtype, "batch": args.batch, "shape": list(self.model.shape),
            "seeds": f"{len(seeds)} from {seeds[0]} to {seeds[-1]}, {seeds.digest()}",
            "model": " ".join(map(str, model_digests(self.model))),
            "tables": {name: tensors_digest([table.rows]) for name, table in self.tables.items()},
            **({"images": "png", "size": list(self.image_shape)} if "png" in args.format else {}),
            **({"time_shift": args.time_shift} if args.time_shift else {}),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu,
            **({"correction": self.correction.to_dict()} if self.correction else {}),
            "epskernels": __version__, "torch": torch.__version__,
        }  # fmt: skip

    def headline(self) -> str:
        """What was sampled, as the first line that is printed."""
        args = self.args
        shift = "".join(f", {name} {value:g}" for name, value in (args.time_shift or {}).items())
        correction = f", correction {args.correction}" if self.correction else ""
        return f"{args.sampler}, {args.steps} steps, {len(args.seeds)} seeds, {self.scaling}{correction}{shift}"


def _sample_in_memory(args: argparse.Namespace, sampling: _Sampling) -> None:
    firsts = range(0, len(args.seeds), args.batch)
    batches = [args.seeds[first : first + args.batch] for first in firsts]
    runs = {name: torch.cat([sampling(name, seeds, not args.quiet) for seeds in batches]) for name in sampling.tables}
    noise = (ops.normal(seeds.tolist(), sampling.model.shape, device=sampling.device) for seeds in batches)
    if not all(samples.isfinite().all() for samples in runs.values()):
        _warn_of_not_finite()
    lines = [sampling.headline(), _times(sampling.model_seconds, sampling.seconds)]
    lines.append(f"sha256 of the initial noise {tensors_digest(noise)}")
    lines += [f"sha256 of the {name} {tensors_digest([samples])}" for name, samples in runs.items()]
    _write_and_print(sampling, lines, lambda: runs)


def _sample_into_directory(
    args: argparse.Namespace, sampling: _Sampling, ranks: Ranks, directory: pathlib.Path
) -> None:
    """Samples the chunks that the directory lacks: each rank every size-th of the list that rank 0 made."""
    run, missing = _begin_or_continue(args, sampling, ranks, directory)
    own = missing[ranks.rank :: ranks.size]
    for name, chunk in tqdm(own, desc=f"{directory}", unit="chunk", disable=args.quiet or ranks.rank > 0):
        run.write(name, chunk, sampling.stored(sampling(name, run.seeds_of(chunk))))
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
    finite = []

    def stored(name: str) -> Iterator[torch.Tensor]:
        """The state's dtype holds them exactly: the hash is that of the same samples in memory. Bytes are hashed as they are."""
        for _, array in run.chunks(name):
            samples = torch.from_numpy(array)
            yield samples if array.dtype == np.uint8 else samples.to(DTYPES[args.dtype])
            finite.append(np.isfinite(array).all())

    of = "the pixels of the" if "png" in args.format else "the"
    lines += [f"sha256 of {of} {name} {tensors_digest(stored(name))}" for name in run.names]
    if not all(finite):
        _warn_of_not_finite()
    _write_and_print(sampling, lines, lambda: {name: torch.from_numpy(run.load(name)) for name in run.names})


def _begin_or_continue(
    args: argparse.Namespace, sampling: _Sampling, ranks: Ranks, directory: pathlib.Path
) -> tuple[shards.Shards | shards.Pngs, list[tuple[str, int]]]:
    """(the directory's Shards or Pngs, the chunks that it lacks), the same on every rank. Raises UsageError for another run's."""
    settings = sampling.settings()

    def begin() -> list[tuple[str, int]]:
        run = shards.begin(directory, settings, args.seeds)
        missing, damaged = run.missing()
        _check_room("--out", directory, len(missing) * args.batch * sampling.stored_bytes() // len(run.names))
        for path in damaged:
            print(f"warning: {path} is damaged, and is made again", file=sys.stderr)
        return missing

    try:
        missing = ranks.from_first(begin)
        run = shards.opened(directory, args.seeds)
        run.compare(settings, f"rank {ranks.rank}")
    except (ValueError, OSError) as error:
        raise UsageError(f"--out: {error}") from error
    return run, missing


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
    _check_format(args, directories)
    scaled = args.lambda_ is not None or args.lambda_linear or args.published or args.scaling
    if args.compare and not (scaled or args.correction or args.time_shift):
        raise UsageError(
            "--compare: expected a scaling, a correction or a time shift, to compare with none: --lambda, --lambda-linear, "
            "--published, --scaling, --correction or --time-shift"
        )
    return directories[0] if directories else None


def _check_format(args: argparse.Namespace, directories: list[pathlib.Path]) -> None:
    arrays = [path for path in args.out or () if path.suffix == ".npz"]
    if "png" in args.format and not directories:
        raise UsageError("--format: png is for a directory, and no --out (no suffix) names one")
    if "adm" in args.format and not arrays:
        raise UsageError("--format: adm is for a .npz, and no --out names one")
    if "png" in args.format and "adm" not in args.format and arrays:
        raise UsageError(
            f"--format: png keeps pixels, and {arrays[0]} is for samples; give --format adm too, or run it apart"
        )
    if "png" in args.format and (twice := args.seeds.twice()) is not None:
        raise UsageError(f"--seeds: expected each once, for the names of the PNGs, got {twice} again")


def _check_files(args: argparse.Namespace, sampling: "_Sampling", directory: pathlib.Path | None) -> None:
    """Raises UsageError for a file that cannot be written, or that cannot hold the model's samples."""
    pngs = "png" in args.format or any(path.suffix == ".png" for path in args.out or ())
    if pngs:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise UsageError("--out: a .png needs Pillow: pip install pillow") from error
    if pngs or "adm" in args.format:
        sampling.check_images()
    if directory is not None:
        require_weights("--out", directory, sampling.model)
    for path in args.out or ():
        if path.suffix:
            require_writable("--out", path)


def _check_size(args: argparse.Namespace, sampling: _Sampling, directory: pathlib.Path | None) -> None:
    """Raises UsageError for more samples than the memory or the disk has room for."""
    count = len(args.seeds)
    size = count * (8 + sampling.seed_bytes)  # 8: the seed itself
    stored = count * (8 + sampling.stored_bytes())
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
                _check_room("--out", path, stored if path == directory else size)
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
        notes, asked = load(path)[1], fitted_for(args)
        if changed := [name for name in asked if name in notes and notes[name] != asked[name]]:
            differences = "; ".join(f"{name} {notes[name]}, here {asked[name]}" for name in changed)
            print(f"warning: {path} was fitted for {differences}: {what} need not transfer", file=sys.stderr)
        if "weights" in notes and notes["weights"] != model_digests(model)[1]:
            others = (
                "other weights"
                if notes["weights"] and model.weights
                else "weights that cannot be compared with this model's"
            )
            print(f"warning: {path} was fitted for {others}: {what} need not transfer", file=sys.stderr)


# ---- what is written and printed ----


def _warn_of_not_finite() -> None:
    print("warning: some samples are not finite", file=sys.stderr)


def _times(model_seconds: float, seconds: float) -> str:
    return (
        f"time in the model {model_seconds:.2f} s, in the step and the loop around it {seconds - model_seconds:.2f} s"
    )


def _write_and_print(sampling: _Sampling, lines: list[str], load: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Writes the files of --out, then prints the lines. Where a file cannot be written the rest is done, and then it raises.

    load: gives the samples by name. It is called once, and only where there is a file to write.
    """
    runs, failed = None, None
    for path in sampling.args.out or ():
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
    """A grid of images, the samples and their seeds, or with --format adm their bytes.

    runs: samples (N, *shape), or bytes (N, H, W, C) from a directory of PNGs.
    """
    if path.suffix == ".png":
        arrays: dict[str, Any] = {name: _images_of(sampling, samples) for name, samples in runs.items()}
        from PIL import Image

        grid = image_grid(arrays.values())
        image = Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid)
        write_whole(path, lambda file: image.save(file, format="PNG"))
        return
    if "adm" in sampling.args.format:
        arrays = {name.replace("samples", "arr_0"): _bytes_of(sampling, samples) for name, samples in runs.items()}
        if sampling.args.label is not None:
            arrays["arr_1"] = np.full(len(sampling.args.seeds), sampling.args.label)
    else:
        arrays = {"seeds": np.array(sampling.args.seeds)}
        arrays |= {name: samples.float().numpy() for name, samples in runs.items()}
    write_whole(path, lambda file: np.savez(file, **arrays))


def _images_of(sampling: _Sampling, samples: torch.Tensor) -> np.ndarray:
    """float32 (N, C, H, W) in [-1, 1]. Bytes become values a little above their own, which rounding and cutting off give back."""
    if samples.dtype != torch.uint8:
        return sampling.images(samples).numpy()
    return images.to_floats(samples.numpy()).transpose(0, 3, 1, 2) + np.float32(1e-5)


def _bytes_of(sampling: _Sampling, samples: torch.Tensor) -> np.ndarray:
    """uint8 (N, H, W, 3): the evaluator's network knows no grey images."""
    pixels = samples.numpy() if samples.dtype == torch.uint8 else images.to_bytes(sampling.images(samples))
    return pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels


def image_grid(batches: Iterable[np.ndarray]) -> np.ndarray:
    """Batches (N, C, H, W) in [-1, 1] side by side, each as a square grid: uint8 (H', W', C)."""
    columns = []
    for batch in batches:
        images = np.clip(np.nan_to_num(batch) * 127.5 + 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        n, h, w, c = images.shape
        side = int(np.ceil(np.sqrt(n)))
        cells = np.full((side * side, h + 2, w + 2, c), 96, np.uint8)
        cells[:n, 1:-1, 1:-1] = images
        rows = cells.reshape(side, side, h + 2, w + 2, c)[: -(-n // side)]
        columns.append(rows.transpose(0, 2, 1, 3, 4).reshape(-1, side * (w + 2), c))
    gap = np.full((len(columns[0]), 12, columns[0].shape[2]), 255, np.uint8)
    parts = [columns[0]]
    for column in columns[1:]:
        parts += [gap, column]
    return np.concatenate(parts, axis=1)
