"""Suggestion: constants of training for deletions that are cheap later, from public data only.

Trains heads on public features for a grid of constants, with the noise that each would have, and
keeps the most accurate one whose certificate reaches the target in the steps that were asked for.
Knows formulas of certificates and public tensors; no engine and no private data.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import _validate as check
from .._validate import FloatArray
from ..certificates import ContractionCertificate
from ..errors import CertificateError
from ..heads import OneVsRest, caps_from_public_model
from .plan import certified_steps

_DECAYS = (3e-4, 1e-3, 3e-3, 1e-2)
_NOISE = (0.02, 0.05, 0.1, 0.2)
_HORIZON = 7.0  # training ends when the start has shrunk by e^-7
_QUANTILE = 0.9  # of the public rows' caps: members are taken to be that exposed
_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Constants for `make_private` on an OneVsRest head, and what they would cost.

    Attributes:
        step_size, weight_decay: Of torch.optim.SGD.
        training_steps: Full-batch steps, T.
        noise_std: On the parameters at every step.
        noise_multiplier: The same as Opacus takes it.
        max_grad_norm: One bound per class; pass clipping="per_layer".
        cap_factor, cap_floor: Of `caps_from_public_model`.
        steps: Of unlearning a set of the size asked for, at the 90 % cap of the public rows.
        steps_worst_case: With every cap at its bound; None: out of reach.
        accuracy: Of a head trained with this noise on one half of the public rows, on the other.
        accuracy_without_noise: The same without noise, at the same decay.
    """

    step_size: float
    weight_decay: float
    training_steps: int
    noise_std: float
    noise_multiplier: float
    max_grad_norm: tuple[float, ...]
    cap_factor: float
    cap_floor: float
    steps: int
    steps_worst_case: int | None
    accuracy: float
    accuracy_without_noise: float

    def __str__(self) -> str:
        """Return the constants as a person reads them."""
        share = self.steps / self.training_steps
        return "\n".join(
            [
                f"SGD(lr={self.step_size:.4g}, weight_decay={self.weight_decay:g}), "
                f"{self.training_steps} full-batch steps",
                f"make_private(noise_multiplier={self.noise_multiplier:.4g}, clipping='per_layer', "
                f"max_grad_norm=[{self.max_grad_norm[0]:g}] * {len(self.max_grad_norm)})",
                f"caps_from_public_model(factor={self.cap_factor:g}, floor={self.cap_floor:g})",
                f"unlearning: {self.steps} steps ({share:.1%} of retraining); worst case "
                f"{self.steps_worst_case}",
                f"accuracy on public rows: {self.accuracy:.3f}; without noise "
                f"{self.accuracy_without_noise:.3f}",
            ]
        )


def suggested(
    public: Any,
    *,
    epsilon: float,
    delta: float,
    num_instances: int,
    set_size: int,
    steps: int,
    feature_norm: float,
    cap_factor: float,
    cap_floor: float,
    seed: int,
    progress: bool,
) -> Suggestion:
    """Return the most accurate constants that reach the target; as `UnlearningEngine.suggest`."""
    check.epsilon(epsilon)
    check.delta(delta)
    size = check.integer("num_instances", num_instances, low=1)
    members = check.integer("set_size", set_size, low=1, high=size)
    budget = check.integer("steps", steps, low=0)
    norm = check.real("feature_norm", feature_norm, low=0.0, open_low=True)
    learn, held_out, classes = _halves(public, seed=seed)
    found: list[Suggestion] = []
    cells = list(itertools.product(_DECAYS, _NOISE))
    models: dict[float, _Public] = {}
    for decay, noise in tqdm(cells, desc="constants", disable=None if progress else True):
        eta = (1.0 - 1e-6) * 2.0 / (2.0 * decay + norm * norm / 4.0)
        trained = math.ceil(_HORIZON / (eta * decay))
        if decay not in models:
            models[decay] = _Public.trained(
                learn, held_out, classes, eta=eta, decay=decay, steps=trained,
                rule=(cap_factor, cap_floor),
            )  # fmt: skip
        model = models[decay]
        needed, worst = (
            certified_steps(
                ContractionCertificate.one_vs_rest_glm(
                    caps=np.tile(caps, (members, 1)), max_grad_norms=np.ones(classes),
                    step_size=eta, weight_decay=decay, feature_norm=norm,
                    noise_multiplier=noise * size / (eta * math.sqrt(classes)),
                    expected_batch_size=size, num_instances=size, training_steps=trained,
                ),
                epsilon=epsilon, delta=delta, max_steps=_MOST,
            )
            for caps in (model.typical_caps, np.ones(classes))
        )  # fmt: skip
        if needed is None or needed > budget:
            continue
        after = _descended(
            learn, classes, eta=eta, decay=decay, steps=trained, noise=noise,
            caps=model.caps, seed=seed,
        )  # fmt: skip
        found.append(
            Suggestion(
                step_size=eta, weight_decay=decay, training_steps=trained, noise_std=noise,
                noise_multiplier=noise * size / (eta * math.sqrt(classes)),
                max_grad_norm=(1.0,) * classes, cap_factor=cap_factor, cap_floor=cap_floor,
                steps=needed, steps_worst_case=worst,
                accuracy=_accuracy(after, held_out), accuracy_without_noise=model.accuracy,
            )
        )  # fmt: skip
    if not found:
        raise CertificateError(
            f"Expected a target that some constants reach in {budget} steps, got epsilon="
            f"{epsilon:g} at delta={delta:g} for sets of {members} out of {size}. Allow more steps "
            "or a larger epsilon, or train on more instances: the cost falls like 1/n."
        )
    return max(found, key=lambda one: (one.accuracy, -one.steps))


@dataclass(frozen=True)
class _Public:
    """A head trained on public rows without noise, and the caps that it gives."""

    accuracy: float
    caps: FloatArray
    typical_caps: FloatArray

    @classmethod
    def trained(
        cls, learn: _Rows, held_out: _Rows, classes: int, *, eta: float, decay: float, steps: int,
        rule: tuple[float, float],
    ) -> _Public:  # fmt: skip
        weights = _descended(learn, classes, eta=eta, decay=decay, steps=steps)
        head = OneVsRest(learn[0].shape[1], classes)
        with torch.no_grad():
            for parameter, row in zip(head.parameters(), weights, strict=True):
                parameter.copy_(row[None])
        how = {"max_grad_norm": [1.0] * classes, "factor": rule[0], "floor": rule[1]}
        own, other = (
            caps_from_public_model(head, torch.utils.data.TensorDataset(*rows), **how)  # type: ignore[arg-type]
            for rows in (learn, held_out)
        )
        joint = np.sqrt(np.square(other).sum(axis=1))  # of rows that the head was not trained on
        order = np.argsort(joint)
        typical = other[order[int(_QUANTILE * (len(order) - 1))]]
        return cls(_accuracy(weights, held_out), own, typical)


_Rows = tuple[torch.Tensor, torch.Tensor]


def _halves(public: Any, *, seed: int) -> tuple[_Rows, _Rows, int]:
    """Return features and class numbers of two halves of the public rows."""
    pairs = [public[k] for k in range(len(public))]
    if len(pairs) < 4:
        raise ValueError(f"Expected at least 4 public rows, got {len(pairs)}. Pass more.")
    features = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x, _ in pairs])
    targets = torch.as_tensor([int(y) for _, y in pairs])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    half = len(pairs) // 2
    classes = int(targets.max()) + 1
    one, two = (
        (features[order[part]], targets[order[part]])
        for part in (slice(0, half), slice(half, None))
    )
    return one, two, classes


def _descended(
    rows: _Rows, classes: int, *, eta: float, decay: float, steps: int, noise: float = 0.0,
    caps: FloatArray | None = None, seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Return the weights (classes, features) after the steps that the head would take."""
    x = rows[0].double()
    wanted = torch.nn.functional.one_hot(rows[1], classes).double()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(classes, x.shape[1], dtype=torch.float64)
    norms = x.norm(dim=1, keepdim=True)
    limits = None if caps is None else torch.as_tensor(caps)
    for _ in range(steps):
        residuals = (x @ weights.T).sigmoid() - wanted
        if limits is not None:
            residuals *= (limits / (residuals.abs() * norms + 1e-6)).clamp(max=1.0)
        weights = (1.0 - eta * decay) * weights - eta / len(x) * residuals.T @ x
        if noise:
            weights += noise * torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    return weights


def _accuracy(weights: torch.Tensor, rows: _Rows) -> float:
    found = (rows[0].double() @ weights.T).argmax(dim=1) == rows[1]
    return float(found.double().mean())
