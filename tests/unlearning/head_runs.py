"""What the tests of unlearning heads share: caps, a goal, an engine for a training."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from opacus_pil import UnlearningEngine
from tests.heads.models import CLASSES, SIZE, Heads

DELTA = 1e-2
GOAL = {"epsilon": 2.0, "delta": DELTA, "method": "langevin", "max_steps": 5000}
CAPS = np.random.default_rng(0).uniform(0.05, 1.0, (SIZE, CLASSES))
FLAT = {"clipping": "flat", "caps": CAPS[:, 0]}


def unlearning(made: Heads, **changes) -> UnlearningEngine:
    arguments = {
        "optimizer": made.optimizer, "dataset": made.data, "privacy_engine": made.engine,
        "progress": False, **changes,
    }  # fmt: skip
    return UnlearningEngine(made.module, **arguments)


def columns(data: TensorDataset) -> TensorDataset:
    """One-hot targets, for BCEWithLogitsLoss."""
    return TensorDataset(data.tensors[0], torch.eye(CLASSES)[data.tensors[1]])
