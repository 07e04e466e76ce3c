"""A training by plain Opacus that knows nothing of this package, and what it leaves behind."""

import functools

import numpy as np
import torch
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, BATCH, BOUND, NOISE = 90, 15, 4.0, 1.0
RATE = 1 / 6


@functools.cache
def data():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:ROWS] / 16, dtype=torch.float32)
    return TensorDataset(images, torch.tensor(labels[:ROWS]))


def make_model(classes=10):
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, classes))


def trained(seed=0, *, steps=5, save=None, bound=BOUND, engine=None, clipping="flat"):
    """Return {steps made: weights as the wrapped module has them} of one run."""
    torch.manual_seed(seed)
    engine = PrivacyEngine(accountant="rdp") if engine is None else engine
    module = make_model()
    made = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.2),
        data_loader=DataLoader(data(), batch_size=BATCH), noise_multiplier=NOISE,
        max_grad_norm=bound, clipping=clipping, criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    module, optimizer, loader = made[0], made[1], made[-1]
    kept, done = {0: copied(module)}, 0
    while done < steps:
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
            done += 1
            kept[done] = copied(module)
            if save is not None:
                engine.save_checkpoint(path=save / f"{done:03d}.pt", module=module)
            if done == steps:
                break
    return kept


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def norms(weights):
    """Norms of every row's own gradient, by one backward pass each: no code of ours."""
    module = make_model()
    module.load_state_dict({k.removeprefix("_module."): v for k, v in weights.items()})
    found = []
    for inputs, target in data():
        module.zero_grad()
        nn.functional.cross_entropy(module(inputs[None]), target[None]).backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm().item())
    return np.array(found)


def described(**changed):
    """Return the arguments that describe this training to `replay`."""
    return {
        "module": make_model, "dataset": data(), "criterion": nn.CrossEntropyLoss(),
        "noise_multiplier": NOISE, "max_grad_norm": BOUND, "sample_rate": RATE, "steps": 5,
        **changed,
    }  # fmt: skip
