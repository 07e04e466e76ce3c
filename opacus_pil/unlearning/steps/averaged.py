"""Noisy fine-tuning of any model: clip the model once, then the averaged gradient of each batch.

The run takes its constants from the certificate, so that it is the run the certificate speaks of.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..._validate import IntArray
from ...capture.averaged_clip import AveragedClipOptimizer, clip_to_norm
from ...certificates import NoisyFineTuningCertificate
from ...errors import CertificateError
from ...privacy_engine import PerInstancePrivacyEngine
from ...training.account import Account
from ...training.task import Task, training_mode
from .plain import AfterStep, reported


def require_all_trainable(module: nn.Module) -> None:
    """Raise where part of the model would leave fine-tuning as it came, unclipped and unnoised.

    Raises:
        CertificateError: A frozen parameter, or a buffer.
    """
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    left = [*frozen, *(name for name, _ in module.named_buffers())]
    if left:
        raise CertificateError(
            f"Expected a model that noisy fine-tuning changes everywhere, got {left[0]!r} (one of "
            f"{len(left)} frozen parameters and buffers), which keeps what it learnt from the "
            "forget set. Let every parameter train, without buffers."
        )


def noisy_finetuning_steps(
    module: nn.Module,
    *,
    certificate: NoisyFineTuningCertificate,
    dataset: Dataset,
    task: Task,
    retain_set: IntArray,
    batch_size: float,
    steps: int,
    done: int,
    sampler_generator: torch.Generator,
    evaluated: frozenset[str] = frozenset(),
    noise_generator: torch.Generator | None = None,
    sampler_state: torch.Tensor | None = None,
    privacy_engine: PerInstancePrivacyEngine | None = None,
    account: Account | None = None,
    after_step: AfterStep | None = None,
    progress: tqdm | None = None,
) -> None:
    """Run steps done + 1 … done + steps of the certificate's update on the retain set, in place.

    θ ← (1 − ηλ)θ − η·clip(g, C1) + N(0, ζ²I), from a model clipped to norm C0 before step 1; g is
    the gradient of the task's loss on a Poisson batch, zero for an empty one. A member of the
    retain set moves a clipped gradient by at most 2·C1, which the ledgers of `account`, a fork of
    those of `privacy_engine`, are charged.
    """
    require_all_trainable(module)  # now: the plan looked at it some time ago
    if done == 0:
        _clip_model(module, bound=certificate.model_clip)
    if sampler_state is not None:
        sampler_generator.set_state(sampler_state)
    optimizer = _optimizer(module, certificate, privacy_engine, noise_generator=noise_generator)
    device = next(module.parameters()).device
    rate = min(batch_size / max(len(retain_set), 1), 1.0)
    if privacy_engine is not None:
        rate = privacy_engine.kernel.sample_rate
    training_mode(module, evaluated=evaluated)
    for number in range(1, steps + 1):
        drawn = torch.rand(len(retain_set), generator=sampler_generator, dtype=torch.float64) < rate
        rows = retain_set[drawn.numpy()]
        optimizer.zero_grad(set_to_none=True)
        if len(rows):
            batch = task.collate([dataset[int(row)] for row in rows], device=device)
            task.batch_loss(module, batch).backward()
        std = _noise_std(certificate, done + number)
        optimizer.noise_multiplier = std / certificate.step_size
        optimizer.step()
        if account is not None:
            _charge(account, certificate, noise_std=std, sample_rate=rate)
        if reported(number, after_step, progress):
            break


def _optimizer(
    module: nn.Module,
    certificate: NoisyFineTuningCertificate,
    privacy_engine: PerInstancePrivacyEngine | None,
    *,
    noise_generator: torch.Generator | None,
) -> AveragedClipOptimizer:
    secure = privacy_engine is not None and privacy_engine.secure_mode
    return AveragedClipOptimizer(
        torch.optim.SGD(
            module.parameters(), lr=certificate.step_size, weight_decay=certificate.weight_decay
        ),
        gradient_clip=certificate.gradient_clip,
        noise_std=0.0,
        generator=privacy_engine.secure_rng if secure else noise_generator,  # type: ignore[union-attr]
        secure_mode=secure,
    )


def _charge(
    account: Account,
    certificate: NoisyFineTuningCertificate,
    *,
    noise_std: float,
    sample_rate: float,
) -> None:
    if certificate.gradient_clip > 0.0:
        account.charge_everyone(
            noise_multiplier=noise_std / (2.0 * certificate.step_size * certificate.gradient_clip),
            sample_rate=sample_rate,
        )


@torch.no_grad()
def _clip_model(module: nn.Module, *, bound: float) -> None:
    parameters = list(module.parameters())
    clipped = clip_to_norm([p.detach() for p in parameters], bound=bound)
    for parameter, value in zip(parameters, clipped, strict=True):
        parameter.copy_(value)


def _noise_std(certificate: NoisyFineTuningCertificate, step: int) -> float:
    """Return the noise on the parameters at one step; the schedule's last value goes on."""
    noise = certificate.noise_std
    if isinstance(noise, int | float):
        return float(noise)
    return float(noise[min(step, len(noise)) - 1])
