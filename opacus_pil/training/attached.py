"""A training that Opacus made private elsewhere, before its first step: what it is, checked.

Knows Opacus's optimizers and loaders; no ledger. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opacus.data_loader import DPDataLoader
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)

from .. import _validate as check
from ..capture.collate import unwrapped
from ..capture.norms import require_known
from ..capture.shards import Shard
from ..errors import UnsupportedError
from .support import is_distributed, require_map_style


@dataclass(frozen=True)
class Attached:
    """Somebody else's private training.

    Attributes:
        dataset: Its rows.
        sample_rate: Probability that a row is drawn.
        options: Those arguments of make_private that it must have been given.
        collate_fn: Joins items to a batch; None: not known.
        rand_on_empty: Whether an empty draw gets a random instance.
    """

    dataset: Any
    sample_rate: float
    options: dict[str, Any]
    collate_fn: Any
    rand_on_empty: bool


def attached(
    *, optimizer: Any, data_loader: Any, dataset: Any, sample_rate: float | None
) -> Attached:
    """Return what a private training is; arguments and errors as in `attach` of the engine."""
    if not isinstance(optimizer, DPOptimizer):
        raise TypeError(
            check.expected(
                "optimizer", "to be Opacus's DPOptimizer", type(optimizer).__name__,
                "Attach after make_private; a plain optimizer adds no noise.",
            )
        )  # fmt: skip
    require_known(optimizer)
    dataset, rate = _rows(data_loader, dataset=dataset, sample_rate=sample_rate)
    moved = any(p.grad is not None for p in optimizer.params)
    if moved or optimizer.original_optimizer.state:
        raise ValueError(
            "Expected an optimizer that has made no step, got one with gradients or state. "
            "Steps before attach are not charged: attach right after make_private, and call "
            "optimizer.zero_grad(set_to_none=True) if there was a backward pass only."
        )
    ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
    options: dict[str, Any] = {"grad_sample_mode": "ghost" if ghost else "hooks"}
    if isinstance(optimizer, DPPerLayerOptimizer):
        options["clipping"] = "per_layer"
    elif isinstance(optimizer, AdaClipDPOptimizer):
        options |= {"clipping": "adaptive", "unclipped_num_std": optimizer.unclipped_num_std}
    join = None if data_loader is None else data_loader.collate_fn
    return Attached(
        dataset,
        rate,
        options,
        collate_fn=None if join is None else unwrapped(join),
        rand_on_empty=join is not None and join.rand_on_empty,
    )


def attached_shard(module: Any, data_loader: Any) -> Shard | None:
    """Return this process's shard of a distributed training that was made private already."""
    if not is_distributed(module):
        return None
    if data_loader is None or not data_loader.distributed:
        raise UnsupportedError(
            "Expected Opacus's distributed DPDataLoader with a distributed module, got none: "
            "which rows belong to this rank is not known. Pass data_loader."
        )
    return Shard.of_process(len(data_loader.dataset))


def _rows(data_loader: Any, *, dataset: Any, sample_rate: float | None) -> tuple[Any, float]:
    """Return the data set, and the probability that a row is drawn."""
    if data_loader is None:
        if dataset is None:
            raise ValueError(
                "Expected data_loader, or dataset with sample_rate, got neither. Pass one."
            )
        rate = check.probability(
            "sample_rate", sample_rate, "Pass the rate your loader draws every row at."
        )
        return dataset, rate
    if dataset is not None or sample_rate is not None:
        raise ValueError("Expected data_loader or dataset with sample_rate, got both. Pass one.")
    require_map_style(data_loader)
    if not isinstance(data_loader, DPDataLoader):
        raise UnsupportedError(
            f"Expected Opacus's DPDataLoader, got {type(data_loader).__name__}. Pass "
            "dataset and sample_rate, and say batch(indices=...) around each step."
        )
    return data_loader.dataset, float(data_loader.sample_rate)
