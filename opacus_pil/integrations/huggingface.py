"""PrivateTrainer: Hugging Face's Trainer, made private before its first step.

Knows transformers' Trainer and dict batches; what is charged is the engine's. Needs the extra "hf".
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from .. import _validate as check
from ..capture.row_losses import LossOf
from ..errors import UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from .nobody import know_nobody
from .scalars import privacy_scalars

_IGNORED = -100  # transformers' label of a token that is not learned


def label_losses(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return each row's cross-entropy, shape (rows,), for one class number per row in "labels".

    Raises:
        UnsupportedError: Labels or logits of another shape.
    """
    labels, logits = _labels_and_logits(model, batch)
    if labels.ndim != 1 or labels.is_floating_point() or logits.ndim != 2:
        raise UnsupportedError(
            f"Expected one class number per row, got labels of shape {tuple(labels.shape)} for "
            f"logits of shape {tuple(logits.shape)}. Pass loss_of=token_losses (a label per "
            "token), next_token_losses (causal language models), or a function of your own."
        )
    return cross_entropy(logits, labels, reduction="none")


def token_losses(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return each row's mean cross-entropy over its own tokens, for a class number per token.

    Not the mean over all tokens of the batch, as in transformers: that joins the rows.
    """
    labels, logits = _labels_and_logits(model, batch)
    return _token_means(logits, labels)


def next_token_losses(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return each row's mean cross-entropy of the next token, for causal language models."""
    labels, logits = _labels_and_logits(model, batch)
    return _token_means(logits[:, :-1], labels[:, 1:])


def _labels_and_logits(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if "labels" not in batch:
        raise UnsupportedError(
            f'Expected batches with "labels", got {sorted(batch)}. Pass loss_of=.'
        )
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    return batch["labels"], outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _token_means(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    learned = labels != _IGNORED
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED)
    return losses.sum(dim=1) / learned.sum(dim=1).clamp(min=1)


class PrivateTrainer(Trainer):
    """Trainer whose batches are Poisson draws, whose optimizer is Opacus's, and that is accounted.

    Guarantee: that of the engine, per step and instance; `privacy_engine.get_per_instance_epsilon`
        has the label. The loss that is trained is exactly the mean of `loss_of` over a batch.

    Args:
        args: Of transformers. Its per_device_train_batch_size is the expected batch size.
        privacy_engine: A PerInstancePrivacyEngine that has trained nothing yet.
        noise_multiplier: As in `make_private`.
        max_grad_norm: C, the clip bound of one row's gradient. Default: args.max_grad_norm. The
            Trainer's own clipping, of the batch's gradient, is off.
        loss_of: loss_of(model, batch) -> one loss per row, shape (rows,). Default: `label_losses`.
        delta: With it "epsilon" is logged with everything else: the worst case, which depends on
            public constants only.
        log_quantiles: Also log quantiles of the per-instance ε.
        noise_seed: Seed of draws and noise, for experiments only: whoever knows it can remove the
            noise. None: from the system's entropy, and not from torch's global generator, which
            the Trainer seeds with args.seed, the same 42 for everybody by default.
        make_private_options: More arguments of `make_private`, such as grad_sample_mode.
        options: The Trainer's other arguments: model, train_dataset, data_collator, …

    Raises:
        UnsupportedError: Arguments under which a step is not the mechanism that is charged:
            gradient accumulation, fp16 and bf16, recomputed activations, ghost clipping, several
            processes or devices, model_init, label smoothing, a loss function of the Trainer's,
            compiled models, resuming.

    Learned position embeddings get one gradient for the whole batch unless positions are given per
        row: let the data set hold "position_ids", or freeze them.

    Privacy: the training loss that the Trainer logs is computed from private rows and covered by no
        ε. So are quantiles of per-instance values (`log_quantiles`), whichever logger they go to.
        Its checkpoints hold weights only, not the ledgers: `privacy_engine.save_checkpoint`.
    """

    def __init__(
        self, *, args: TrainingArguments, privacy_engine: PerInstancePrivacyEngine,
        noise_multiplier: float, max_grad_norm: float | None = None, loss_of: LossOf = label_losses,
        delta: float | None = None, log_quantiles: bool = False, noise_seed: int | None = None,
        make_private_options: Mapping[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        private_options = dict(make_private_options or {})
        _require_plain_steps(args, options, private_options)
        self._noise_multiplier = check.noise_multiplier(noise_multiplier)
        bound = args.max_grad_norm if max_grad_norm is None else max_grad_norm
        if noise_seed is not None:
            check.integer("noise_seed", noise_seed, low=0)
        self._clip_bound = check.real("max_grad_norm", bound, low=0.0, open_low=True)
        self._delta = None if delta is None else check.delta(delta)
        super().__init__(args=args, **options)
        self.privacy_engine = privacy_engine
        self.loss_of = loss_of
        self._log_quantiles = log_quantiles
        self._noise_seed = noise_seed
        self._make_private_options = private_options
        self._private: tuple[Any, Any, DataLoader[Any]] | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train as the Trainer does, privately; called again, it goes on with the same ledger.

        Raises:
            UnsupportedError: `resume_from_checkpoint`.
        """
        if resume_from_checkpoint:
            raise UnsupportedError(
                "Expected resume_from_checkpoint=None, got one: a Trainer's checkpoint holds no "
                "ledger, and skips draws that were charged. Save with privacy_engine."
                "save_checkpoint and load with load_checkpoint."
            )
        module, optimizer, _ = self._made_private()
        self.model_wrapped, self.optimizer = module, optimizer
        return super().train(None, *args, **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Opacus's loader, which draws each row by a coin of its own."""
        return self._made_private()[2]

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Take the gradients of a batch; what an earlier step left is dropped first."""
        self._made_private()[1].zero_grad()  # the Trainer asks the model only, which keeps sums
        if _is_empty(inputs):
            return self._step_of_nobody()
        loss: torch.Tensor = super().training_step(model, inputs, None)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean of `loss_of` in training; in evaluation what the Trainer computes."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise UnsupportedError("Expected training to ask for the loss alone, got more.")
        losses = self.loss_of(model, inputs)
        return losses.sum() / max(len(losses), 1)  # 0, not NaN, where nobody was drawn

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log as the Trainer does, with `delta` the worst-case epsilon too."""
        if self._delta is not None and self._private is not None:
            spent = privacy_scalars(
                self.privacy_engine, delta=self._delta, quantiles=self._log_quantiles
            )
            logs = {**logs, **spent}
        super().log(logs, *args, **options)

    def _made_private(self) -> tuple[Any, Any, DataLoader[Any]]:
        """Call make_private, once."""
        if self._private is None:
            plain = super().get_train_dataloader()
            coins, noise = own_generators(self._noise_seed, device=self.args.device)
            loader: DataLoader[Any] = DataLoader(
                plain.dataset, batch_size=self.args.train_batch_size, collate_fn=plain.collate_fn,
                num_workers=plain.num_workers, pin_memory=plain.pin_memory, generator=coins,
            )  # fmt: skip
            self._private = self.privacy_engine.make_private(
                module=self.model.train(),
                optimizer=self.create_optimizer(),
                data_loader=loader,
                noise_multiplier=self._noise_multiplier,
                max_grad_norm=self._clip_bound,
                loss_of=self.loss_of,
                **{"noise_generator": noise, **self._make_private_options},
            )
            know_nobody(self._private[2])
        return self._private

    def _step_of_nobody(self) -> torch.Tensor:
        """Say that nobody has a gradient: many of transformers' models cannot run on no rows."""
        for parameter in self._made_private()[1].params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        return torch.zeros((), device=self.args.device)

    def _clip_grad_norm(self, model: Any) -> None:
        """Leave the batch's gradient alone: rows were clipped, and its norm is nobody's to log."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Log no norm of a gradient without noise."""


def own_generators(
    seed: int | None, *, device: torch.device | str = "cpu"
) -> tuple[torch.Generator, torch.Generator]:
    """Return a generator of draws and one of noise; without a seed from the system's entropy."""
    entropy = secrets.randbits(128) if seed is None else seed
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    coins, noise = torch.Generator(), torch.Generator(device)
    return coins.manual_seed(int(words[0] >> 2)), noise.manual_seed(int(words[1] >> 2))


def _is_empty(batch: Any) -> bool:
    """Whether nobody was drawn."""
    return any(torch.is_tensor(value) and not len(value) for value in batch.values())


def _require_plain_steps(
    args: TrainingArguments, options: Mapping[str, Any], private: Mapping[str, Any]
) -> None:
    """Raise where a step of the Trainer would not be the mechanism that is charged."""
    wrong = {
        "gradient_accumulation_steps > 1": args.gradient_accumulation_steps > 1,
        "fp16 or bf16": args.fp16 or args.bf16,
        "several devices or processes": args.n_gpu > 1 or args.world_size > 1,
        "auto_find_batch_size": args.auto_find_batch_size,
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "torch_compile": args.torch_compile,
        "activations that are computed twice": any(
            getattr(args, name, False)
            for name in ("gradient_checkpointing", "activation_checkpointing")
        ),
        "use_liger_kernel": args.use_liger_kernel,
        "deepspeed or fsdp": bool(args.deepspeed) or bool(args.fsdp),
        "model_init": options.get("model_init") is not None,
        "compute_loss_func": options.get("compute_loss_func") is not None,
        "grad_sample_mode 'ghost'": private.get("grad_sample_mode") == "ghost",
        "train_dataset=None": options.get("train_dataset") is None,
    }
    found = [name for name, is_so in wrong.items() if is_so]
    if found:
        raise UnsupportedError(
            f"Expected a Trainer whose every step is one drawn batch in one process, got "
            f"{', '.join(found)}. Leave it out; name the loss by loss_of=."
        )
