"""The command line: `epskernels sample`, `epskernels calibrate` and `epskernels info`."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time

import numpy as np
import torch
from tqdm.auto import tqdm

from . import __version__, build, calibrate, exposure, images, models, ops, quality, samplers, scaling, schedule, shards
from .files import check_writable, write_whole
from .ranks import Ranks
from .sample import sample
from .seeds import parse as parse_ranges

NOT_HERE = {"flow_euler", "pfgmpp"}  # samplers for other networks than those of a diffusers UNet2DModel pipeline
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class UsageError(Exception):
    """Bad arguments: one line, exit status 2."""


def parse_seeds(text):
    """ "0-3,7" -> Seeds of 0, 1, 2, 3, 7"""
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def _add_sampler(run):
    """The arguments that name a model and a sampler for it: of `make_table`."""
    run.add_argument(
        "--model",
        type=pathlib.Path,
        default=models.DIGITS,
        metavar="DIR",
        help="a diffusers pipeline directory (unet/, scheduler/); default: the digits that ship with the package",
    )
    run.add_argument(
        "--sampler", choices=sorted(set(samplers.SAMPLERS) - NOT_HERE), default="ddpm", help="default: %(default)s"
    )
    run.add_argument("--steps", type=int, default=50, help="sampler steps; default: %(default)s")
    run.add_argument("--eta", type=float, help="DDIM's eta; default: 0")
    run.add_argument("--direction", choices=("scaled", "unscaled"), help="DDIM's direction term; default: scaled")
    run.add_argument(
        "--variance",
        choices=("fixed_small", "fixed_large", "learned_range"),
        help="DDPM's variance; default: learned_range where the model has learned one, else what its scheduler says",
    )
    run.add_argument("--class", type=int, dest="label", metavar="N", help="class, for a model with classes")
    run.add_argument(
        "--guidance", type=float, default=1.0, metavar="G", help="classifier-free guidance; default: 1, none"
    )


def build_parser():
    parser = argparse.ArgumentParser(
        prog="epskernels", description="Fused sampling steps for diffusion models, with Epsilon Scaling."
    )
    parser.add_argument("--version", action="version", version=f"epskernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, compiled parts, backends, and why one is missing")
    info.add_argument("--cmakedir", action="store_true", help="print only the folder for CMake's -Depskernels_DIR")

    run = commands.add_parser(
        "sample",
        help="sample images from a trained model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Sample images from a trained model.",
        epilog="examples:\n"
        "  epskernels sample --out digits.png\n"
        "  epskernels sample --sampler ddim --steps 20 --lambda 1.004 --compare --out both.png\n"
        "  epskernels sample --lambda ADM/CIFAR-10/20/linear --steps 20 --seeds 0-255 --out samples.npz\n"
        "  torchrun --nproc-per-node 4 -m epskernels sample --seeds 0-49999 --out samples",
    )
    _add_sampler(run)
    which = run.add_mutually_exclusive_group()
    which.add_argument(
        "--lambda",
        dest="lambda_",
        metavar="VALUE",
        help="Epsilon Scaling, eps/lambda: a number; a number for each step, the noisiest first: 1.01,1.005,1; JSON such as "
        '{"k": 0.0025, "b": 1, "origin": "cleanest"}; SYSTEM/DATASET/STEPS[/KIND] as in the paper: ADM/CIFAR-10/20; the path of '
        "a .json that `epskernels calibrate` wrote; default: 1, none",
    )
    which.add_argument(
        "--lambda-linear",
        type=float,
        nargs=2,
        metavar=("K", "B"),
        help="the same as --lambda with JSON: lambda = K*i + B, i = 0 at the cleanest step",
    )
    which.add_argument(
        "--published",
        nargs="+",
        metavar="SETTING",
        help="the same as --lambda SYSTEM/DATASET/STEPS[/KIND]: ADM CIFAR-10 20 linear",
    )
    which.add_argument("--scaling", type=pathlib.Path, metavar="FILE", help="the same as --lambda FILE")
    run.add_argument("--seeds", type=parse_seeds, default="0-63", help="such as 0-63 or 1,2,5-9; default: %(default)s")
    run.add_argument("--batch", type=int, default=64, help="samples per model call; default: %(default)s")
    run.add_argument("--dtype", choices=DTYPES, default="float32", help="of the state; default: %(default)s")
    run.add_argument("--backend", choices=ops.BACKENDS, default="auto", help="default: %(default)s")
    run.add_argument("--device", default="cpu", help="default: %(default)s")
    run.add_argument(
        "--compare", action="store_true", help="also sample the same seeds without scaling, shown on the left"
    )
    run.add_argument(
        "--out",
        type=pathlib.Path,
        action="append",
        metavar="FILE",
        help=".png for a grid of images, .npz for the samples and seeds, a name without suffix for a directory that is written "
        "a batch at a time, by all processes of torchrun, and continued where a run was interrupted; may be given again",
    )
    run.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each process; default: torch's, and 1 for a directory written on CPUs",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    fit = commands.add_parser(
        "calibrate",
        help="find lambda_t for a model and a sampler",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Find lambda_t for a model and a sampler, from real images; write it for `epskernels sample --scaling`.",
        epilog="examples:\n"
        "  epskernels calibrate --sampler ddim --steps 20 --data mnist --out lambda.json --plots exposure\n"
        "  epskernels calibrate --method search --bounds 0.97 1.03 --trials 8 --data mnist --out lambda.json\n"
        "  epskernels sample --sampler ddim --steps 20 --scaling lambda.json --compare --out both.png",
    )
    _add_sampler(fit)
    fit.add_argument(
        "--data",
        required=True,
        help="real images: a .npy or .npz (N, C, H, W), a directory of image files or of one for each class, or mnist",
    )
    fit.add_argument("--images", type=int, default=256, metavar="N", help="how many of them; default: %(default)s")
    fit.add_argument(
        "--method",
        choices=("norms", "search"),
        default="norms",
        help="norms: match those of training, one run; search: trials, by the Frechet distance in the features of a classifier "
        "of 28 x 28 digits; default: %(default)s",
    )
    fit.add_argument("--fit", choices=("array", *calibrate.FITS), help="form of lambda_t by norms; default: array")
    fit.add_argument(
        "--skip",
        type=int,
        metavar="N",
        help="cleanest steps without lambda_t, or that the fit leaves out; default: a quarter",
    )
    fit.add_argument("--bounds", type=float, nargs=2, metavar=("LOW", "HIGH"), help="search: of b; default: 0.97 1.03")
    fit.add_argument(
        "--k-bounds", type=float, nargs=2, metavar=("LOW", "HIGH"), help="search: of k; lambda is then a line, and --bounds "
        "are for its middle",
    )  # fmt: skip
    fit.add_argument("--trials", type=int, default=8, metavar="N", help="search: default: %(default)s")
    fit.add_argument("--samples", type=int, default=1000, metavar="N", help="search: in a trial; default: %(default)s")
    fit.add_argument("--cache", type=pathlib.Path, metavar="FILE", help="search: a .json of trials, to go on from")
    fit.add_argument("--seed", type=int, default=0, help="of the first image and sample; default: %(default)s")
    fit.add_argument("--batch", type=int, default=64, help="samples per model call; default: %(default)s")
    fit.add_argument("--device", default="cpu", help="default: %(default)s")
    fit.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE", help="the .json to write")
    fit.add_argument(
        "--plots",
        type=pathlib.Path,
        metavar="STEM",
        help="also measure the exposure bias without scaling: STEM.json, STEM.png, and STEM-lambda.png",
    )
    fit.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _scaling(args):
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
    return scaling.as_scaling(1.0 if args.lambda_ is None else _lambda_value(args.lambda_), "--lambda")


def _lambda_value(text):
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


def make_table(args, model, scaling_):
    """The table of the sampler that the arguments name, for this model. The sampler's signature says which options it takes."""
    sampler = samplers.SAMPLERS[args.sampler]
    takes = inspect.signature(sampler).parameters
    options = {"scaling": scaling_, "prediction": model.prediction, "guidance": args.guidance, "clip": model.clip}
    for name in ("eta", "direction", "variance"):
        if getattr(args, name) is not None:
            if name not in takes:
                raise UsageError(f"--{name}: not an option of --sampler {args.sampler}")
            options[name] = getattr(args, name)
    if "variance" in takes:
        options.setdefault("variance", model.variance)
    grid = {}
    if inspect.Parameter.VAR_KEYWORD in {each.kind for each in takes.values()}:  # the options of DiscreteSchedule.grid
        grid = {"spacing": "trailing"} if args.sampler.startswith("dpmpp_") else dict(model.grid)
        if args.sampler == "ddim":
            grid["final"] = model.final
    try:
        return sampler(model.schedule, args.steps, **options, **grid)
    except TypeError as error:
        if not str(error).startswith("schedule: expected a KarrasSchedule"):
            raise
    return sampler(schedule.KarrasSchedule(model=model.schedule), args.steps, **options)


def image_grid(batches):
    """Batches (N, C, H, W) in [-1, 1] side by side, each as a square grid: uint8 (H', W', C)."""
    columns = []
    for batch in batches:
        images = np.clip(np.nan_to_num(batch) * 127.5 + 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        n, h, w, c = images.shape
        side = int(np.ceil(np.sqrt(n)))
        cells = np.full((side * side, h + 2, w + 2, c), 96, np.uint8)
        cells[:n, 1:-1, 1:-1] = images
        rows = cells.reshape(side, side, h + 2, w + 2, c)[: -(-n // side)]
        columns += [rows.transpose(0, 2, 1, 3, 4).reshape(-1, side * (w + 2), c), None]
    gap = np.full((len(columns[0]), 12, columns[0].shape[2]), 255, np.uint8)
    return np.concatenate([gap if column is None else column for column in columns[:-1]], axis=1)


def _check_writable(option, path):
    """Makes its folder; what cannot be written is said before the work, not after it."""
    try:
        check_writable(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        why = "a directory" if isinstance(error, IsADirectoryError) else error
        raise UsageError(f"{option}: {path} cannot be written: {why}") from error


def _check_room(option, path, size):
    """Whether so many bytes fit on the disk of a path that need not be there yet."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise UsageError(f"{option}: {path} needs {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free")


def _check_size(args, sampling, directory):
    """What no memory and no disk has room for is said before the work."""
    count = len(args.seeds)
    size = count * (8 + sampling.sample_bytes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    in_memory = directory is None or any(path.suffix for path in args.out)
    if in_memory and size > memory:
        raise UsageError(
            f"--seeds: {count} samples need {size / 2**30:,.1f} GiB of memory, and there are {memory / 2**30:,.1f} GiB; "
            "--out DIRECTORY alone writes them a batch at a time"
        )
    try:
        for path in args.out or ():
            if path.suffix == ".npz" or (path == directory and not (path / "run.json").exists()):
                _check_room("--out", path, size)
    except OSError as error:
        raise UsageError(f"--out: {error}") from error


def _check_files(args, model):
    for path in args.out or ():
        if path.suffix == ".png":
            if model.shape[0] not in (1, 3):
                raise UsageError(f"--out: expected images of 1 or 3 channels for a .png, got {model.shape[0]}")
            try:
                import PIL.Image  # noqa: F401
            except ImportError as error:
                raise UsageError("--out: a .png needs Pillow: pip install pillow") from error
        if path.suffix:
            _check_writable("--out", path)


def _write(path, runs, args):
    arrays = {name: samples.float().numpy() for name, samples in runs.items()}
    if path.suffix == ".png":
        from PIL import Image

        grid = image_grid(arrays.values())
        image = Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid)
        write_whole(path, lambda file: image.save(file, format="PNG"))
    else:
        write_whole(path, lambda file: np.savez(file, seeds=np.array(args.seeds), **arrays))


def _finish(args, said, runs):
    """Writes the files, of the runs that runs() gives, then prints: neither keeps the other from being done."""
    paths, failed, made = [path for path in args.out or () if path.suffix], None, None
    for path in paths:
        try:
            made = runs() if made is None else made
            _write(path, made, args)
            said.append(f"wrote {path}")
        except (OSError, ValueError, MemoryError) as error:
            failed = failed or error
    print("\n".join(said))
    if failed:
        raise failed


def _sha256(tensors):
    """Of all of them as if they were one."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_usage(args):
    """The directory among --out, or None."""
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
    if args.compare and not (args.lambda_ is not None or args.lambda_linear or args.published or args.scaling):
        raise UsageError(
            "--compare: expected a scaling to compare with none: --lambda, --lambda-linear, --published or --scaling"
        )
    return directories[0] if directories else None


def _load(args, device):
    """The model, and it as `sample` calls it."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UsageError(f"--device: {str(device)!r} cannot be used: {_line(error)}") from error
    try:
        model = models.load(args.model, device)
        return model, model.callable(args.label, args.guidance)
    except ImportError as error:
        raise _missing(error) from error
    except (ValueError, OSError) as error:
        raise UsageError(error) from error


def _missing(error):
    if error.name is None or "pip" in str(error) or not isinstance(error, ModuleNotFoundError):
        return UsageError(_line(error))
    return UsageError(f"{error.name} is missing: pip install diffusers safetensors pillow")


class _Sampling:
    """The model and the tables that the arguments name; counts the seconds in the model and in all."""

    def __init__(self, args, device):
        self.model, self.call = _load(args, device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        try:
            self.scaling = _scaling(args)
            scalings = {"baseline": scaling.constant(1.0)} if args.compare else {}
            scalings["samples"] = self.scaling
            self.tables = {name: make_table(args, self.model, value).to(device) for name, value in scalings.items()}
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UsageError(error.args[0] if isinstance(error, KeyError) else error) from error
        self.sample_bytes = 4 * math.prod(self.model.shape) * len(self.tables)
        self.args, self.device, self.model_seconds, self.seconds = args, device, 0.0, 0.0

    def _timed(self, x, t):
        start = time.perf_counter()
        output = self.call(x, t)
        _wait(self.device)
        self.model_seconds += time.perf_counter() - start
        return output

    def __call__(self, name, seeds, progress=False):
        """The samples of a batch of seeds, on the host."""
        start = time.perf_counter()
        dtype = DTYPES[self.args.dtype]
        samples = sample(self._timed, self.tables[name], seeds, self.model.shape, dtype=dtype, progress=progress).cpu()
        self.seconds += time.perf_counter() - start
        return samples

    def settings(self):
        """All that decides the bits of a chunk, for run.json. Not the backend: all have the same bits."""
        args, seeds = self.args, self.args.seeds
        on_gpu = self.device.type == "cuda"
        cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        return {
            "names": list(self.tables), "sampler": args.sampler, "steps": args.steps, "scaling": str(self.scaling),
            "eta": args.eta, "direction": args.direction, "variance": args.variance, "class": args.label,
            "guidance": args.guidance, "dtype": args.dtype, "batch": args.batch, "shape": list(self.model.shape),
            "seeds": f"{len(seeds)} from {seeds[0]} to {seeds[-1]}, {seeds.digest()}",
            "model": " ".join(_digests(self.model)),
            "tables": {name: _sha256([table.rows]) for name, table in self.tables.items()},
            "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu,
            "epskernels": __version__, "torch": torch.__version__,
        }  # fmt: skip


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digests(model):
    """Of the network's configuration, but for where it lies, and of its weights."""
    config = {key: value for key, value in model.network.config.items() if not key.startswith("_")}
    return _digest(config), _sha256(model.network.state_dict().values())


def _fitted_for(args):
    """What lambda_t depends on: it does not transfer to another sampler, or number of steps."""
    names = ("sampler", "steps", "eta", "direction", "variance", "label", "guidance")
    return {name: getattr(args, name) for name in names}


def _warn_of_transfer(args, model):
    """Where lambda is of a file: what it was fitted for stands in its notes."""
    path = args.scaling or (args.lambda_ if str(args.lambda_).endswith(".json") else None)
    if path is None:
        return
    notes = scaling.load(path)[1]
    now = _fitted_for(args)
    if changed := [name for name in now if name in notes and notes[name] != now[name]]:
        said = "; ".join(f"{name} {notes[name]}, here {now[name]}" for name in changed)
        print(f"warning: {path} was fitted for {said}: lambda need not transfer", file=sys.stderr)
    if "weights" in notes and notes["weights"] != _digests(model)[1]:
        print(f"warning: {path} was fitted for other weights: lambda need not transfer", file=sys.stderr)


def run_sample(args):
    directory = _check_usage(args)
    try:
        ranks = Ranks()
    except ValueError as error:
        raise UsageError(error) from error
    try:
        device = ranks.device(args.device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--device: {args.device!r} cannot be used: {_line(error)}") from error
    if ranks.size > 1 and directory is None:
        raise UsageError(f"--out: expected a directory (no suffix), which {ranks.size} processes can write to")
    threads, before = args.threads, torch.get_num_threads()
    if directory and device.type == "cpu":
        threads = threads or 1  # the same bits, whatever torchrun and the machine make of it
    try:
        if threads:
            torch.set_num_threads(threads)
        with ops.use_backend(args.backend), ranks:
            sampling = _Sampling(args, device)
            _check_files(args, sampling.model)
            _check_size(args, sampling, directory)
            if ranks.rank == 0:
                _warn_of_transfer(args, sampling.model)
            if directory is None:
                _sample_in_memory(args, sampling)
            else:
                _sample_into(args, sampling, ranks, directory)
    finally:
        torch.set_num_threads(before)


def _sample_in_memory(args, sampling):
    firsts = range(0, len(args.seeds), args.batch)
    batches = [args.seeds[first : first + args.batch] for first in firsts]
    runs = {name: torch.cat([sampling(name, seeds, not args.quiet) for seeds in batches]) for name in sampling.tables}
    noise = (ops.normal(seeds.tolist(), sampling.model.shape, device=sampling.device) for seeds in batches)
    if not all(samples.isfinite().all() for samples in runs.values()):
        print("warning: some samples are not finite", file=sys.stderr)
    said = [
        f"{args.sampler}, {args.steps} steps, {len(args.seeds)} seeds, {sampling.scaling}",
        _times(sampling.model_seconds, sampling.seconds),
    ]
    said.append(f"sha256 of the initial noise {_sha256(noise)}")
    said += [f"sha256 of the {name} {_sha256([samples])}" for name, samples in runs.items()]
    _finish(args, said, lambda: runs)


def _sample_into(args, sampling, ranks, directory):
    """Chunk by chunk into a directory: what is missing there, each rank every size-th of the list that rank 0 made."""
    settings = sampling.settings()

    def begin():
        run = shards.begin(directory, settings, args.seeds)
        missing, damaged = run.missing()
        _check_room("--out", directory, len(missing) * args.batch * 4 * math.prod(sampling.model.shape))
        for path in damaged:
            print(f"warning: {path} is damaged, and is made again", file=sys.stderr)
        return missing

    try:
        missing = ranks.from_first(begin)
        run = shards.Shards(directory)
        run.compare(settings, f"rank {ranks.rank}")
    except (ValueError, OSError) as error:
        raise UsageError(f"--out: {error}") from error
    mine = missing[ranks.rank :: ranks.size]
    for name, chunk in tqdm(mine, desc=f"{directory}", unit="chunk", disable=args.quiet or ranks.rank > 0):
        run.write(name, chunk, sampling(name, run.seeds_of(chunk)).float().numpy())

    counts = ranks.gather((len(mine), sampling.model_seconds, sampling.seconds))
    run.clean()
    if ranks.rank > 0:
        return
    made, model_seconds, seconds = (sum(values) for values in zip(*counts, strict=True))
    chunks, by = len(run) * len(run.names), " ".join(str(count) for count, *_ in counts)
    said = [
        f"{args.sampler}, {args.steps} steps, {len(args.seeds)} seeds, {sampling.scaling}",
        f"{chunks} chunks of up to {args.batch} seeds in {directory}, {chunks - made} of them before; by rank: {by}",
        _times(model_seconds, seconds),
    ]
    finite = []

    def stored(name):
        """The state's dtype holds them exactly: the hash is that of the same samples in memory."""
        for _, array in run.chunks(name):
            yield torch.from_numpy(array).to(DTYPES[args.dtype])
            finite.append(np.isfinite(array).all())

    said += [f"sha256 of the {name} {_sha256(stored(name))}" for name in run.names]
    if not all(finite):
        print("warning: some samples are not finite", file=sys.stderr)
    _finish(args, said, lambda: {name: torch.from_numpy(run.load(name)) for name in run.names})


def run_calibrate(args):
    """Writes the scaling; its notes say what it was fitted to, so that `sample` can tell where it is used elsewhere."""
    for name, low in (
        ("steps", 1),
        ("images", 2),
        ("batch", 1),
        ("trials", 2),
        ("samples", 2),
        ("seed", 0),
    ):
        if getattr(args, name) < low:
            raise UsageError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    if (last := 2**63 - max(args.images, args.samples)) < args.seed:
        raise UsageError(f"--seed: expected at most {last}, since images and samples count up from it, got {args.seed}")
    if args.out.suffix != ".json":
        raise UsageError(f"--out: expected a .json file, got {args.out}")
    searches = args.method == "search"
    for name, wrong in (
        ("fit", searches),
        ("bounds", not searches),
        ("k_bounds", not searches),
        ("cache", not searches),
    ):
        if wrong and getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: not an option of --method {args.method}")
    model, call = _load(args, args.device)

    def sampler(scaling_):
        return make_table(args, model, scaling_).to(args.device)

    try:
        data = torch.from_numpy(images.load(args.data, model.shape, args.images))
        sampler(scaling.constant(1.0))
    except ImportError as error:
        raise _missing(error) from error
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(error) from error
    plots = _plots(args, searches)
    written = {}
    for option, paths in (("--out", [args.out]), ("--cache", [args.cache] if args.cache else []), ("--plots", plots)):
        for path in paths:
            if written.setdefault(path.resolve(), option) != option:
                raise UsageError(f"{option}: {path} is the file of {written[path.resolve()]} already")
            _check_writable(option, path)
    progress = not args.quiet
    config, weights = _digests(model)
    notes = _fitted_for(args) | {"weights": weights, "method": args.method, "images": len(data), "data": str(args.data)}
    notes["seed"] = args.seed
    if searches:
        key = {**_fitted_for(args), "samples": args.samples, "seed": args.seed, "network": config, "weights": weights,
               "rows": _sha256([sampler(1.0).rows]), "data": _sha256([data])}  # fmt: skip
        found = _search(args, model, call, sampler, data, _digest(key), progress)
        fitted = found.scaling
        notes |= {
            "score": found.score,
            "score without scaling": _finite(found.baseline),
            "trials": [[k, b, _finite(score)] for k, b, score in found.trials],
        }
        said = [
            f"{fitted.label}: Frechet distance {found.score:.5g} of {args.samples} samples, {found.baseline:.5g} without"
        ]
    else:
        ones = np.ones(calibrate.steps_of(sampler)[1].max() + 1)
        unmatched = calibrate.Matched(
            args.sampler, len(data), ones, ones, ones, ones
        )  # refuses what the found would, now
        kind, skip = args.fit or "array", unmatched.skip if args.skip is None else args.skip
        try:
            unmatched.scaling(kind, skip)
        except ValueError as error:
            raise UsageError(f"--fit, --skip: {error}") from error
        matched = calibrate.match_norms(call, sampler, data, seed=args.seed, batch=args.batch, progress=progress)
        fitted = matched.scaling(kind, skip)
        possible = [name for name, degree in calibrate.FITS.items() if degree < len(ones) - skip]
        fits = {name: calibrate.fit(matched.lambda_t, name, skip) for name in possible}
        notes |= {"lambda_t": matched.lambda_t.tolist(), "standard_error": matched.standard_error.tolist()}
        said = [
            f"{name}: {', '.join(f'{c:.5g}' for c in line.coefficients)}; R^2 {line.r2:.3f}"
            for name, line in fits.items()
        ]
    fitted.save(args.out, **notes)
    print("\n".join([*said, f"wrote {args.out}"]))
    if plots:
        measured = exposure.measure(call, sampler(1.0), data, seed=args.seed, batch=args.batch, progress=progress)
        measured.save(plots[0])
        measured.plot(plots[1])
        if not searches:
            matched.plot(plots[2], args.fit, skip)
        print(f"wrote {args.plots}.json and plots")


def _plots(args, searches):
    """The files of --plots."""
    if args.plots is None:
        return []
    if not args.plots.name:
        raise UsageError(f"--plots: expected the stem of files' names, got {args.plots}")
    plots = [args.plots.with_name(f"{args.plots.name}{end}") for end in (".json", ".png", "-lambda.png")]
    try:
        exposure.figures(1)
    except ImportError as error:
        raise UsageError(f"--plots: {error}") from error
    return plots[:2] if searches else plots


def _search(args, model, call, sampler, data, key, progress):
    """Trials by the distance of samples to the data, in the features of the digits' classifier."""
    if tuple(model.shape) != (1, 28, 28):
        raise UsageError(
            f"--method: search measures in features of 28 x 28 digits, this model makes {model.shape}; use --method norms, or "
            "epskernels.calibrate.search with a score of your own"
        )
    real, seeds = quality.digit_features(data), range(args.seed, args.seed + args.samples)

    def score(candidate):
        table = sampler(candidate)
        batches = [seeds[first : first + args.batch] for first in range(0, len(seeds), args.batch)]
        samples = torch.cat([sample(call, table, batch, model.shape).cpu() for batch in batches])
        return quality.frechet(real, quality.digit_features(samples)) if samples.isfinite().all() else np.inf

    bounds = args.bounds or (0.97, 1.03)
    options = {"trials": args.trials, "cache": args.cache, "key": key, "progress": progress}
    try:
        if args.k_bounds:
            return calibrate.search(score, (args.k_bounds, bounds), steps=args.steps, **options)
        return calibrate.search(score, bounds, **options)
    except (ValueError, ImportError) as error:
        raise UsageError(error) from error


def _finite(score):
    """As JSON can say it."""
    return score if np.isfinite(score) else None


def _times(model_seconds, seconds):
    return (
        f"time in the model {model_seconds:.2f} s, in the step and the loop around it {seconds - model_seconds:.2f} s"
    )


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_info(args):
    if args.cmakedir:
        print(build.cmake_dir())
        return
    print(f"epskernels {__version__}, in {pathlib.Path(__file__).parent}")
    others = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "triton", "diffusers"))
    print(f"python {platform.python_version()}, torch {torch.__version__}, {others}")
    extension = build.extension()
    if extension:
        details = ", ".join(f"{key} {value}" for key, value in extension.build_info().items())
        print(f"compiled: {extension.__file__}\n  {details}")
        print(f"cpu capability: {extension.cpu_capability()} of {', '.join(extension.cpu_capabilities())}, ", end="")
        print(f"{torch.get_num_threads()} threads")
        print(f"for programs without Python: {build.library()}, epskernels_DIR={build.cmake_dir()}")
    print(f"cuda kernel: {build.cuda_targets() or 'not compiled'}")
    for i in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, sm_{properties.major}{properties.minor}")
        except RuntimeError as error:
            print(f"GPU {i}: {_line(error)}")
    print("backends:")
    for name in ("cpu", "cuda", "triton"):
        print(f"  {name:<10} {build.why_missing(name) or 'available'}")
    print("  reference  pure PyTorch, any device: the specification")
    on_gpu = next((name for name in ("cuda", "triton") if not build.why_missing(name)), "reference")
    print(
        f"by default: {'reference' if build.why_missing('cpu') else 'cpu'} for CPU tensors, {on_gpu} for CUDA tensors"
    )
    given = {"EPSKERNELS_BACKEND": "(not set)"} | dict(os.environ)
    for name in sorted(name for name in given if name.startswith("EPSKERNELS_")):
        print(f"{name}={given[name]}")
    for fault in build.environment_faults():
        print(f"wrong: {fault}")


class _Stream:
    """stdout or stderr while a command works: writing to it never raises. `kept`: what could not be written, `error`: why."""

    def __init__(self, stream):
        self.stream, self.kept, self.error = stream, "", None if stream else "closed"

    def write(self, text):
        if self.error is None:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            try:
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
                self.stream.flush()
                return len(text)
            except (OSError, ValueError) as error:  # a full disk, a pipe that nobody reads; closed
                self.error = error
                with contextlib.suppress(
                    OSError, ValueError, AttributeError
                ):  # or Python fails at it again, at its end
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.stream.fileno())
                    os.close(nowhere)
        self.kept += text
        return len(text)

    def flush(self):
        """Every write has."""

    def __getattr__(self, name):
        return getattr(self.stream, name)


def main(argv=None):
    out = _Stream(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(_Stream(sys.stderr)):
        args = build_parser().parse_args(argv)
        status = _run(args)
        if out.kept and args.command != "info":  # which can be asked again
            print(
                f"epskernels {args.command}: stdout cannot be written: {out.error}\n{out.kept}", end="", file=sys.stderr
            )
            if isinstance(out.error, OSError) and not isinstance(out.error, BrokenPipeError):
                status = status or 1
        return status


def _run(args):
    """The exit status."""
    try:
        {"info": run_info, "sample": run_sample, "calibrate": run_calibrate}[args.command](args)
    except KeyboardInterrupt:
        print(f"epskernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except (UsageError, RuntimeError, ValueError, OSError, MemoryError, ImportError) as error:
        print(f"epskernels {args.command}: {_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _line(error):
    """What an error says first, and what it announces there by a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])
