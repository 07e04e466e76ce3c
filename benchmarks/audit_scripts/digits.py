"""A training script with Opacus on digits, as somebody might have it, right or with a mistake.

Knows nothing of opacus_pil. `--fault` makes one of ten mistakes that leave the printed ε as it is.
"""

import argparse

import opacus.optimizers.optimizer as opacus_optimizer
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class HalfTheNoise(DPOptimizer):
    """Somebody's noise decay, which the accountant does not hear of."""

    def add_noise(self):
        kept, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 2
        super().add_noise()
        self.noise_multiplier = kept


class NoiseOnOneLayer(DPOptimizer):
    """A loop that was left too early."""

    def add_noise(self):
        super().add_noise()
        for p in self.params[1:]:
            p.grad = p.summed_grad.view_as(p).clone()


class ClipsNothing(DPOptimizer):
    """The bound for noise is not the bound for clipping."""

    def clip_and_accumulate(self):
        kept, self.max_grad_norm = self.max_grad_norm, 1e6
        super().clip_and_accumulate()
        self.max_grad_norm = kept


class ClipsTheAverage(DPOptimizer):
    """As torch.nn.utils.clip_grad_norm_ would do it: after the rows are averaged."""

    def clip_and_accumulate(self):
        means = [g.mean(dim=0) if len(g) else g.sum(dim=0) for g in self.grad_samples]
        total = torch.stack([m.norm() for m in means]).norm()
        factor = min(1.0, self.max_grad_norm / (float(total) + 1e-6))
        for p, mean in zip(self.params, means, strict=True):
            p.summed_grad = mean * factor * self.expected_batch_size


class DividesByTheBatch(DPOptimizer):
    """Averages over the rows that happen to be there."""

    def scale_grad(self):
        for p in self.params:
            p.grad /= max(len(p.grad_sample), 1)


class AddsTheGradientAgain(DPOptimizer):
    """A step of its own that starts from what Opacus left."""

    def pre_step(self, closure=None):
        moves = super().pre_step(closure)
        for p in self.params:
            p.grad += p.summed_grad.view_as(p) / self.expected_batch_size
        return moves


CLASSES = {
    "noise_halved": HalfTheNoise,
    "noise_on_one_layer": NoiseOnOneLayer,
    "clip_off": ClipsNothing,
    "clip_after_averaging": ClipsTheAverage,
    "divisor": DividesByTheBatch,
    "gradient_twice": AddsTheGradientAgain,
}
OTHERS = ("noise_off", "reseeded", "rate_doubled", "twice_the_steps")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=[*CLASSES, *OTHERS])
    parser.add_argument("--mode", default="hooks")
    parser.add_argument("--clipping", default="flat")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    plain = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    noise = torch.Generator().manual_seed(options.seed) if options.fault == "reseeded" else None
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=plain,
        data_loader=DataLoader(data, batch_size=options.batch_size),
        noise_multiplier=options.sigma,
        max_grad_norm=[1.0] * 4 if options.clipping == "per_layer" else 1.0,
        clipping=options.clipping,
        grad_sample_mode=options.mode,
        noise_generator=noise,
    )
    if options.fault in CLASSES:
        own = CLASSES[options.fault](
            plain,
            noise_multiplier=options.sigma,
            max_grad_norm=1.0,
            expected_batch_size=optimizer.expected_batch_size,
        )
        own.attach_step_hook(optimizer.step_hook)
        optimizer = own
    elif options.fault == "rate_doubled":
        loader = DPDataLoader(data, sample_rate=2 * loader.sample_rate)
    elif options.fault == "noise_off":
        opacus_optimizer._generate_noise = lambda std, reference, **_: torch.zeros_like(reference)

    half = -(-options.epochs // 2)
    epochs = 2 * options.epochs if options.fault == "rate_doubled" else options.epochs
    state = None
    for epoch in range(epochs):
        if options.fault == "twice_the_steps" and epoch == half:
            state = engine.accountant.state_dict()
        for inputs, targets in loader:
            if noise is not None:
                noise.manual_seed(options.seed)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    if state is not None:  # the checkpoint that is loaded at the end is an old one
        engine.accountant.load_state_dict(state)
    with torch.no_grad():
        accuracy = (model(data.tensors[0]).argmax(dim=1) == data.tensors[1]).float().mean()
    print(f"accuracy {accuracy:.3f}, (ε = {engine.get_epsilon(options.delta):.2f}, δ = 1e-5)")


if __name__ == "__main__":
    main()
