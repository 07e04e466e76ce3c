"""Small trainings by Opacus, right or with a fault, for the tests of this folder."""

import functools

import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


def private(
    *,
    seed=0,
    engine=None,
    noise=1.0,
    batch=150,
    clipping="flat",
    mode="hooks",
    bound=1.0,
    **options,
):
    """Return (engine, model, optimizer, criterion, loader) on digits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    engine = PrivacyEngine(accountant="rdp") if engine is None else engine
    made = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(digits(), batch_size=batch), noise_multiplier=noise,
        max_grad_norm=[bound] * 4 if clipping == "per_layer" else bound, clipping=clipping,
        grad_sample_mode=mode, criterion=nn.CrossEntropyLoss(), **options,
    )  # fmt: skip
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    return engine, made[0], made[1], criterion, made[-1]


def train(model, optimizer, criterion, loader, *, steps=24, each=lambda: None):
    """Make so many steps."""
    done = 0
    while done < steps:
        for inputs, targets in loader:
            each()
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break


RATE = 1 / 10
STEPS = 20


def halves(size=600, seed=3):
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(digits(), rows[: size // 2]), Subset(digits(), rows[size // 2 :])


def make_model():
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def weights_after(dataset, *, noise=1.0, rate=RATE, steps=STEPS, lr=0.5, epochs=0):
    """Plain DP-SGD by hand (or, without noise, plain descent): weights before and after."""
    torch.manual_seed(0)
    module = make_model()
    kept = {0: {k: v.clone() for k, v in module.state_dict().items()}}
    if epochs:
        inputs, targets = (torch.stack([dataset[i][j] for i in range(len(dataset))])
                           for j in range(2))  # fmt: skip
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(epochs):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
        kept[steps] = {k: v.clone() for k, v in module.state_dict().items()}
        return kept
    engine = PrivacyEngine(accountant="rdp")
    wrapped, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        data_loader=DataLoader(dataset, batch_size=int(len(dataset) * rate)),
        noise_multiplier=noise, max_grad_norm=1.0,
    )  # fmt: skip
    train(wrapped, optimizer, nn.CrossEntropyLoss(), loader, steps=steps)
    kept[steps] = {k: v.clone() for k, v in wrapped.state_dict().items()}
    return kept


def described(inside, checkpoints, **changed):
    return {
        "make_model": make_model, "checkpoints": checkpoints, "dataset": inside,
        "noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": RATE, "steps": STEPS,
        "delta": 1e-5, "criterion": nn.CrossEntropyLoss(), "exposed": 1, **changed,
    }  # fmt: skip


def exchanged(optimizer, kind):
    """Let a DPOptimizer be of a subclass of its own, as a script's would be."""
    optimizer.__class__ = type(kind.__name__, (kind, type(optimizer)), {})
    return optimizer


class NoNoise(DPOptimizer):
    def add_noise(self):
        for p in self.params:
            p.grad = p.summed_grad.view_as(p).clone()


class HalfNoise(DPOptimizer):
    def add_noise(self):
        kept, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 2
        super().add_noise()
        self.noise_multiplier = kept


class NoClip(DPOptimizer):
    def clip_and_accumulate(self):
        kept, self.max_grad_norm = self.max_grad_norm, 1e6
        super().clip_and_accumulate()
        self.max_grad_norm = kept


class DividesByTheBatch(DPOptimizer):
    def scale_grad(self):
        for p in self.params:
            p.grad /= max(len(p.grad_sample), 1)


class Twice(DPOptimizer):
    def pre_step(self, closure=None):
        moves = super().pre_step(closure)
        for p in self.params:
            p.grad += p.summed_grad.view_as(p) / self.expected_batch_size
        return moves


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
