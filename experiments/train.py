"""Train the networks of `experiments/subjects.py`, seeded; a run that was stopped goes on from its last checkpoint.

    python experiments/train.py digits_edm --out runs/digits_edm    # EDM: sigma log-normal, weight 1/c_out^2 (arXiv 2206.00364)
    python experiments/train.py power --out runs/power              # DDPM: L_simple (arXiv 2006.11239, eq. 14), linear betas

Writes weights.safetensors, the moving average of the weights as float16, train_log.csv and checkpoint.pt.
"""

import argparse
import copy
import csv
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from subjects import CurveNetwork, DigitDenoiser, real_curves, real_digits

from epskernels import schedule

P_MEAN, P_STD = -0.6, 1.4  # of log sigma: EDM's are -1.2 and 1.2 for sigma_data 0.5
WARMUP = 200
PATH = schedule.linear()


def edm_loss(network, x_0, draw):
    sigma = (P_MEAN + P_STD * torch.randn(len(x_0), generator=draw)).exp()
    noise = torch.randn(x_0.shape, generator=draw)
    wide = sigma.reshape(-1, *[1] * (x_0.dim() - 1))
    weight = (wide**2 + network.sigma_data**2) / (wide * network.sigma_data) ** 2
    return (weight * (network(x_0 + wide * noise, sigma) - x_0) ** 2).mean()


def simple_loss(network, x_0, draw):
    t = torch.randint(len(PATH), (len(x_0),), generator=draw)
    alpha, sigma = (torch.tensor(values).float()[t].reshape(-1, 1, 1) for values in (PATH.alpha, PATH.sigma))
    eps = torch.randn(x_0.shape, generator=draw)
    return (network(alpha * x_0 + sigma * eps, t) - eps).square().mean()


@dataclasses.dataclass(frozen=True)
class Recipe:
    network: Callable
    data: Callable
    loss: Callable  # (network, x_0, generator) -> scalar
    steps: int
    batch: int
    rate: float
    ema: float


RECIPES = {
    "digits_edm": Recipe(DigitDenoiser, real_digits, edm_loss, steps=4500, batch=64, rate=2e-3, ema=0.999),
    "power": Recipe(CurveNetwork, real_curves, simple_loss, steps=40_000, batch=128, rate=1e-3, ema=0.9995),
}


def save(path, network):
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=RECIPES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--stop", type=int, help="stop after this step of them; another run goes on from there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.subject]
    steps = args.steps or recipe.steps
    settings = {"subject": args.subject, "steps": steps, "seed": args.seed}

    torch.manual_seed(args.seed)
    data = torch.from_numpy(recipe.data())
    network = recipe.network().train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=0.0)

    def factor(step):
        return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parts = {"network": network, "average": average, "optimizer": optimizer, "rates": rates}
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log_path, first, before = args.out / "checkpoint.pt", args.out / "train_log.csv", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            parser.error(f"--out: {args.out} was begun with {state['settings']}, expected {settings}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, before = state["step"], state["seconds"]
        rows = log_path.read_text().splitlines(keepends=True)
        log_path.write_text("".join([rows[0], *(row for row in rows[1:] if int(row.split(",")[0]) <= first)]))
    else:
        log_path.write_text("step,loss,learning_rate,seconds\n")

    print(f"{sum(p.numel() for p in network.parameters())} parameters, {tuple(data.shape)}, step {first} of {steps}")
    started, total, count = time.monotonic() - before, 0.0, 0
    stop = min(steps, args.stop or steps)
    for step in range(first, stop):
        # A generator per step: a resumed run draws what an uninterrupted one would have drawn.
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x_0 = data[torch.randint(len(data), (recipe.batch,), generator=draw)]
        loss = recipe.loss(network, x_0, draw)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        total, count = total + loss.item(), count + 1
        if (step + 1) % args.save_every == 0 or step + 1 == stop:
            seconds = time.monotonic() - started
            row = [step + 1, f"{total / count:.5f}", f"{rates.get_last_lr()[0]:.2e}", f"{seconds:.0f}"]
            with open(log_path, "a", newline="") as log:
                csv.writer(log).writerow(row)
            print(*row, flush=True)
            total, count = 0.0, 0
            save(args.out / "weights.safetensors", average)
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "settings": settings, "step": step + 1, "seconds": seconds}, checkpoint)


if __name__ == "__main__":
    main()
