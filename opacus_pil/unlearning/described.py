"""What an engine of unlearning is told about the training, beside what the training knows itself.

One description serves sweeps, unlearning, oracles and evaluation: checked here, and made the state
that everything else in this room goes on from. Runs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
import torch.nn as nn
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch.utils.data import Dataset

from .. import _validate as check
from ..accounting.instance_ids import InstanceIds
from ..capture.row_losses import LossOf
from ..files.fingerprint import dataset_fingerprint
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Collate, Task
from .grounds import require_no_running_statistics, weights_left
from .methods import TRAINING
from .optimizer_copy import fresh_optimizer
from .phase import Phase
from .state import MakeModel, TrainedState
from .trained_data import TrainedData
from .twin import plain_module, with_still_statistics


def described_state(
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    privacy_engine: PerInstancePrivacyEngine | None,
    criterion: Any,
    loss_of: LossOf | None,
    collate_fn: Collate | None,
    instance_ids: npt.ArrayLike | None,
    training_steps: int | None,
    feature_norm: float | None,
    batch_size: int | None,
    make_model: MakeModel | None,
) -> TrainedState:
    """Return the state of a trained model; arguments and errors as in UnlearningEngine."""
    if privacy_engine is not None:
        require_own_engine(privacy_engine)
    evaluated = evaluated_in_training(privacy_engine)
    require_no_running_statistics(plain_module(module), evaluated=evaluated)
    plain = with_still_statistics(plain_module(module))
    inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
    task = described_task(
        privacy_engine, criterion=criterion, loss_of=loss_of, collate_fn=collate_fn
    )
    if privacy_engine is None:
        cure = (
            "Pass privacy_engine=, the PerInstancePrivacyEngine that trained the model, whose "
            "ledger knows it; without one say training_steps= and batch_size= yourself."
        )
        steps = check.integer("training_steps", training_steps, low=1, cure=cure)
        size = float(check.integer("batch_size", batch_size, low=1, cure=cure))
    else:
        _require_ledger_of(
            privacy_engine, dataset, instance_ids=instance_ids, training_steps=training_steps
        )
        steps = privacy_engine.per_instance.steps
        size = float(privacy_engine.kernel.expected_batch_size)
    return TrainedState(
        module=plain,
        optimizer=optimizer_of(plain, inner, privacy_engine=privacy_engine),
        task=task,
        data=_described_data(dataset, privacy_engine, instance_ids=instance_ids),
        evaluated=evaluated,
        privacy_engine=privacy_engine,
        account=None if privacy_engine is None else privacy_engine.account,
        training_steps=steps,
        batch_size=size,
        feature_norm=feature_norm,
        make_model=make_model,
        weights=weights_left(privacy_engine, plain),
        phases=[Phase(steps, frozenset(), TRAINING)],
    )


def _require_ledger_of(
    privacy_engine: PerInstancePrivacyEngine,
    dataset: Any,
    *,
    instance_ids: npt.ArrayLike | None,
    training_steps: int | None,
) -> None:
    """Raise where the caller says something else than the ledger."""
    if instance_ids is not None:
        raise ValueError(
            "Expected instance_ids without privacy_engine only, got both. Pass them to "
            "PerInstancePrivacyEngine(instance_ids=...), whose ledger names them too."
        )
    trained_on = privacy_engine.kernel.num_instances
    if trained_on != len(dataset):
        raise ValueError(
            check.expected(
                "dataset",
                f"to be the training set of {trained_on} instances",
                len(dataset),
                "Pass it in the row order of training.",
            )
        )
    steps = privacy_engine.per_instance.steps
    if training_steps not in (None, steps):
        raise ValueError(
            f"Expected training_steps to be the {steps} steps of the ledger, got "
            f"{training_steps}. Leave it out with privacy_engine."
        )


def _described_data(
    dataset: Any,
    privacy_engine: PerInstancePrivacyEngine | None,
    *,
    instance_ids: npt.ArrayLike | None,
) -> TrainedData:
    """Return the data set beside what it held when training began, as far as that is known."""
    ids = InstanceIds(instance_ids) if privacy_engine is None else privacy_engine.instance_ids
    ids.require_size(len(dataset))
    if privacy_engine is None:
        return TrainedData(dataset, began=None, fingerprint_of=dataset_fingerprint, ids=ids)
    return TrainedData(
        dataset,
        began=privacy_engine.fingerprint,
        fingerprint_of=privacy_engine.fingerprint_of,
        ids=ids,
    )


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
    trainings = () if privacy_engine is None else privacy_engine.trainings
    for training in trainings:
        trained = training.module._module
        if trained is not module and _moves(optimizer, trained) and _alike(trained, module):
            return fresh_optimizer(optimizer, module=trained, twin=module)
    return optimizer


def _moves(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Whether all parameters of an optimizer are a module's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return held <= set(map(id, module.parameters()))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters of the same shapes and types, in one order."""
    return list(map(_form, one.parameters())) == list(map(_form, other.parameters()))


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
