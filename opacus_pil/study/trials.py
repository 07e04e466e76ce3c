"""The kinds of trials: the original training, one without a fold, an oracle, an unlearning run.

Each is a function of its configuration and of finished trials that the configuration names by key.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import TensorDataset

from .. import datasets
from .._validate import FloatArray
from ..capture.sweep import sweep
from ..evaluation import last_layer_features, last_layer_leverage, loss_barrier
from ..evaluation.difficulty import DifficultyTracker
from ..evaluation.ensemble import read_trial
from .noisy_steps import losses_and_correct, make_model, run_steps
from .settings import Condition, Settings


@functools.lru_cache(maxsize=2)
def parts(dataset: str, train: int, test: int, seed: int) -> dict[str, datasets.ImageData]:
    """Return the training and the test images of a study; the same in every process."""
    return datasets.split(
        datasets.load(dataset),
        sizes={"train": train, "test": test},
        generator=torch.Generator().manual_seed(seed),
    )


def common_config(settings: Settings, condition: Condition, *, seed: int) -> dict[str, Any]:
    """Return what every trial of one condition depends on."""
    sizes = settings.sizes
    return {
        "recipe": settings.recipe,
        "dataset": settings.dataset,
        "split": [sizes.train, sizes.test, seed],
        "model": condition.model,
        "initialisation": seed,
        "batch_size": sizes.batch_size,
        "steps_per_epoch": sizes.steps_per_epoch,
        "noise_std": condition.noise_std,
        "weight_decay": condition.weight_decay,
        "step_size": condition.step_size,
        "epochs": condition.epochs,
    }


class _Task:
    """A configuration, made into what the steps need."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        data = parts(config["dataset"], *config["split"])
        self.images, self.labels = data["train"].images, data["train"].labels
        self.test = data["test"].images, data["test"].labels
        noise = config["noise_std"]
        self.condition = Condition(
            "", config["model"], noise, noise, config["weight_decay"], config["epochs"],
            step_size=config["step_size"],
        )  # fmt: skip

    def fresh(self) -> nn.Module:
        """Return the model at its start: one initialisation for a study, oracles included.

        Oracles differ by batches and noise only: between models from different starts a loss
        barrier says nothing about the forget set.
        """
        return make_model(
            self.config["model"], side=self.images.shape[-1], seed=self.config["initialisation"]
        )

    def kept(self, forget: list[int]) -> torch.Tensor:
        """Return the rows that stay."""
        stays = torch.ones(len(self.labels), dtype=torch.bool)
        stays[forget] = False
        return stays.nonzero()[:, 0]

    def steps(self, module: nn.Module, *, forget: list[int], epochs: int, **more: Any) -> None:
        """Train on the rows that stay."""
        size = self.config["batch_size"]
        run_steps(
            module, images=self.images, labels=self.labels, rows=self.kept(forget),
            condition=self.condition, sample_rate=size / len(self.labels), batch_size=size,
            steps=epochs * self.config["steps_per_epoch"], seed=self.config["seed"], **more,
        )  # fmt: skip

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Return weights, every training row's loss and correctness, and the same on test rows."""
        loss, correct = losses_and_correct(module, self.images, self.labels)
        test_loss, test_correct = losses_and_correct(module, *self.test)
        return {
            "weights": module.state_dict(),
            "loss": loss, "correct": correct,
            "test_loss": float(test_loss.mean()),
            "test_accuracy": float(test_correct.double().mean()),
        }  # fmt: skip


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Leave out two notices of Opacus and torch at every training, in whatever process it runs."""
    with warnings.catch_warnings():
        for notice in ("Secure RNG turned off", "Full backward hook is firing"):
            warnings.filterwarnings("ignore", message=notice)
        yield


@without_notices()
def original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train on everything; full passes before every epoch and after the last one.

    Returns also `norms`, shape (epochs, instances): those that are held through each epoch; and
    `scores`, every difficulty score from the batches and the same passes, and the leverage at the
    end.
    """
    task = _Task(config)
    module = task.fresh()
    rows = TensorDataset(task.images, task.labels)
    early = config["early_epochs"] * config["steps_per_epoch"]
    tracker = DifficultyTracker(len(rows), early_steps=early, traces=True)
    norms: list[torch.Tensor] = []

    def look() -> None:
        found = sweep(module, rows, criterion=nn.CrossEntropyLoss(), keep_outputs=True)
        tracker.observe(found, targets=task.labels)
        norms.append(torch.from_numpy(found.norms))

    def after_step(step: int, drawn: torch.Tensor, outputs: torch.Tensor) -> None:
        tracker.update(outputs, task.labels[drawn], indices=drawn.numpy())
        if step % config["steps_per_epoch"] == 0:
            look()

    look()
    task.steps(module, forget=[], epochs=config["epochs"], after_step=after_step)
    return {
        **task.state(module),
        "norms": torch.stack(norms[:-1]),
        "last_norms": norms[-1],
        "scores": {**tracker.scores(), "leverage": _leverage(module, task.images)},
    }


def _leverage(module: nn.Module, images: torch.Tensor) -> FloatArray:
    """Return every row's leverage, with a ridge that leaves ranks almost as they are."""
    features = last_layer_features(module, images)
    return last_layer_leverage(features, ridge=1e-3 * float((features**2).sum(axis=1).mean()))


def held_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train from the start without a fold, looking at its rows before every epoch.

    Returns also `norms`, shape (epochs, members of the fold), ascending rows.
    """
    task = _Task(config)
    module = task.fresh()
    fold = config["forget_set"]
    rows = TensorDataset(task.images, task.labels)
    norms: list[torch.Tensor] = []

    def look() -> None:
        found = sweep(module, rows, criterion=nn.CrossEntropyLoss(), indices=fold)
        norms.append(torch.from_numpy(found.norms))

    def after_step(step: int, _drawn: torch.Tensor, _outputs: torch.Tensor) -> None:
        if step % config["steps_per_epoch"] == 0:
            look()

    look()
    task.steps(module, forget=fold, epochs=config["epochs"], after_step=after_step)
    return {**task.state(module), "norms": torch.stack(norms[:-1])}


def oracle(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train from the start without the forget set."""
    task = _Task(config)
    module = task.fresh()
    task.steps(module, forget=config["forget_set"], epochs=config["epochs"])
    return task.state(module)


def unlearning(config: Mapping[str, Any], *, folder: str) -> dict[str, Any]:
    """Fine-tune the original on the rows that stay, watching the forget set.

    Returns also `steps`, shape (records,), the `curve_loss` and `curve_correct` of the forget set,
    shape (records, members), and the loss barriers to one oracle.
    """
    task = _Task(config)
    forget = config["forget_set"]
    module = task.fresh()
    module.load_state_dict(read_trial(folder, config["start"])["weights"])
    start, retrained = task.fresh(), task.fresh()
    start.load_state_dict(module.state_dict())
    retrained.load_state_dict(read_trial(folder, config["oracle"])["weights"])
    x, y = task.images[forget], task.labels[forget]
    steps, losses, right = [], [], []

    def record(step: int) -> None:
        loss, correct = losses_and_correct(module, x, y)
        steps.append(step)
        losses.append(loss)
        right.append(correct)

    def after_step(step: int, _drawn: torch.Tensor, _outputs: torch.Tensor) -> None:
        if step % config["record_every"] == 0:
            record(step)

    record(0)
    task.steps(module, forget=forget, epochs=config["unlearning_epochs"], after_step=after_step)
    count = config["barrier_rows"]
    splits = {"forget": (x, y), "test": (task.test[0][:count], task.test[1][:count])}
    barriers = {
        name: {
            split: {"chord": line.barrier, "above_ends": line.above_ends}
            for split, line in loss_barrier(
                model, retrained, splits=splits, criterion=nn.CrossEntropyLoss()
            ).items()
        }
        for name, model in (("original", start), ("unlearned", module))
    }
    return {
        **task.state(module),
        "steps": torch.tensor(steps),
        "curve_loss": torch.stack(losses),
        "curve_correct": torch.stack(right),
        "barriers": barriers,
    }
