"""The lambda that the authors report (arXiv 2308.15321; for DDIM, the README of their code), with their FIDs."""

import dataclasses

from . import scaling
from .scaling import EpsilonScaling

__all__ = ["SETTINGS", "Published", "published", "published_setting"]

# FIDs: baseline, then with Epsilon Scaling.
_ADM_DATASETS = ("CIFAR-10", "LSUN tower 64", "FFHQ 128", "ImageNet 64", "ImageNet 128")
_ADM_UNIFORM = {
    100: ((1.017, 3.37, 2.17), (1.006, 3.59, 2.91), (1.005, 14.52, 6.77), (1.006, 2.71, 2.39), (1.004, 3.55, 3.37)),
    50: ((1.017, 4.43, 2.49), (1.007, 7.28, 3.68), (1.007, 26.15, 9.50), (1.006, 3.75, 3.07), (1.004, 5.15, 4.33)),
    20: ((1.017, 10.36, 5.15), (1.011, 23.92, 8.22), (1.008, 59.35, 26.14), (1.006, 10.96, 7.52), (1.005, 12.48, 9.95)),
}
_ADM_LINEAR_20 = (
    (0.0025, 1.0, 10.36, 4.31), (0.0008, 1.0034, 23.92, 7.60), (0.0004, 1.0042, 59.35, 24.83),
    (0.0002, 1.0041, 10.96, 7.37), (0.00022, 1.00291, 12.48, 9.86),
)  # fmt: skip
_EDM = {  # NFE: (conditional, solver) -> (b, baseline, scaled)
    35: {(False, "heun"): (1.0005, 1.97, 1.95), (False, "euler"): (1.0034, 3.81, 2.80),
         (True, "heun"): (1.0006, 1.82, 1.80), (True, "euler"): (1.0035, 3.74, 2.59)},
    21: {(False, "heun"): (0.9985, 2.33, 2.24), (False, "euler"): (1.0043, 6.29, 4.32),
         (True, "heun"): (0.9983, 2.17, 2.08), (True, "euler"): (1.0045, 5.91, 3.74)},
    13: {(False, "heun"): (1.0060, 7.16, 6.54), (False, "euler"): (1.0048, 12.28, 8.39),
         (True, "heun"): (1.0070, 6.69, 6.16), (True, "euler"): (1.0051, 10.66, 6.59)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """One published setting: its FIDs without and with scaling (None where the source gives none)."""

    scaling: EpsilonScaling
    fid_baseline: float | None
    fid_scaled: float | None


def _settings() -> dict[tuple[str, str, int, str], Published]:
    settings = {}

    def add(
        key: tuple[str, str, int, str], lambda_t: EpsilonScaling, baseline: float | None, scaled: float | None
    ) -> None:
        source = "published for " + ", ".join(str(part) for part in key)
        _, _, calls, kind = key
        steps = (calls + 1) // 2 if kind == "heun" else calls  # of Heun's, the last has one call
        settings[key] = Published(dataclasses.replace(lambda_t, source=source, steps=steps), baseline, scaled)

    for steps, row in _ADM_UNIFORM.items():
        for dataset, (b, baseline, scaled) in zip(_ADM_DATASETS, row, strict=True):
            add(("ADM", dataset, steps, "uniform"), scaling.constant(b), baseline, scaled)
    for dataset, (k, b, baseline, scaled) in zip(_ADM_DATASETS, _ADM_LINEAR_20, strict=True):
        add(("ADM", dataset, 20, "linear"), scaling.linear(k, b, origin="cleanest"), baseline, scaled)
    for nfe, cells in _EDM.items():
        for (conditional, solver), (b, baseline, scaled) in cells.items():
            dataset = "CIFAR-10 conditional" if conditional else "CIFAR-10"
            add(("EDM", dataset, nfe, solver), scaling.constant(b), baseline, scaled)
    add(("DDIM", "CelebA", 100, "uniform"), scaling.constant(1.0012), None, None)
    return settings


SETTINGS = _settings()


def published_setting(system: str, dataset: str, steps: int, kind: str | None = None) -> Published:
    """The Published setting of `published`, with its FIDs."""
    if kind is None:
        kind = "heun" if system == "EDM" else "uniform"
    key = (system, dataset, steps, kind)
    known = list(SETTINGS)
    for place, (name, part) in enumerate(zip(("system", "dataset", "steps", "kind"), key, strict=True)):
        choices = list(dict.fromkeys(each[place] for each in known))
        if part not in choices:
            asked, those = "/".join(map(str, key)), ", ".join(map(repr, choices))
            of = f" of {', '.join(map(str, key[:place]))}" if place else ""
            raise KeyError(f"no published setting {asked}; {name}{of}: expected one of {those}, got {part!r}")
        known = [each for each in known if each[place] == part]
    return SETTINGS[key]


def published(system: str, dataset: str, steps: int, kind: str | None = None) -> EpsilonScaling:
    """The lambda that the authors report (arXiv 2308.15321; for DDIM, the README of their code).

    system "ADM": dataset "CIFAR-10", "LSUN tower 64", "FFHQ 128", "ImageNet 64" or "ImageNet 128"; steps 100, 50 or 20, of ADM's
        respacing, steps="20" of `samplers.ddpm`; kind "uniform" (the default) or, of 20 steps, "linear".
    system "EDM": dataset "CIFAR-10" or "CIFAR-10 conditional"; steps the model calls (NFE), 35, 21 or 13; kind the solver, "heun"
        (the default) or "euler".
    system "DDIM": dataset "CelebA"; steps 100; kind "uniform".
    Raises KeyError, which names the argument and what it may be, for any other.
    """
    return published_setting(system, dataset, steps, kind).scaling
