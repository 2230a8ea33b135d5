"""lambda_t, and the weights of a correction, by the gradient of a loss of the samples, through every step and model call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import scaling
from ..corrections import Correction, CorrectionLike, as_correction, corrected_rows
from ..ops import as_seeds, normal
from ..table import Table
from ..trajectory import Trajectory
from ..typing import Array, ModelCall, SeedsLike, Shape
from .norms import FITS, Sampler, fit, noise_alone, steps_of

__all__ = ["Learned", "learn"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `learn` found at the smallest loss: the scaling, constant 1 where lambda stayed; the correction, None where none was
    asked for. losses: of each round, the first that of the start."""

    scaling: scaling.EpsilonScaling
    losses: tuple[float, ...]
    correction: Correction | None = None


def learn(
    model: ModelCall,
    sampler: Sampler,
    loss: Callable[[Tensor], Tensor],
    seeds: SeedsLike,
    shape: Shape,
    *,
    form: str | None = "array",
    correction: CorrectionLike | None = None,
    rounds: int = 30,
    rate: float = 3e-3,
    progress: bool = False,
) -> Learned:
    """The lambda_t, and the weights of a correction, that Adam finds for a loss of the samples: a Learned.

    By the gradient through every step and model call.
    model: any callable (x, t) -> f, differentiable in x. sampler: a function of a scaling that returns the Table, which has no
    correction. loss: a function of the samples (B, *shape) that returns a scalar tensor. seeds: of the samples, the same in every
    round, all in one batch, with the activations of a whole trajectory in memory.
    form: of lambda_t, which begins at 1: "array", one for each step, "constant", "linear" or "quadratic"; None: it stays 1.
    correction: where its weights begin, such as corrections.dcw(0.0) or corrections.frequency(1.0). All its numbers are learned,
    both bands' too; kind, schedule, target, dims and the form of the weights stay: a number stays one for all steps, numbers
    are one for each step, and a table of levels keeps its levels. rate: Adam's, of lambda itself and of the weights themselves.
    It stops after `rounds`, where the loss may still fall, and finds the nearest valley only.
    Raises ValueError and TypeError naming the argument, also where the loss is not finite.
    """
    table, step_of_row = steps_of(sampler)
    if form not in (None, "array", *FITS):
        raise ValueError(f"form: expected one of {('array', *FITS)} or None, got {form!r}")
    made = as_correction(correction)
    if form is None and made is None:
        raise ValueError("form: expected one for lambda_t where there is no correction to learn, got None")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2 or not rate > 0:
        raise ValueError(f"rounds, rate: expected at least 2 and a rate above 0, got {rounds!r}, {rate!r}")
    lambdas = _Lambdas(form, table, step_of_row)
    weights = None if made is None else _Weights(made, table)
    optimizer = torch.optim.Adam([*lambdas.learned, *(weights.learned if weights else ())], lr=rate)
    seeds = as_seeds(seeds, table.device)
    losses: list[float] = []
    best: tuple[Array, Correction | None] = (np.ones(lambdas.steps), made)
    for _ in tqdm(range(rounds), desc=f"{table.name}, gradient", disable=not progress):
        rows = lambdas.rows(table)
        if weights:
            rows = weights.rows(table, rows)
        run = Trajectory(table, table.initial_sigma * normal(seeds, shape), rows=rows)
        for row in range(len(table)):
            run.step(row, *run.call(model, row), seeds=seeds)
        value = loss(run.x)
        if not torch.isfinite(value):
            raise ValueError(
                f"loss: expected a finite number, got {value.item()} in round {len(losses)}; rate is {rate}"
            )
        if not losses or value.item() < min(losses):
            best = (lambdas.values(), weights.correction() if weights else None)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return Learned(lambdas.scaling(best[0]), tuple(losses), best[1])


class _Lambdas:
    """lambda_t as Adam sees it: 1 + basis @ weights, a value for each step."""

    def __init__(self, form: str | None, table: Table, step_of_row: np.ndarray):
        self.form, self.steps = form, int(step_of_row.max()) + 1
        options: dict[str, Any] = {"dtype": torch.float64, "device": table.device}
        i = torch.linspace(1, -1, self.steps, **options) if self.steps > 1 else torch.zeros(1, **options)
        self.basis = torch.eye(self.steps, **options)
        if form in FITS:
            self.basis = torch.stack([i**power for power in range(FITS[form] + 1)], 1)
        self.weights = torch.zeros(self.basis.shape[1], **options, requires_grad=form is not None)
        self.of_row = torch.from_numpy(step_of_row).to(table.device)
        # Where x is noise alone, with the second call of such a step.
        self.alone = torch.from_numpy(np.isin(step_of_row, step_of_row[noise_alone(table)])).to(table.device)

    @property
    def learned(self) -> list[Tensor]:
        return [] if self.form is None else [self.weights]

    def rows(self, table: Table) -> Tensor:
        if self.form is None:
            return table.rows
        lambda_t = 1 + self.basis @ self.weights
        return table.scaled_rows(torch.where(self.alone, 1.0, lambda_t[self.of_row]))

    def values(self) -> Array:
        return (1 + self.basis @ self.weights).detach().cpu().numpy()

    def scaling(self, values: Array) -> scaling.EpsilonScaling:
        if self.form is None:
            return scaling.constant(1.0)
        return scaling.array(values, origin="noisiest") if self.form == "array" else fit(values, self.form).scaling


class _Weights:
    """The numbers of a correction as Adam sees them."""

    def __init__(self, correction: Correction, table: Table):
        self.start, bands = correction, ("low",) if correction.kind == "dc" else ("low", "high")
        self.numbers = {
            band: torch.from_numpy(correction.numbers(band)).to(table.device).requires_grad_() for band in bands
        }

    @property
    def learned(self) -> list[Tensor]:
        return list(self.numbers.values())

    def rows(self, table: Table, rows: Tensor) -> Tensor:
        return corrected_rows(table, self.start, **self.numbers, rows=rows)

    def correction(self) -> Correction:
        """As they are now. Raises ValueError for factors that are not above 0."""
        numbers = {band: values.detach().cpu().numpy() for band, values in self.numbers.items()}
        numbers.setdefault("high", numbers["low"])  # dc has one weight for both
        made = as_correction(self.start.with_numbers(**numbers).to_dict())
        assert made is not None
        return made
