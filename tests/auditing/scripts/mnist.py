"""A training script in the manner of Opacus's MNIST example; knows nothing of opacus_pil."""

import argparse

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import nn, optim
from torchvision import datasets, transforms

MEAN, STD = 0.1307, 0.3081


class SampleConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        return self.fc2(F.relu(self.fc1(x.view(-1, 512))))


def main():
    parser = argparse.ArgumentParser(description="MNIST with Opacus")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-n", "--epochs", type=int, default=10)
    parser.add_argument("-r", "--n-runs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("-c", "--max-per-sample-grad_norm", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-root", default="../mnist")
    args = parser.parse_args()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    train_loader = torch.utils.data.DataLoader(
        datasets.MNIST(args.data_root, train=True, download=True, transform=transform),
        batch_size=args.batch_size,
    )
    test_loader = torch.utils.data.DataLoader(
        datasets.MNIST(args.data_root, train=False, transform=transform), batch_size=500
    )
    for _ in range(args.n_runs):
        model = SampleConvNet().to(args.device)
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optim.SGD(model.parameters(), lr=args.lr, momentum=0),
            data_loader=train_loader,
            noise_multiplier=args.sigma,
            max_grad_norm=args.max_per_sample_grad_norm,
        )
        for epoch in range(1, args.epochs + 1):
            for data, target in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data), target)
                loss.backward()
                optimizer.step()
            epsilon = engine.accountant.get_epsilon(delta=args.delta)
            print(f"Train Epoch: {epoch} Loss: {loss:.4f} (ε = {epsilon:.2f}, δ = {args.delta})")
        with torch.no_grad():
            right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in test_loader)
        print(f"Test set: Accuracy: {right}/{len(test_loader.dataset)}")


if __name__ == "__main__":
    main()
