"""`epskernels demo`: the bundled digits with and without a correction, from the same seeds: a picture, and two distances."""

import argparse
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import corrections, models, quality, samplers
from ..sample import sample
from ..seeds import Seeds
from ..table import Table
from . import picture
from .common import UsageError, missing_package, require_writable
from .sample import parse_seeds

TEXTS = {
    "help": "show what a correction does: digits with and without, as a picture",
    "description": "Sample the digits that ship with the package with and without a correction, from the same seeds. Write one "
    "picture of both, and print how far each is from real digits. Takes about half a minute of processor time.",
}
STEPS = 10
# Chosen for this network and sampler by the Frechet distance over other seeds, 100,000 to 100,499: 34.6 without, 4.4 at -0.12,
# 3.5 at -0.14, 3.2 at -0.16, 3.7 at -0.2.
WEIGHT = -0.16
EXPLAINED = f"dc({WEIGHT}): after each step, {-WEIGHT:.0%} of the way from x to the image that it predicts"
# Frechet distances of seeds 0 to 999; a deep test measures them again. The grid is that of the model's scheduler, "leading".
MEASURED = {"without": 34.0, "with": 2.3, "trailing": 7.0}
SHOWN, BATCH, MOST = 16, 64, 10_000  # samples of each kind in the picture, in a model call, at all
NEXT = """\
What to do next. A weight fits one model, sampler, spacing and number of steps: search for yours (docs/choosing_lambda.md).
The search compares samples with your images in the features of --features, or by a --score of your own.
  search           epskernels calibrate --correction dc --sampler ddim --steps 10 --model DIR --data IMAGES --out best.json
  your pipeline    pipe = epskernels.diffusers.fuse(pipe, correction="best.json")
  your own model   table = samplers.ddim(schedule.cosine(), 10, correction="best.json")
                   images = epskernels.sample(model, table, range(8), (3, 32, 32))  # model: any callable (x, t)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `epskernels demo`."""
    parser.add_argument(
        "--out", type=pathlib.Path, default="samples.png", metavar="FILE", help="the picture; default: %(default)s"
    )
    parser.add_argument(
        "--seeds",
        type=parse_seeds,
        default="0-255",
        help=f"of the distances, the first {SHOWN} of them of the picture; such as 0-63 or 1,2,5-9; default: %(default)s",
    )


def run(args: argparse.Namespace) -> None:
    """Samples, writes the picture, and prints the distances and what to do next."""
    if args.out.suffix != ".png":
        raise UsageError(f"--out: expected a .png file, got {args.out}")
    if not 2 <= len(args.seeds) <= MOST:
        raise UsageError(f"--seeds: expected 2 to {MOST:,} seeds, got {len(args.seeds):,}")
    require_writable("--out", args.out)
    start = time.perf_counter()
    try:
        import PIL.Image  # noqa: F401

        model = models.load()
    except ImportError as error:
        raise missing_package(error) from error
    sampler = {"prediction": model.prediction, "clip": model.clip, "final": model.final, **model.grid}
    tables = {
        name: samplers.ddim(model.schedule, STEPS, correction=correction, **sampler)
        for name, correction in (("without", None), (f"with dc({WEIGHT})", corrections.dc(WEIGHT)))
    }
    digits = _sampled(model, tables, args.seeds)
    real = quality.real_digits()
    distances = {name: quality.frechet(real, quality.digit_features(digits[name])) for name in tables}
    panels = {f"{name}: Frechet distance {distances[name]:.1f}": digits[name][:SHOWN] for name in tables}
    picture.save(
        picture.draw(panels, [f"{_setting(args.seeds)}; the first {min(SHOWN, len(args.seeds))} are shown", EXPLAINED]),
        args.out,
    )
    if picture.can_show(sys.stdout):
        print(picture.preview(panels, shutil.get_terminal_size().columns))
    print(_report(args, distances, time.perf_counter() - start))


def _sampled(model: models.Model, tables: Mapping[str, Table], seeds: Seeds) -> dict[str, np.ndarray]:
    """The digits of each table, (N, 1, 28, 28)."""
    batches = [seeds[first : first + BATCH] for first in range(0, len(seeds), BATCH)]
    call, made = model.callable(), {}
    with tqdm(total=len(tables) * len(seeds), desc="sampling", unit="digit", disable=None) as bar:
        for name, table in tables.items():
            parts = []
            for batch in batches:
                parts.append(sample(call, table, batch, model.shape))
                bar.update(len(batch))
            made[name] = torch.cat(parts).numpy()
    return made


def _report(args: argparse.Namespace, distances: Mapping[str, float], seconds: float) -> str:
    lines = [f"{_setting(args.seeds)} ({seconds:.0f} s)"]
    lines += [f"  {name:<16} Frechet distance {distance:5.1f}" for name, distance in distances.items()]
    lines += [
        f"  {EXPLAINED}.",
        "  It is part of the sampler's coefficients: a step has no more to do than before.",
        f"  The distance is that of {len(args.seeds)} samples from 5,000 real digits, in the features of a small classifier.",
        "  It is not FID. By fewer samples it reads higher.",
        f"  By 1,000 samples: {MEASURED['without']} without, {MEASURED['with']} with; "
        f'another grid alone, spacing="trailing", {MEASURED["trailing"]}.',
        f"wrote {args.out}",
        NEXT,
    ]
    return "\n".join(lines)


def _setting(seeds: Seeds) -> str:
    return f"ddim, {STEPS} steps, the digits' network; both from the same {len(seeds)} seeds, from {seeds[0]} on"
