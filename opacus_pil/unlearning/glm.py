"""Whether a run is the one that contraction is proved for, and the certificate if it is.

Looks at torch objects and refuses by name whatever breaks the proof: more than one output, another
loss, momentum, caps that were not fixed before the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .._validate import FloatArray
from ..accounting import PerInstanceAccountant
from ..certificates import Certificate, ContractionCertificate, PoissonContractionCertificate
from ..certificates.contraction import SHIFT_ROUND_UP
from ..training.account import Account
from ..training.task import Task
from .conditions import Condition, require_contracting
from .feature_norm import checked_feature_norm
from .state import TrainedState

# Lipschitz constant of the loss's derivative in the one linear output; the loss is convex in it.
LOSS_SMOOTHNESS: dict[type[nn.Module], float] = {nn.BCEWithLogitsLoss: 0.25}
_STEEPEST = 1.0  # largest derivative of that loss in its output


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What took the steps: a model, its optimizer, and the ledgers that they charged.

    Attributes:
        module: A plain torch.nn.Linear with one output.
        optimizer: Plain: SGD without momentum. Its weight decay acts after clipping and noise,
            hence is decoupled from them.
        account: Of caps fixed before the run, or of the worst case.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    account: Account


class OneOutputRun:
    """A noisy run of a model with one linear output, checked assumption by assumption.

    Full batches give `ContractionCertificate`, Poisson mini-batches
    `PoissonContractionCertificate`.

    Args:
        state: The training and its task, whose loss is nn.BCEWithLogitsLoss with reduction "mean"
            and no weights; the rows that are still there, each one's features held against
            `state.feature_norm`.
        ran: What took the steps, where that is not the state's own yet.
        measured: Take the sensitivities the ledger stands at for caps, whatever its label. What
            comes out is a prediction; never call it certified.
        evidence: Raises where no certificate may rest on the ledger. Default: the ledger's own.

    Raises:
        CertificateError: An assumption does not hold; the message names it.
    """

    def __init__(
        self,
        state: TrainedState,
        *,
        ran: Ran | None = None,
        measured: bool = False,
        evidence: Callable[[], None] | None = None,
    ) -> None:
        ran = _of(state) if ran is None else ran
        assert state.kernel is not None
        self.kernel, self._measured = state.kernel, measured
        self.smoothness, self.feature_norm = self._looked_at_model(state, ran.module)
        ledger = ran.account.per_instance
        self._look_at_ledger(ledger, ran, evidence=evidence or ran.account.require_evidence)
        group = ran.optimizer.param_groups[0]
        self.step_size, self.weight_decay = float(group["lr"]), float(group["weight_decay"])
        caps = ledger.sensitivities if measured and ledger.caps is None else ledger.caps
        self.caps: FloatArray = np.ones(self.kernel.num_instances) if caps is None else caps

    def _looked_at_model(self, state: TrainedState, module: nn.Module) -> tuple[float, float]:
        """Return the smoothness of the loss and the norm of features, of a model that has them."""
        task, training = state.task, state.privacy_engine
        assert training is not None
        criterion: Any = task.criterion if task.own_loss is None else task.own_loss
        require_contracting(
            [
                *_one_output(module),
                *_smooth_mean(criterion, self.kernel.loss_reduction),
                _same_task(task, training.task, measured=self._measured),
            ]
        )
        assert isinstance(module, nn.Linear)
        norm = checked_feature_norm(
            state.feature_norm,
            state.data.dataset,
            rows=state.retain_set,
            bias=module.bias is not None,
        )
        return LOSS_SMOOTHNESS[type(criterion)], norm

    def _look_at_ledger(
        self, ledger: PerInstanceAccountant, ran: Ran, *, evidence: Callable[[], None]
    ) -> None:
        """Raise unless all steps were alike, with caps fixed before them, as far as was seen."""
        measured = self._measured
        norms: list[Condition] = []
        if not measured:
            norms += _small_norms(ran.account, allowed=_STEEPEST * self.feature_norm)
            if ledger.guarantee != "bound":
                require_contracting(norms)
                evidence()  # says why, where a step is the cause
        require_contracting(
            [*norms, *_fixed_caps(ledger, measured=measured), *_plain_descent(ran.optimizer)]
        )
        ran.account.require_constant_steps(self.kernel.update_by(ran.optimizer))
        if not measured:
            evidence()

    def certificate(
        self, *, phases: Sequence[tuple[int, Sequence[int]]], worst_case: bool = False
    ) -> Certificate:
        """Return the certificate that the members of all phases together are forgotten.

        Args:
            phases: For each phase of the run so far: its number of steps, and the rows of those
                members that took part in it.
            worst_case: Take every member's cap as the whole clipping bound.

        Raises:
            CertificateError: Step size, weight decay and smoothness do not contract.
        """
        if self.kernel.sample_rate == 1.0:
            parts = [self._full_batch(steps, members, worst_case) for steps, members in phases]
            shifts = tuple(shift for part in parts for shift in part.shifts)
            return replace(parts[0], shifts=shifts)
        # Whoever left earlier moved later steps by nothing, which a bound on its gradient covers.
        members = sorted({row for _, rows in phases for row in rows})
        return PoissonContractionCertificate.one_output_glm(
            **self._constants(members, worst_case),
            training_steps=sum(steps for steps, _ in phases),
        )

    def _full_batch(
        self, steps: int, members: Sequence[int], worst: bool
    ) -> ContractionCertificate:
        return ContractionCertificate.one_output_glm(
            **self._constants(members, worst), training_steps=steps
        )

    def _constants(self, members: Sequence[int], worst: bool) -> dict[str, Any]:
        rows = np.asarray(members, dtype=np.int64)
        caps = np.ones(len(rows)) if worst else self.caps[rows]
        return {
            "caps": caps if len(rows) else [0.0],
            "max_grad_norm": self.kernel.max_grad_norm,
            "step_size": self.step_size,
            "weight_decay": self.weight_decay,
            "feature_norm": self.feature_norm,
            "noise_multiplier": self.kernel.noise_multiplier,
            "expected_batch_size": self.kernel.expected_batch_size,
            "num_instances": self.kernel.num_instances,
            "loss_smoothness": self.smoothness,
            "sample_rate": self.kernel.sample_rate,
        }


def _of(state: TrainedState) -> Ran:
    assert state.account is not None
    return Ran(module=state.module, optimizer=state.optimizer, account=state.account)


# --- what the proof needs -------------------------------------------------------------------------


def _one_output(module: nn.Module) -> Iterator[Condition]:
    yield Condition(
        type(module) is nn.Linear and module.out_features == 1,
        "a torch.nn.Linear model with one output",
        type(module).__name__,
        "Clipping breaks contraction for any other model; use method='dp_sgd'.",
    )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    foreign = [hook for hook in hooks if not _of_opacus(hook)]
    yield Condition(
        not foreign,
        "a model without forward hooks of yours",
        f"{len(foreign)}",
        "They may change what the layer computes. Remove them.",
    )


def _smooth_mean(criterion: Any, loss_reduction: str) -> Iterator[Condition]:
    weighted = any(getattr(criterion, name, None) is not None for name in ("weight", "pos_weight"))
    yield Condition(
        type(criterion) in LOSS_SMOOTHNESS and not weighted,
        "nn.BCEWithLogitsLoss without weights",
        type(criterion).__name__ + (" with weights" if weighted else ""),
        "The loss must be convex and smooth in the output, with a known constant.",
    )
    reduction = getattr(criterion, "reduction", None)
    yield Condition(
        loss_reduction == "mean" and reduction == "mean",
        "loss_reduction 'mean'",
        f"{loss_reduction!r} and criterion reduction {reduction!r}",
        "Other reductions scale the step by the batch.",
    )


def _same_task(task: Task, trained: Task, *, measured: bool) -> Condition:
    return Condition(
        measured or task == trained or not trained.named,
        "the training's own loss and collate_fn",
        "others",
        "Its steps are counted too: leave criterion, loss_of and collate_fn out.",
    )


def _small_norms(account: Account, *, allowed: float) -> Iterator[Condition]:
    """Hold the gradients that were clipped against those that loss and features allow."""
    if "earlier_release" in account.findings:
        return  # it kept none; the certificate's context says so
    largest = account.largest_norm
    yield Condition(
        largest <= allowed * SHIFT_ROUND_UP,
        f"gradients of norm at most {allowed:g}, as the loss and feature_norm allow,",
        f"norm {largest:.6g} in training" if math.isfinite(largest) else "none that were kept",
        "The loss was scaled, features were others or targets not in [0, 1]: train on what is "
        "named.",
    )


def _fixed_caps(ledger: PerInstanceAccountant, *, measured: bool) -> Iterator[Condition]:
    yield Condition(
        measured or ledger.guarantee == "bound",
        "caps fixed before the run (guarantee 'bound')",
        f"guarantee={ledger.guarantee!r}",
        "Train with norm_policy='capped' and caps from public data only.",
    )
    yield Condition(
        not ledger.budgeted,
        "caps fixed before the run",
        "a budget, under which caps follow what was spent",
        "Train without a budget; a cap that moves with the model breaks the coupling.",
    )


def _plain_descent(optimizer: torch.optim.Optimizer) -> Iterator[Condition]:
    yield Condition(
        type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1,
        "torch.optim.SGD with one parameter group",
        f"{type(optimizer).__name__} with {len(optimizer.param_groups)}",
        "Adaptive steps are not one contracting map.",
    )
    group = optimizer.param_groups[0]
    for name in ("momentum", "dampening", "nesterov", "maximize"):
        value = group.get(name)
        yield Condition(not value, f"SGD without {name}", f"{name}={value}", f"Set {name}=0.")


def _of_opacus(hook: Any) -> bool:
    """Whether a forward hook is one that Opacus, or we, hang on modules to see their inputs."""
    owner = getattr(hook, "__self__", hook)
    return type(owner).__module__.startswith(("opacus.", "opacus_pil."))
