"""What an engine of unlearning is told about the training, beside what the training knows itself.

One description serves sweeps, unlearning, oracles and evaluation. Knows tasks; runs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from opacus import PrivacyEngine

from ..capture.row_losses import LossOf
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Collate, Task
from .optimizer_copy import fresh_optimizer


def described_task(
    privacy_engine: PerInstancePrivacyEngine | None,
    *,
    criterion: Any = None,
    loss_of: LossOf | None = None,
    collate_fn: Collate | None = None,
) -> Task:
    """Return the training's own task, or what the caller says in its place.

    A criterion of the same kind and settings as the training's is the training's.

    Raises:
        ValueError: criterion and loss_of, or neither without a privacy_engine.
    """
    plain = getattr(criterion, "criterion", criterion)  # ghost mode wraps the loss
    if plain is not None and loss_of is not None:
        raise ValueError(
            "Expected criterion or loss_of, got both. Pass loss_of alone: it says what each row's "
            "loss is."
        )
    if privacy_engine is not None:
        own = privacy_engine.task
        if same_loss(plain, own.criterion, reduced=not own.per_row):
            plain = None
        if loss_of is not None and loss_of is own.own_loss:
            loss_of = None
        return privacy_engine.task_with(criterion=plain, loss_of=loss_of, collate_fn=collate_fn)
    if plain is None and loss_of is None:
        raise ValueError(
            "Expected criterion or loss_of without privacy_engine, got neither. Pass the loss that "
            "was trained with."
        )
    reduction = getattr(plain, "reduction", "mean")
    return Task(
        criterion=plain,
        own_loss=loss_of,
        collate_fn=collate_fn,
        reduction="sum" if reduction == "sum" else "mean",
    )


def same_loss(one: Any, other: Any, *, reduced: bool = True) -> bool:
    """Whether two criteria compute the same: one object, or modules of one class and settings.

    Args:
        reduced: Their `reduction` counts.
    """
    if one is other:
        return True
    if not isinstance(one, nn.Module) or type(one) is not type(other) or any(one.children()):
        return False
    left, right = (_settings(part) for part in (one, other))
    if not reduced:
        left.pop("reduction", None)
        right.pop("reduction", None)
    return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)


def evaluated_in_training(privacy_engine: PerInstancePrivacyEngine | None) -> frozenset[str]:
    """Return the names of submodules that were in evaluation mode while the model was trained."""
    trainings = () if privacy_engine is None else privacy_engine.trainings
    for training in reversed(trainings):
        if training.evaluated is not None:
            return training.evaluated - {""}
    return frozenset()


def optimizer_of(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    privacy_engine: PerInstancePrivacyEngine | None,
) -> torch.optim.Optimizer:
    """Return the optimizer of a module: for a copy of what was trained, one like the training's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for training in () if privacy_engine is None else privacy_engine.trainings:
        trained = training.module._module
        own = {id(p) for p in trained.parameters()}
        copied = [_form(p) for p in trained.parameters()] == [_form(p) for p in module.parameters()]
        if trained is not module and held <= own and copied:
            return fresh_optimizer(optimizer, module=trained, twin=module)
    return optimizer


def require_own_engine(privacy_engine: Any) -> None:
    """Raise for an engine that keeps no ledger of instances.

    Raises:
        TypeError: Says how to get one.
    """
    if isinstance(privacy_engine, PerInstancePrivacyEngine):
        return
    kind = type(privacy_engine)
    name = "opacus.PrivacyEngine" if kind is PrivacyEngine else kind.__name__
    raise TypeError(
        f"Expected privacy_engine to be a PerInstancePrivacyEngine, got {name}, which keeps no "
        "account of instances. Train with PerInstancePrivacyEngine; or, where another engine makes "
        "the training private, call PerInstancePrivacyEngine().attach(module=, optimizer=, "
        "data_loader=) on what it returned, before the first step."
    )


def _form(parameter: nn.Parameter) -> tuple[Any, ...]:
    return parameter.shape, parameter.dtype


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if name not in _TORCHS}
    return {**own, **dict(module.named_parameters()), **dict(module.named_buffers())}


def _equal(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and torch.equal(one.detach(), other.detach().to(one))
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError):  # arrays, say
        return False


_TORCHS = frozenset(vars(nn.Module()))  # attributes of every module
