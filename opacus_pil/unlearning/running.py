"""From a plan's method to the steps that carry it out, from where a killed run left off."""

from __future__ import annotations

from torch.utils.data import Dataset
from tqdm import tqdm

from .._validate import IntArray
from ..certificates import NoisyFineTuningCertificate
from ..errors import CertificateError
from ..training.task import Task
from .averaged import noisy_finetuning_steps
from .extra_terms import gradient_difference, l1_sparse
from .methods import AfterStep, noisy_steps, plain_steps
from .plan import NOISE_FREE_METHODS, CertifiedPlan, UnlearningPlan
from .saved_run import SavedRun


def run_plan(
    plan: UnlearningPlan,
    run: SavedRun,
    *,
    dataset: Dataset,
    task: Task,
    evaluated: frozenset[str],
    retain_set: IntArray,
    batch_size: float,
    after_step: AfterStep,
    progress: tqdm,
) -> bool:
    """Take the plan's remaining steps on `run.module`, in place.

    Returns:
        Whether `after_step` ended the run.
    """
    stopped = False

    def watched(number: int) -> bool:
        nonlocal stopped
        stopped = after_step(number)
        return stopped

    remaining = plan.steps - run.done
    common = {
        "dataset": dataset,
        "task": task,
        "evaluated": evaluated,
        "retain_set": retain_set,
        "steps": remaining,
        "sampler_generator": run.sampler_generator,
        "sampler_state": run.sampler_state,
        "after_step": watched,
        "progress": progress,
    }
    if plan.method == "noisy_finetuning":
        assert isinstance(plan, CertifiedPlan)
        assert isinstance(plan.certificate, NoisyFineTuningCertificate)
        noisy_finetuning_steps(  # also for no steps: the model is clipped before the first one
            run.module,
            certificate=plan.certificate,
            batch_size=batch_size,
            done=run.done,
            noise_generator=run.noise_generator,
            privacy_engine=run.privacy_engine,
            **common,
        )
    elif remaining == 0:
        pass  # already finished, or what is left of the forget set needs no step
    elif plan.method in NOISE_FREE_METHODS or run.privacy_engine is None:
        if isinstance(plan, CertifiedPlan):
            raise CertificateError(
                "Expected steps with noise for a certified plan, got a run without privacy_engine."
            )
        size = max(int(batch_size), 1)
        extra = None
        if plan.method == "l1_sparse":
            assert plan.strength is not None
            extra = l1_sparse(strength=plan.strength, steps=plan.steps, done=run.done)
        elif plan.method == "gradient_difference":
            assert plan.strength is not None
            extra = gradient_difference(
                strength=plan.strength,
                dataset=dataset,
                forget_set=plan.forget_set,
                task=task,
                batch_size=size,
                generator=run.sampler_generator,
            )
        plain_steps(run.module, optimizer=run.optimizer, batch_size=size, extra=extra, **common)
    else:
        noisy_steps(
            run.module,
            optimizer=run.optimizer,
            privacy_engine=run.privacy_engine,
            noise_generator=run.noise_generator,
            **common,
        )
    return stopped
