"""Random certificates of every class, and records of them."""

from __future__ import annotations

import math

from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    LangevinCertificate,
    NoisyFineTuningCertificate,
    PoissonContractionCertificate,
    best_of,
    certificate_record,
    known_batches,
    sequential_requests,
    verify_certificate,
)
from opacus_pil.certificates.counted import counted

DELTA = 1e-3


def _curve(rng, *, infinite):
    orders = 1.0 + rng.uniform(0.1, 3.0, 6).cumsum()
    rdp = rng.uniform(0.01, 0.2, 6).cumsum()
    if infinite:
        rdp[-1] = math.inf
    return rdp.tolist(), orders.tolist()


def contraction(rng):
    steps = int(rng.integers(20, 40))
    return ContractionCertificate(
        rng.uniform(0.8, 1.01, steps),
        rng.uniform(0.5, 2.0, steps),
        rng.uniform(0.0, 0.3, steps) * rng.integers(0, 2, steps),
        rng.uniform(0.0, 0.5),
        unlearning_contraction=rng.uniform(0.8, 0.99),
        unlearning_noise_std=rng.uniform(0.5, 1.0),
        context=("rows_independent_not_checked", "order_given_by_caller"),
    )


def one_output_glm(rng):
    return ContractionCertificate.one_output_glm(
        caps=rng.uniform(0.1, 1.0, 3), max_grad_norm=1.0, step_size=2.0,
        weight_decay=rng.uniform(0.001, 0.02), feature_norm=1.0, noise_multiplier=5.0,
        expected_batch_size=50, num_instances=50, training_steps=200,
    )  # fmt: skip


def noisy_finetuning(rng):
    return NoisyFineTuningCertificate(*rng.uniform(0.1, 1.0, 2), 0.1, 0.05, rng.uniform(0.5, 2.0))


def noise_schedule(rng):
    return NoisyFineTuningCertificate(1.0, 0.5, 0.1, 0.05, rng.uniform(0.1, 2.0, 12), 0.3)


def data_processing(rng):
    return DataProcessingCertificate(*_curve(rng, infinite=True), bool(rng.integers(2)))


def langevin(rng):
    curve, orders = _curve(rng, infinite=True)
    return LangevinCertificate(
        curve, orders, 0.9, rng.uniform(0.5, 1.0), rng.uniform(1.0, 5.0),
        two_sided=bool(rng.integers(2)), moving_order=bool(rng.integers(2)),
        context=("supplied_by_caller",),
    )  # fmt: skip


def stationary(rng):
    return LangevinCertificate.strongly_convex(**_setting(rng))


def chien2024(rng):
    return LangevinCertificate.chien2024(**_setting(rng), step_grid=10)


def _setting(rng):
    return {
        "num_instances": 1000, "num_deleted": 3, "strong_convexity": rng.uniform(0.01, 0.02),
        "smoothness": 0.26, "step_size": 3.0, "langevin_sigma": rng.uniform(0.05, 0.1),
        "gradient_bound": 1.0,
    }  # fmt: skip


def poisson(rng):
    return PoissonContractionCertificate(
        rng.uniform(0.5, 1.0, 3), 0.2, rng.uniform(0.5, 1.0), 10, 0.5, 0.1, 0.2, 10.0, 47,
        context=("dataset_not_fingerprinted",),
    )  # fmt: skip


def fixed_batches(rng):
    batches = [rng.choice(12, 4, replace=False) for _ in range(15)]
    return known_batches(
        batches, forget=[3, 5, 7], gradient_bounds=rng.uniform(0.1, 1.0, 3), noise_std=1.0,
        step_size=0.5, weight_decay=0.1, smoothness=0.25, expected_batch_size=4,
    )  # fmt: skip


def one_vs_rest_glm(rng):
    return ContractionCertificate.one_vs_rest_glm(**_heads(rng, training_steps=200))


def one_vs_rest_poisson(rng):
    return PoissonContractionCertificate.one_vs_rest_glm(
        **_heads(rng, training_steps=6), sample_rate=0.2
    )


def unclipped_glm(rng):
    return ContractionCertificate.unclipped_glm(**_softmax(rng, training_steps=200))


def unclipped_poisson(rng):
    return PoissonContractionCertificate.unclipped_glm(
        **_softmax(rng, training_steps=6), sample_rate=0.2
    )


def _heads(rng, *, training_steps):
    return {
        "caps": rng.uniform(0.1, 1.0, (3, 4)), "max_grad_norms": rng.uniform(0.3, 1.0, 4),
        "step_size": 2.0, "weight_decay": rng.uniform(0.001, 0.02), "feature_norm": 1.0,
        "noise_multiplier": 5.0, "num_instances": 50, "training_steps": training_steps,
        "expected_batch_size": 50 if training_steps > 100 else 10,
    }  # fmt: skip


def _softmax(rng, *, training_steps):
    shared = _heads(rng, training_steps=training_steps)
    del shared["max_grad_norms"]
    return shared | {"caps": rng.uniform(0.1, 1.0, 3), "max_grad_norm": 1.5}


def requests(rng):
    return sequential_requests(
        0.95, noise_std=1.0, phase_steps=(40, 30), request_shifts=rng.uniform(0.1, 0.3, 2)
    )


def best(rng):
    return best_of([data_processing(rng), contraction(rng), data_processing(rng)])


MAKERS = (
    contraction, one_output_glm, noisy_finetuning, noise_schedule, data_processing, langevin,
    stationary, chien2024, poisson, fixed_batches, requests, best, one_vs_rest_glm,
    one_vs_rest_poisson, unclipped_glm, unclipped_poisson,
)  # fmt: skip


def history(certificate):
    """Steps of training and number of earlier requests, where the certificate counts them."""
    own = counted(certificate)
    if own.phases is not None:
        return {"training_steps": own.phases[0], "earlier_requests": len(own.phases) - 1}
    return {"training_steps": own.steps or 10}


def record_of(certificate, *, steps=7, **changes):
    epsilon = certificate.epsilon(delta=DELTA, steps=steps)
    own = isinstance(certificate, NoisyFineTuningCertificate)
    arguments = {
        "forgotten": [3, 5, 17],
        "method": "noisy_finetuning" if own else "langevin",
        "steps": steps,
        **({} if "training_steps" in changes else history(certificate)),
        "epsilon": epsilon,
        "delta": DELTA,
        "target_epsilon": 1.25 * epsilon,
        "model_before": "0" * 63 + "a",
        "model_after": "0" * 63 + "b",
    }
    return certificate_record(certificate, **{**arguments, **changes})


def failed(record, **given):
    """Names of the checks that fail."""
    return {c.name for c in verify_certificate(record, **given).checks if c.passed is False}
