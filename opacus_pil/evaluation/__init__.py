"""Evidence against retraining: oracles, gaps, loss barriers."""

from .gap import Gap as Gap
from .gap import Metrics as Metrics
from .gap import SplitGap as SplitGap
from .gap import Spread as Spread
from .gap import evaluate as evaluate
from .gap import evaluate_splits as evaluate_splits
from .gap import oracle_gap as oracle_gap
from .gap import time_to_unlearn as time_to_unlearn
from .loss_barrier import LossBarrier as LossBarrier
from .loss_barrier import loss_barrier as loss_barrier
from .oracle import retrained_oracles as retrained_oracles

__all__ = [
    "Gap",
    "LossBarrier",
    "Metrics",
    "SplitGap",
    "Spread",
    "evaluate",
    "evaluate_splits",
    "loss_barrier",
    "oracle_gap",
    "retrained_oracles",
    "time_to_unlearn",
]
