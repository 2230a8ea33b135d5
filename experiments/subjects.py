"""The networks that the experiments measure, each as a Subject: what is sampled, from which samplers, and compared with what.

digits      the bundled network: epsilon and a learned variance, cosine schedule (`epskernels/digits`)
digits_edm  a small network of the same digits as an EDM denoiser D(x; sigma), for VE samplers as it is, and for VP samplers
            by D(x/alpha; sigma/alpha) (`experiments/digits_edm`)
power       daily curves of electrical power demand, 24 hours: epsilon, linear schedule (`experiments/power`)

`SUBJECTS[name]()` makes one. `experiments/train.py` trains the last two. Nothing here measures.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable

import numpy as np
import torch

from epskernels import images, models, quality, samplers, schedule, time_shift

FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class TimeShift:
    """The window of a time shift, in training timesteps, and the timestep down to which it acts."""

    window: int
    cutoff: int = 300


class Made:
    """A sampler on a schedule, with its options: a function of (steps, scaling, c) that returns what `epskernels.sample` takes.

    c: a Correction, a TimeShift in the form that is the sampler's own, or None.
    """

    def __init__(self, sampler, path, **options):
        self.sampler, self.path, self.options = sampler, path, options

    def __call__(self, steps, s, c=None):
        if isinstance(c, TimeShift):
            window = dataclasses.asdict(c)
            return time_shift.ShiftedTable(self.sampler, self.path, steps, scaling=s, **window, **self.options)
        return self.sampler(self.path, steps, scaling=s, correction=c, **self.options)

    @property
    def timesteps(self):
        """How many the network was trained on; 0 where it knows noise levels alone."""
        return len(self.path if isinstance(self.path, schedule.DiscreteSchedule) else self.path.model or ())


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One network on one set of data.

    name: for files and tables. weights: the files that its numbers depend on. shape: of one sample.
    schedule: the DiscreteSchedule of its VP samplers.
    call: (x, t) -> f, as `epskernels.sample` takes it, for the tables of any of `samplers`.
    real: () -> float32 (N, *shape), all there is, in the network's units: what it was trained on. In no order: its first n are a
    sample of all.
    features: (N, *shape), an array or a tensor, -> float64 (N, D).
    to_stored: samples, a float32 tensor (N, *shape), -> the array that is kept. from_stored: that -> float32 (N, *shape).
    samplers: {name: Made}.
    trial: samples over which a lambda is chosen.
    """

    name: str
    weights: tuple
    shape: tuple
    schedule: schedule.DiscreteSchedule
    call: Callable
    real: Callable
    features: Callable
    to_stored: Callable
    from_stored: Callable
    samplers: dict
    trial: int = 500


def weights_of(name):
    return FOLDER / name / "weights.safetensors"


def load_weights(network, name):
    """The network with the weights that are kept in this folder, as float32, for inference."""
    from safetensors.torch import load_file

    weights = load_file(weights_of(name))
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    return network.eval().requires_grad_(False)


# ---- MNIST digits: what both networks share ----

DIGIT = (1, 28, 28)


def digits_to_bytes(samples):
    """As an image file would hold them, uint8 (N, 1, 28, 28); what is not finite is black, and far from any digit."""
    return (samples.nan_to_num(-1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def digits_from_bytes(stored):
    return stored.astype(np.float32) / 127.5 - 1


@functools.cache
def real_digits():
    """The 5,000, in an order of which every beginning has all ten digits: the file is sorted by them."""
    digits = images.load("mnist", DIGIT)
    return digits[np.arange(len(digits)) * 3089 % len(digits)]  # a stride without a common divisor: each digit once


DIGITS = {
    "shape": DIGIT, "real": real_digits, "features": quality.digit_features,
    "to_stored": digits_to_bytes, "from_stored": digits_from_bytes,
}  # fmt: skip


# ---- the bundled network ----


def digits():
    model = models.load()
    path, karras = model.schedule, schedule.KarrasSchedule(model=model.schedule)
    tables = {
        "ddpm": Made(samplers.ddpm, path, variance="learned_range", clip=1.0),
        # ADM-style and LDM-style DDIM, as the paper's code bases clip them.
        "ddim": Made(samplers.ddim, path, clip=1.0),
        "ddim-unscaled": Made(samplers.ddim, path, direction="unscaled"),
        "edm_euler": Made(samplers.edm_euler, karras, prediction="epsilon"),
        "edm_heun": Made(samplers.edm_heun, karras, prediction="epsilon"),
        "dpmpp_2m": Made(samplers.dpmpp_2m, path, spacing="leading"),
    }
    weights = (models.DIGITS / "unet" / "diffusion_pytorch_model.safetensors", quality.WEIGHTS)
    return Subject(name="digits", weights=weights, schedule=path, call=model.callable(), samplers=tables, **DIGITS)


# ---- EDM preconditioning ----


class DigitDenoiser(torch.nn.Module):
    """D(x; sigma) = c_skip*x + c_out*F(c_in*x; c_noise) (Karras et al., arXiv 2206.00364, table 1 and eq. 7).

    x: (B, 1, 28, 28), a digit in [-1, 1] and noise. sigma: (B,), above 0. F works on patches of 2 x 2 pixels as channels: a
    convolution of few channels costs more time than its arithmetic.
    """

    # Root mean square of the digits about 0, not about their mean: it is what the table's derivation takes the variance for.
    sigma_data = 0.96

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DModel

        self.network = UNet2DModel(
            sample_size=14,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 48),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
        )

    def forward(self, x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()
        c_noise = sigma.log().flatten() / 4
        patches = torch.nn.functional.pixel_unshuffle(c_in * x, 2)
        # The embedding's sinusoids are made for timesteps up to 1,000.
        f = self.network(patches, 100 * c_noise, return_dict=False)[0]
        return c_skip * x + c_out * torch.nn.functional.pixel_shuffle(f, 2)


def digits_edm():
    network, path, karras = load_weights(DigitDenoiser(), "digits_edm"), schedule.linear(), schedule.KarrasSchedule()
    alpha, ratio = torch.tensor(path.alpha), torch.tensor(path.sigma / path.alpha)

    def call(x, t):
        """D at a noise level, or, where t is a timestep, D(x/alpha; sigma/alpha)."""
        if t.is_floating_point():
            return network(x, t)
        return network(x / alpha[t].float().reshape(-1, 1, 1, 1), ratio[t].float())

    vp = {"prediction": "sample", "clip": 1.0}
    tables = {
        "edm_euler": Made(samplers.edm_euler, karras),
        "edm_heun": Made(samplers.edm_heun, karras),
        "ddpm": Made(samplers.ddpm, path, **vp),
        "ddim": Made(samplers.ddim, path, **vp),
        "dpmpp_2m": Made(samplers.dpmpp_2m, path, prediction="sample", spacing="leading"),
    }
    weights = (weights_of("digits_edm"), quality.WEIGHTS)
    return Subject(name="digits_edm", weights=weights, schedule=path, call=call, samplers=tables, **DIGITS)


# ---- daily curves of power demand ----

CURVE = (1, 24)


@functools.cache
def real_curves():
    """The 1,096 daily curves of ItalyPowerDemand, its two parts together: float32 (1096, 1, 24).

    As they are in the archive, where each curve has mean 0 and variance 1 (its squares' sum over 23). The package that holds the
    files is not imported. Raises ImportError without it.
    """
    try:
        package = importlib.metadata.distribution("sktime")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("the power demand curves come inside sktime: pip install sktime", name="sktime") from error
    curves = []
    for part in ("TRAIN", "TEST"):
        path = package.locate_file(f"sktime/datasets/data/ItalyPowerDemand/ItalyPowerDemand_{part}.ts")
        lines = pathlib.Path(path).read_text().splitlines()
        rows = [line.split(":")[0].split(",") for line in lines if line and line[0] not in "#@"]  # "24 values:class"
        curves += [[float(value) for value in row] for row in rows]
    return np.array(curves, dtype=np.float32).reshape(-1, *CURVE)


def curve_features(curves):
    """The curves themselves: float64 (N, 24)."""
    return torch.as_tensor(curves).reshape(-1, CURVE[1]).double().numpy()


def curves_to_stored(samples):
    """float32; what is not finite is 100, and far from any curve."""
    return samples.nan_to_num(100).clamp(-100, 100).numpy()


class CurveNetwork(torch.nn.Module):
    """eps of noisy curves x (B, 1, 24) at t (B,), of 1,000: residual layers, each shifted by an embedding of t."""

    def __init__(self, width=128, layers=3):
        super().__init__()
        self.width = width
        self.into, self.out = torch.nn.Linear(CURVE[1], width), torch.nn.Linear(width, CURVE[1])
        self.time = torch.nn.Linear(width, width)
        self.shift = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.first = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.second = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))

    def forward(self, x, t):
        silu = torch.nn.functional.silu
        frequencies = torch.logspace(0, -4, self.width // 2, device=x.device)
        angles = t.float()[:, None] * frequencies
        time = silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)))
        h = self.into(x.flatten(1))
        for shift, first, second in zip(self.shift, self.first, self.second, strict=True):
            h = h + second(silu(first(silu(h)) + shift(time)))
        return self.out(silu(h)).reshape(x.shape)


def power():
    network, path = load_weights(CurveNetwork(), "power"), schedule.linear()
    karras = schedule.KarrasSchedule(model=path)
    # No clipping: curves have no bounds.
    tables = {
        "ddpm": Made(samplers.ddpm, path, clip=None),
        "ddim": Made(samplers.ddim, path),
        "ddim-unscaled": Made(samplers.ddim, path, direction="unscaled"),
        "edm_euler": Made(samplers.edm_euler, karras, prediction="epsilon"),
        "edm_heun": Made(samplers.edm_heun, karras, prediction="epsilon"),
        "dpmpp_2m": Made(samplers.dpmpp_2m, path, spacing="leading"),
    }
    return Subject(
        name="power", weights=(weights_of("power"),), shape=CURVE, schedule=path, call=network, real=real_curves,
        features=curve_features, to_stored=curves_to_stored, from_stored=lambda stored: stored, samplers=tables,
        trial=5000,
    )  # fmt: skip


SUBJECTS = {"digits": digits, "digits_edm": digits_edm, "power": power}
