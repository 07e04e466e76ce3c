"""Whether a run is one that contraction is proved for, and the certificate if it is.

Looks at torch objects and refuses by name whatever breaks the proof: several outputs clipped
together, another loss, momentum, caps that were not fixed before the run.
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
from ..certificates.capped_glm import SHIFT_ROUND_UP
from ..training.account import Account
from ..training.kernel import TrainingKernel
from ..training.task import Task
from .conditions import Condition, looked_at, require_contracting
from .convex_loss import ConvexLoss, convex_loss
from .feature_norm import FeatureNorms, checked_feature_norm
from .linear_model import LinearModel, linear_model
from .state import TrainedState


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What took the steps: a model, its optimizer, and the ledgers that they charged.

    Attributes:
        module: Plain; its only trainable part is a head of linear outputs.
        optimizer: Plain: SGD without momentum. Its weight decay acts after clipping and noise,
            hence is decoupled from them.
        account: Of caps fixed before the run, or of the worst case.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    account: Account


class GlmRun:
    """A noisy run of a model with linear outputs, checked assumption by assumption.

    Full batches give `ContractionCertificate`, Poisson mini-batches
    `PoissonContractionCertificate`.

    Args:
        state: The training and its task; the rows that are still there, each one's features held
            against `state.feature_norm`.
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
        assert state.kernel is not None
        self.kernel, self._measured = state.kernel, measured
        ran = _of(state) if ran is None else ran
        require_contracting(self._looked_at(state, ran, evidence=evidence))
        group = ran.optimizer.param_groups[0]
        self.step_size, self.weight_decay = float(group["lr"]), float(group["weight_decay"])
        self.caps = self._caps(ran.account)

    @classmethod
    def conditions(cls, state: TrainedState) -> list[Condition]:
        """Return everything that is asked of a run, met or not, as far as it can be asked.

        What a missing condition is the ground of is not in the list.
        """
        run = cls.__new__(cls)
        assert state.kernel is not None
        run.kernel, run._measured = state.kernel, False
        return list(run._looked_at(state, _of(state), evidence=None))

    def _looked_at(
        self, state: TrainedState, ran: Ran, *, evidence: Callable[[], None] | None
    ) -> Iterator[Condition]:
        """Look at one thing after the other; ends where nothing more can be asked."""
        yield from self._of_model(state, ran)
        if hasattr(self, "feature_norm"):
            yield from self._of_ledger(ran, evidence or ran.account.require_evidence)

    def _of_model(self, state: TrainedState, ran: Ran) -> Iterator[Condition]:
        """Look at the model, its loss and its features."""
        task, training = state.task, state.privacy_engine
        assert training is not None
        found: list[LinearModel] = []
        yield looked_at(
            "linear outputs, alone or on a frozen part",
            lambda: found.append(linear_model(ran.module, evaluated=state.evaluated)),
        )
        if not found:
            return
        (model,) = found
        criterion: Any = task.criterion if task.own_loss is None else task.own_loss
        loss = convex_loss(criterion, outputs=model.outputs)
        yield from _known_loss(criterion, loss, self.kernel.loss_reduction)
        yield _same_task(task, training.task, measured=self._measured)
        yield from _clipped_apart(model, loss, self.kernel)
        if loss is None:
            return
        norms: list[FeatureNorms] = []
        bound = model.radius if state.feature_norm is None else state.feature_norm
        yield looked_at(
            "feature_norm, a public bound that every feature vector keeps",
            lambda: norms.append(
                checked_feature_norm(
                    bound, state.data.dataset, rows=state.retain_set, bias=model.bias,
                    features_of=model.features_of,
                )
            ),
        )  # fmt: skip
        if not norms:
            return
        if model.outputs > 1 and not model.separate:
            caps = ran.account.caps  # a ledger's are raised by what clipping may round
            lengths = loss.steepest * norms[0].of_rows
            limits = np.ones_like(lengths) if caps is None else caps[state.retain_set]
            yield from _never_clipped(model, loss, limits * self.kernel.max_grad_norm, lengths)
            yield _class_numbers(task, state.data.dataset, row=int(state.retain_set[0]))
        self._loss, self.feature_norm = loss, norms[0].bound

    def _of_ledger(self, ran: Ran, evidence: Callable[[], None]) -> Iterator[Condition]:
        """Look whether all steps were alike, with caps fixed before them, as far as was seen."""
        ledger, measured = ran.account.per_instance, self._measured
        if not measured:
            yield _small_norms(ran.account, allowed=self._loss.steepest * self.feature_norm)
            yield looked_at("steps that a certificate can rest on", evidence)
        yield from _fixed_caps(ledger, measured=measured)
        yield from _plain_descent(ran.optimizer)
        yield looked_at(
            "constant steps, those of the optimizer as it is",
            lambda: ran.account.require_constant_steps(self.kernel.update_by(ran.optimizer)),
        )

    def _caps(self, account: Account) -> FloatArray:
        """Return what every instance was clipped to, shape (instances, outputs that are apart)."""
        ledger, outputs = account.per_instance, max(len(self.kernel.output_bounds), 1)
        if ledger.caps is None:
            levels = ledger.sensitivities if self._measured else np.ones(self.kernel.num_instances)
            return np.repeat(levels[:, None], outputs, axis=1)
        if not self.kernel.output_bounds:
            return ledger.caps[:, None]
        assert account.caps is not None
        return account.caps

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
            make: Any = ContractionCertificate
            parts = [self._made(make, steps, members, worst_case) for steps, members in phases]
            shifts = tuple(shift for part in parts for shift in part.shifts)
            return replace(parts[0], shifts=shifts)
        # Whoever left earlier moved later steps by nothing, which a bound on its gradient covers.
        members = sorted({row for _, rows in phases for row in rows})
        steps = sum(steps for steps, _ in phases)
        found: Certificate = self._made(PoissonContractionCertificate, steps, members, worst_case)
        return found

    def _made(self, kind: Any, steps: int, members: Sequence[int], worst: bool) -> Any:
        """Return the certificate of a class for one forget set and so many steps."""
        rows = np.asarray(members, dtype=np.int64)
        outputs = self.caps.shape[1]
        caps = np.ones((len(rows), outputs)) if worst else self.caps[rows]
        if not len(rows):
            caps = np.zeros((1, outputs))
        run: dict[str, Any] = {
            "step_size": self.step_size,
            "weight_decay": self.weight_decay,
            "feature_norm": self.feature_norm,
            "noise_multiplier": self.kernel.noise_multiplier,
            "expected_batch_size": self.kernel.expected_batch_size,
            "num_instances": self.kernel.num_instances,
            "loss_smoothness": self._loss.smoothness,
            "sample_rate": self.kernel.sample_rate,
            "training_steps": steps,
        }
        if self.kernel.output_bounds:
            bounds = self.kernel.output_bounds
            run["noise_multiplier"] *= self.kernel.max_grad_norm / math.hypot(*bounds)
            return kind.one_vs_rest_glm(caps=caps, max_grad_norms=bounds, **run)
        one = {"caps": caps[:, 0], "max_grad_norm": self.kernel.max_grad_norm}
        if not self._loss.apart:
            return kind.unclipped_glm(**one, **run, loss_steepness=self._loss.steepest)
        return kind.one_output_glm(**one, **run)


def _of(state: TrainedState) -> Ran:
    assert state.account is not None
    return Ran(module=state.module, optimizer=state.optimizer, account=state.account)


# --- what the proof needs -------------------------------------------------------------------------


def _known_loss(
    criterion: Any, loss: ConvexLoss | None, loss_reduction: str
) -> Iterator[Condition]:
    weighted = any(getattr(criterion, name, None) is not None for name in ("weight", "pos_weight"))
    yield Condition(
        loss is not None,
        "nn.BCEWithLogitsLoss without weights, or another loss that is convex and smooth in linear "
        "outputs (OneVsRestLoss; nn.CrossEntropyLoss on several, nn.HuberLoss and nn.SmoothL1Loss "
        "on one)",
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


def _clipped_apart(
    model: LinearModel, loss: ConvexLoss | None, kernel: TrainingKernel
) -> Iterator[Condition]:
    """Hold how outputs are clipped against how they are parametrised."""
    if model.separate:
        yield Condition(
            bool(kernel.output_bounds),
            "each output of OneVsRest clipped by itself",
            f"clipping={kernel.clipping!r}",
            "Clipping all outputs together is no contraction. Train with clipping='per_layer' and "
            "max_grad_norm=[one per class].",
        )
        yield Condition(
            loss is not None and loss.apart,
            "a loss of each output of OneVsRest by itself",
            "one that joins them",
            "Clipped output by output, a softmax is no contraction. Use heads.OneVsRestLoss.",
        )


def _never_clipped(
    model: LinearModel, loss: ConvexLoss, limits: FloatArray, lengths: FloatArray
) -> Iterator[Condition]:
    """Hold outputs that share a clip against the longest gradients that they can have.

    Args:
        limits: That rows are clipped to, shape (rows,).
        lengths: Most that each row's gradient can be.
    """
    yield Condition(
        not loss.apart,
        "a torch.nn.Linear model with one output, OneVsRest, or cross-entropy that clipping never "
        "reaches",
        f"a Linear with {model.outputs} outputs",
        "Clipping breaks contraction for it; use heads.OneVsRest with clipping='per_layer', or "
        "method='dp_sgd'.",
    )
    short = lengths + 1e-6 - limits  # Opacus adds as much to a norm
    first = int(np.argmax(short))
    yield Condition(
        not bool((short > 0.0).any()),
        f"clip bounds that no gradient reaches ({float((lengths + 1e-6)[first]):.6g} for one row)",
        f"{float(limits[first]):.6g}",
        "Softmax and clipping together are no contraction: raise max_grad_norm or the caps, scale "
        "the features, or use heads.OneVsRest.",
    )


def _class_numbers(task: Task, dataset: Any, *, row: int) -> Condition:
    """Hold targets of a softmax against classes: others scale the loss, whatever gradients show.

    A batch joins them to one tensor, so that one row tells the type of all.
    """
    target = task.collate([dataset[row]])[1]
    return Condition(
        isinstance(target, torch.Tensor) and not target.is_floating_point(),
        "class numbers as targets of a softmax",
        f"{getattr(target, 'dtype', type(target).__name__)} (row {row})",
        "The loss is as smooth as it is known to be only where targets sum to 1. Pass class "
        "numbers.",
    )


def _small_norms(account: Account, *, allowed: float) -> Condition:
    """Hold the gradients that were clipped against those that loss and features allow."""
    largest = account.largest_norm
    # A release that kept none says so in the certificate's context.
    return Condition(
        "earlier_release" in account.findings or largest <= allowed * SHIFT_ROUND_UP,
        f"gradients of norm at most {allowed:g} (what the loss and feature_norm allow)",
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
