"""PrivateTraining: a LightningModule whose training is Opacus's, accounted per instance.

Knows Lightning's Trainer; what is charged is the engine's. Needs the extra "lightning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from .. import _validate as check
from ..capture.row_losses import LossOf
from ..errors import UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from .nobody import know_nobody
from .scalars import privacy_scalars


class PrivateTraining(LightningModule):
    """A plain module, its optimizer and its loader, made private; give it to `Trainer.fit` alone.

    Guarantee: that of the engine, per step and instance; `privacy_engine.get_per_instance_epsilon`
        has the label. The loss that is trained is the mean over a batch of the named loss.

    Args:
        module: The plain module; afterwards it is the trained one. Add `validation_step` and the
            like in a subclass, by `self.module`.
        optimizer: Plain, of its parameters.
        data_loader: Plain; its batch size is the expected one.
        privacy_engine: A PerInstancePrivacyEngine.
        noise_multiplier, max_grad_norm: As in `make_private`.
        criterion: Loss of (outputs, targets), where batches are such pairs.
        loss_of: In its place: loss_of(module, batch) -> one loss per row, shape (rows,).
        delta: With it "epsilon" is logged at each epoch's end: the worst case, which depends on
            public constants only.
        log_quantiles: Also log quantiles of the per-instance ε.
        make_private_options: More arguments of `make_private`.

    Raises:
        UnsupportedError: Ghost clipping, whose loss is another object; from `fit`: gradient
            accumulation or clipping by Lightning, other precision than 32 bits, several devices,
            resuming from a Lightning checkpoint, which holds no ledger.
        TypeError, ValueError: Of `make_private`; or no loss.

    Noise comes from torch's global generator unless make_private_options has a "noise_generator":
        `seed_everything` makes it known to whoever knows the seed.

    Privacy: quantiles of per-instance values are private data, whichever logger they go to; so is a
        training loss that a subclass logs.
    """

    def __init__(
        self, module: nn.Module, *, optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any], privacy_engine: PerInstancePrivacyEngine,
        noise_multiplier: float, max_grad_norm: float | list[float], criterion: Any = None,
        loss_of: LossOf | None = None, delta: float | None = None, log_quantiles: bool = False,
        make_private_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = dict(make_private_options or {})
        if options.get("grad_sample_mode") == "ghost":
            raise UnsupportedError(
                "Expected grad_sample_mode 'hooks', 'functorch' or 'ew', got 'ghost': its loss is "
                "an object of its own, which takes two passes. Write the loop by hand."
            )
        if (criterion is None) == (loss_of is None):
            raise TypeError(
                f"Expected criterion or loss_of, got {'neither' if loss_of is None else 'both'}. "
                "Pass one."
            )
        self.delta = None if delta is None else check.delta(delta)
        self.log_quantiles = log_quantiles
        self.privacy_engine = privacy_engine
        if criterion is not None:
            options["criterion"] = criterion
        # In a tuple: what Opacus wraps is no second child, and checkpoints have the plain names.
        self._made = privacy_engine.make_private(
            module=module.train(), optimizer=optimizer, data_loader=data_loader,
            noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, loss_of=loss_of,
            **options,
        )  # fmt: skip
        know_nobody(self._made[2])
        self.module = module

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Opacus's optimizer."""
        optimizer: torch.optim.Optimizer = self._made[1]
        return optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        """Return Opacus's loader, which draws each row by a coin of its own."""
        loader: DataLoader[Any] = self._made[2]
        return loader

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the module does."""
        return self.module(*inputs, **named)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the mean of the named loss over the rows that were drawn; of nobody, 0."""
        losses = self.privacy_engine.task.loss_of(self._made[0], batch)
        return losses.sum() / max(len(losses), 1)

    def on_train_epoch_end(self) -> None:
        """Log what was spent, if `delta` was given."""
        if self.delta is not None:
            self.log_dict(
                privacy_scalars(self.privacy_engine, delta=self.delta, quantiles=self.log_quantiles)
            )

    def on_fit_start(self) -> None:
        """Refuse a Trainer under which a step is not the mechanism that is charged."""
        trainer = self.trainer
        wrong = {
            "accumulate_grad_batches > 1": trainer.accumulate_grad_batches != 1,
            "gradient_clip_val": bool(trainer.gradient_clip_val),
            f"precision {trainer.precision}": trainer.precision not in ("32-true", "64-true"),
            "overfit_batches": bool(trainer.overfit_batches),
            "several devices": trainer.world_size > 1,
        }
        found = [name for name, is_so in wrong.items() if is_so]
        if found:
            raise UnsupportedError(
                f"Expected a Trainer whose every step is one drawn batch on one device, got "
                f"{', '.join(found)}. Leave it out: Opacus clips each row's gradient."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that holds no ledger.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "Expected a fit from its beginning, got a Lightning checkpoint: it holds no ledger. "
            "Load weights into the plain module; privacy_engine.save_checkpoint keeps a training."
        )
