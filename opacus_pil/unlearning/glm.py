"""Whether a run is the one that contraction is proved for, and the certificate if it is.

Looks at torch objects and refuses by name whatever breaks the proof: more than one output, another
loss, momentum, caps that were not fixed before the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .._validate import FloatArray, IntArray
from ..certificates import Certificate, ContractionCertificate, PoissonContractionCertificate
from ..certificates.contraction import SHIFT_ROUND_UP
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Task
from .feature_norm import checked_feature_norm, require_contracting

# Lipschitz constant of the loss's derivative in the one linear output; the loss is convex in it.
LOSS_SMOOTHNESS: dict[type[nn.Module], float] = {nn.BCEWithLogitsLoss: 0.25}
_STEEPEST = 1.0  # largest derivative of that loss in its output


class OneOutputRun:
    """A noisy run of a model with one linear output, checked assumption by assumption.

    Full batches give `ContractionCertificate`, Poisson mini-batches
    `PoissonContractionCertificate`.

    Args:
        module: A plain torch.nn.Linear with one output.
        optimizer: The plain inner optimizer: SGD without momentum. Its weight decay acts after
            clipping and noise, hence is decoupled from them.
        task: Of training and unlearning: nn.BCEWithLogitsLoss with reduction "mean" and no weights.
        dataset: Yields (features, target).
        present: Its rows that are still there; each one's features are held against `feature_norm`.
        privacy_engine: Made the run private with caps fixed before it, or at the worst case.
        feature_norm: Public bound on the norm of every feature vector, without the bias.
        measured: Take the sensitivities the ledger stands at for caps, whatever its label. What
            comes out is a prediction; never call it certified.
        evidence: Raises where no certificate may rest on the ledger. Default: the ledger's own.

    Raises:
        CertificateError: An assumption does not hold; the message names it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        task: Task,
        dataset: Dataset,
        present: IntArray,
        privacy_engine: PerInstancePrivacyEngine,
        feature_norm: float | None,
        measured: bool = False,
        evidence: Callable[[], None] | None = None,
    ) -> None:
        kernel, ledger = privacy_engine.kernel, privacy_engine.per_instance
        criterion: Any = task.criterion if task.own_loss is None else task.own_loss
        require_contracting(
            type(module) is nn.Linear and module.out_features == 1,
            "a torch.nn.Linear model with one output",
            type(module).__name__,
            "Clipping breaks contraction for any other model; use method='dp_sgd'.",
        )
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        foreign = [hook for hook in hooks if not _of_opacus(hook)]
        require_contracting(
            not foreign,
            "a model without forward hooks of yours",
            f"{len(foreign)}",
            "They may change what the layer computes. Remove them.",
        )
        weighted = any(
            getattr(criterion, name, None) is not None for name in ("weight", "pos_weight")
        )
        require_contracting(
            type(criterion) in LOSS_SMOOTHNESS and not weighted,
            "nn.BCEWithLogitsLoss without weights",
            type(criterion).__name__ + (" with weights" if weighted else ""),
            "The loss must be convex and smooth in the output, with a known constant.",
        )
        require_contracting(
            kernel.loss_reduction == "mean" and getattr(criterion, "reduction", None) == "mean",
            "loss_reduction 'mean'",
            f"{kernel.loss_reduction!r} and criterion reduction {criterion.reduction!r}",
            "Other reductions scale the step by the batch.",
        )
        require_contracting(
            measured or task == privacy_engine.task or not privacy_engine.task.named,
            "the training's own loss and collate_fn",
            "others",
            "Its steps are counted too: leave criterion, loss_of and collate_fn out.",
        )
        assert isinstance(module, nn.Linear)
        self.feature_norm = checked_feature_norm(
            feature_norm, dataset, rows=present, bias=module.bias is not None
        )
        evidence = evidence or privacy_engine.require_evidence
        if not measured:
            self._require_small_norms(privacy_engine)
        if not measured and ledger.guarantee != "bound":
            evidence()  # says why, where a step is the cause
        require_contracting(
            measured or ledger.guarantee == "bound",
            "caps fixed before the run (guarantee 'bound')",
            f"guarantee={ledger.guarantee!r}",
            "Train with norm_policy='capped' and caps from public data only.",
        )
        require_contracting(
            not ledger.budgeted,
            "caps fixed before the run",
            "a budget, under which caps follow what was spent",
            "Train without a budget; a cap that moves with the model breaks the coupling.",
        )
        self.step_size, self.weight_decay = _plain_sgd(optimizer)
        privacy_engine.require_constant_steps(optimizer)
        if not measured:
            evidence()
        self.kernel = kernel
        self.smoothness = LOSS_SMOOTHNESS[type(criterion)]
        caps = ledger.sensitivities if measured and ledger.caps is None else ledger.caps
        self.caps: FloatArray = np.ones(kernel.num_instances) if caps is None else caps

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

    def _require_small_norms(self, privacy_engine: PerInstancePrivacyEngine) -> None:
        """Hold the gradients that were clipped against those that loss and features allow."""
        if "earlier_release" in privacy_engine.findings:
            return  # it kept none; the certificate's context says so
        largest, allowed = privacy_engine.largest_norm, _STEEPEST * self.feature_norm
        require_contracting(
            largest <= allowed * SHIFT_ROUND_UP,
            f"gradients of norm at most {allowed:g}, as the loss and feature_norm allow,",
            f"norm {largest:.6g} in training" if math.isfinite(largest) else "none that were kept",
            "The loss was scaled, features were others or targets not in [0, 1]: train on what is "
            "named.",
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


def _of_opacus(hook: Any) -> bool:
    """Whether a forward hook is one that Opacus, or we, hang on modules to see their inputs."""
    owner = getattr(hook, "__self__", hook)
    return type(owner).__module__.startswith(("opacus.", "opacus_pil."))


def _plain_sgd(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return step size and weight decay of plain gradient descent, or refuse."""
    require_contracting(
        type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1,
        "torch.optim.SGD with one parameter group",
        f"{type(optimizer).__name__} with {len(optimizer.param_groups)}",
        "Adaptive steps are not one contracting map.",
    )
    group = optimizer.param_groups[0]
    for name in ("momentum", "dampening", "nesterov", "maximize"):
        require_contracting(
            not group[name], f"SGD without {name}", f"{name}={group[name]}", f"Set {name}=0."
        )
    return float(group["lr"]), float(group["weight_decay"])
