"""What the tests of unlearning heads share: caps, a goal, trainings and an engine for one."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pil import UnlearningEngine
from opacus_pil.heads import FrozenFeatures
from tests.heads.models import CLASSES, SIZE, Heads, binary, bounded, frozen, head, raw

DELTA = 1e-2
GOAL = {"epsilon": 2.0, "delta": DELTA, "method": "langevin", "max_steps": 5000}
CAPS = np.random.default_rng(0).uniform(0.05, 1.0, (SIZE, CLASSES))
FLAT = {"clipping": "flat", "caps": CAPS[:, 0]}
LINEAR = {"data": binary(bounded()), "criterion": nn.BCEWithLogitsLoss(), **FLAT}
SOFTMAX = {"criterion": nn.CrossEntropyLoss(), "policy": "worst_case", "clipping": "flat"}


def unlearning(made: Heads, **changes) -> UnlearningEngine:
    arguments = {
        "optimizer": made.optimizer, "dataset": made.data, "privacy_engine": made.engine,
        "progress": False, **changes,
    }  # fmt: skip
    return UnlearningEngine(made.module, **arguments)


def on_kept_features() -> Heads:
    """A head on features that were computed once, whose data can erase rows."""
    return Heads(data=FrozenFeatures(raw(), frozen(head())[:-1], progress=False), caps=CAPS)


def columns(data: TensorDataset) -> TensorDataset:
    """One-hot targets, for BCEWithLogitsLoss."""
    return TensorDataset(data.tensors[0], torch.eye(CLASSES)[data.tensors[1]])
