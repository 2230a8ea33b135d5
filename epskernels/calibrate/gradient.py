"""lambda_t by the gradient of a loss of the samples, through every step and model call."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import scaling
from ..ops import as_seeds, normal
from ..trajectory import Trajectory
from ..typing import ModelCall, SeedsLike, Shape
from .norms import FITS, Sampler, fit, noise_alone, steps_of

__all__ = ["Learned", "learn"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `learn` found: the scaling of the smallest loss, and the loss of each round, the first without scaling."""

    scaling: scaling.EpsilonScaling
    losses: tuple[float, ...]


def learn(
    model: ModelCall,
    sampler: Sampler,
    loss: Callable[[Tensor], Tensor],
    seeds: SeedsLike,
    shape: Shape,
    *,
    form: str = "array",
    rounds: int = 30,
    rate: float = 3e-3,
    progress: bool = False,
) -> Learned:
    """The lambda_t that Adam finds for a loss of the samples, by the gradient through every step and model call: a Learned.

    model: as in `sample`, differentiable in x. sampler: as in `match_norms`. loss: a function of the samples (B, *shape) that
    returns a scalar tensor. seeds: of the samples, the same in every round, all in one batch, with the activations of a whole
    trajectory in memory. form: "array", a lambda_t for each step, "constant", "linear" or "quadratic". rate: Adam's, of
    lambda itself.
    Raises ValueError naming the argument, also where the loss is not finite.
    """
    table, step_of_row = steps_of(sampler)
    if form != "array" and form not in FITS:
        raise ValueError(f"form: expected one of {('array', *FITS)}, got {form!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2 or not rate > 0:
        raise ValueError(f"rounds, rate: expected at least 2 and a rate above 0, got {rounds!r}, {rate!r}")
    steps, device = int(step_of_row.max()) + 1, table.device
    i = (
        torch.linspace(1, -1, steps, dtype=torch.float64, device=device)
        if steps > 1
        else torch.zeros(1, dtype=torch.float64, device=device)
    )
    basis = torch.eye(steps, dtype=torch.float64, device=device)
    if form != "array":
        basis = torch.stack([i**power for power in range(FITS[form] + 1)], 1)
    seeds = as_seeds(seeds, device)
    weights = torch.zeros(basis.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=rate)
    losses: list[float] = []
    best = np.ones(steps)
    of_row = torch.from_numpy(step_of_row).to(device)
    # Where x is noise alone, with the second call of such a step.
    alone = torch.from_numpy(np.isin(step_of_row, step_of_row[noise_alone(table)])).to(device)
    for _ in tqdm(range(rounds), desc=f"{table.name}, gradient", disable=not progress):
        lambda_t = 1 + basis @ weights
        rows = table.scaled_rows(torch.where(alone, 1.0, lambda_t[of_row]))
        run = Trajectory(table, table.initial_sigma * normal(seeds, shape), rows=rows)
        for row in range(len(table)):
            run.step(row, *run.call(model, row), seeds=seeds)
        value = loss(run.x)
        if not torch.isfinite(value):
            raise ValueError(
                f"loss: expected a finite number, got {value.item()} in round {len(losses)}; rate is {rate}"
            )
        if not losses or value.item() < min(losses):
            best = lambda_t.detach().cpu().numpy()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    found = scaling.array(best, origin="noisiest") if form == "array" else fit(best, form).scaling
    return Learned(found, tuple(losses))
