"""Random heads of two outputs clipped one by one, for `soundness.py`, against exact laws."""

from __future__ import annotations

import numpy as np
from clipped_laws import ClippedLogistic
from soundness_cases import Case, Family

from opacus_pil.certificates import ContractionCertificate

OUTPUTS = 2


def two_outputs(rng: np.random.Generator) -> Case:
    """One feature, full batches: the law of both outputs is a product, and D_α adds up."""
    size, members = int(rng.integers(3, 9)), int(rng.integers(1, 3))
    scale = float(10 ** rng.uniform(-1.5, 0.0))  # short features: nearly linear, the bound is tight
    x, y = scale * rng.uniform(0.2, 1.0, size), rng.integers(0, 2, (size, OUTPUTS)).astype(float)
    caps = rng.uniform(0.0, 1.0, (size, OUTPUTS)) ** 2
    bounds = scale * rng.uniform(0.2, 1.0, OUTPUTS)
    eta, z = float(rng.uniform(0.5, 4.0)), float(rng.uniform(0.5, 3.0))
    decay = float(rng.uniform(0.1, 0.4)) / eta
    training, steps = int(rng.integers(1, 12)), int(rng.integers(0, 8))
    order = 1.0 + float(10 ** rng.uniform(-1.0, 1.0))
    ours = ContractionCertificate.one_vs_rest_glm(
        caps=caps[:members], max_grad_norms=bounds, step_size=eta, weight_decay=decay,
        feature_norm=scale, noise_multiplier=z, expected_batch_size=size, num_instances=size,
        training_steps=training,
    )  # fmt: skip
    exact = 0.0
    for k in range(OUTPUTS):
        law = ClippedLogistic(
            x, y[:, k], caps[:, k] * bounds[k], step_size=eta, weight_decay=decay, batch=size,
            noise_std=eta * z * float(np.linalg.norm(bounds)) / size,
        )  # fmt: skip
        exact += law.divergences([order], members=members, training=training, steps=steps)[:, 0]
    bound = float(ours.rdp([order], steps=steps)[0])
    parameters = {
        "x": x.tolist(), "y": y.tolist(), "caps": caps.tolist(), "bounds": bounds.tolist(),
        "eta": eta, "z": z, "decay": decay, "training": training, "steps": steps, "order": order,
        "members": members,
    }  # fmt: skip
    return Case([(bound, float(one)) for one in exact], parameters)


FAMILIES = [
    Family("contraction: two outputs", "densities on a grid", two_outputs, 4, 1e-3),
]
