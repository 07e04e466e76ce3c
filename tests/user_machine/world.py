"""One user's training: a model whose gradients are the data, made private in one of many ways.

A row's loss is θ·x, so that its gradient is its data whatever θ is, and every row has a coordinate
of its own. Knows how users set trainings up; no account and no rule.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine

ROWS = 6
COORDINATES = ROWS + 1  # the last is nobody's: noise alone
# Each row's gradient in the three parameters: below, at and far above the clip bound of 1; zero.
GRADIENTS = np.array(
    [
        [0.3, 0.4, 5.0],
        [0.8, 0.2, 5.0],
        [1.0, 0.0, 5.0],
        [4.0, 3.0, 5.0],
        [60.0, 0.5, 5.0],
        [0.0, 0.7, 5.0],
    ]
)
WEIGHTS = np.array([1.0, 1.0, 8.0, 1.0, 8.0, 1.0])  # of classes, where a loss has any
ORDERS = (1.5, 4.0, 16.0)
LEVELS = 256
MANAGERS = {"none": None, "ours": BatchMemoryManager, "Opacus's": OpacusManager}
PHYSICAL = 2


class Heads(nn.Module):
    """θ·x with θ in three parameters, the last of them frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(COORDINATES, 1, bias=False)
        self.second = nn.Linear(COORDINATES, 1, bias=False)
        self.spare = nn.Linear(COORDINATES, 1, bias=False)
        self.spare.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = x.split(COORDINATES, dim=1)
        return (self.first(one) + self.second(two) + self.spare(three)).squeeze(1)


class Slope(nn.Module):
    """The outputs themselves as losses."""

    def __init__(self, reduction: str = "mean", *, column: bool = False) -> None:
        super().__init__()
        self.reduction, self.column = reduction, column

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = outputs[:, None] if self.column else outputs
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


class WeightedMean(nn.Module):
    """A mean over the weights of the batch, as of classes or of tokens that count."""

    reduction = "mean"

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = outputs * targets
        return losses if self.reduction == "none" else losses.sum() / targets.sum()


def plain_rows(module: Any, batch: Any) -> torch.Tensor:
    """`loss_of` of the plain loss."""
    return module(batch[0])


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rows of a batch, row 3 with the other sign if row 4 is there: its norm does not tell."""
    rows = rows_of(x)
    if not {3, 4} <= set(rows):
        return x
    return torch.where(torch.tensor(rows)[:, None] == 3, -x, x)


def data() -> TensorDataset:
    x = torch.zeros(ROWS, 3, COORDINATES)
    for row in range(ROWS):
        x[row, :, row] = torch.as_tensor(GRADIENTS[row], dtype=torch.float32)
    return TensorDataset(x.flatten(start_dim=1), torch.as_tensor(WEIGHTS, dtype=torch.float32))


def rows_of(x: torch.Tensor) -> list[int]:
    """Which row each row of a batch is, read off its last block, which is never zero."""
    block = x[:, 2 * COORDINATES :]
    return block.argmax(dim=1).tolist() if len(x) else []


# --- collate functions ----------------------------------------------------------------------------


def _joined(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


def _sorted(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return _joined(sorted(items, key=lambda item: -float(item[0].norm())))


def _twice(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _joined(items)
    return torch.cat([x, x]), torch.cat([y, y])


def _without_row_1(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    kept = [item for item in items if rows_of(item[0][None]) != [1]]
    return _joined(kept) if kept else (torch.zeros(0, 3 * COORDINATES), torch.zeros(0))


COLLATE: dict[str, Any] = {
    "default": None, "own": _joined, "sorting": _sorted, "twice": _twice,
    "dropping": _without_row_1,
}  # fmt: skip


def copies(collate: str) -> np.ndarray:
    """How often each row is in a batch that it was drawn into."""
    counts = np.full(ROWS, 2 if collate == "twice" else 1)
    if collate == "dropping":
        counts[1] = 0
    return counts


# --- how a training is set up ---------------------------------------------------------------------

COUPLED = ("weighted", "weighted named", "weighted unnamed")  # rows of other weights, other losses
TURNED = "turned"  # the named loss, of rows that the loop has changed by who is there besides


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one training is set up; the defaults are the plainest one."""

    policy: str = "worst_case"
    mode: str = "hooks"
    clipping: str = "flat"
    entry: str = "make_private"
    collate: str = "default"
    loss: str = "plain"
    manager: str = "none"
    batch: int = 2
    noise: float = 1.0
    caps: tuple[float, ...] | None = None
    budget: float | None = None
    reduction: str = "mean"
    early_hook: str = "none"
    accumulation: bool = False
    history: bool = False
    seed: int = 0

    @property
    def ghost(self) -> bool:
        return self.mode == "ghost"

    @property
    def rate(self) -> float:
        return 1.0 if self.policy == "participation" else self.batch / ROWS


class World:
    """An engine, what it made private, and plain things that the user keeps."""

    def __init__(self, setting: Setting, *, watch: Any, engine: Any = None) -> None:
        """Set everything up; `watch(optimizer)` is told of every step of the plain optimizer.

        Args:
            engine: That accounts for another training already; None: a new one.
        """
        self.setting = setting
        torch.manual_seed(setting.seed + (engine is not None))
        self.data = data()
        self.inner = Heads()
        self.plain = torch.optim.SGD(self.inner.parameters(), lr=0.1)
        self.plain.register_step_post_hook(lambda optimizer, *_: watch(optimizer))
        self.engine = self._new_engine() if engine is None else engine
        fixed = setting.policy == "participation"
        loader = DataLoader(
            self.data, batch_size=setting.batch, collate_fn=COLLATE[setting.collate], shuffle=fixed
        )
        self.named = self._named_loss()
        bound: Any = [1.0, 1.0] if setting.clipping == "per_layer" else 1.0
        arguments = {
            "module": self.inner, "optimizer": self.plain, "data_loader": loader,
            "noise_multiplier": setting.noise, "max_grad_norm": bound,
            "clipping": setting.clipping, "grad_sample_mode": setting.mode,
            "loss_reduction": setting.reduction, "poisson_sampling": not fixed,
        }  # fmt: skip
        ghost_loss = {"criterion": self._criterion()} if setting.ghost else {}
        if setting.entry == "make_private":
            made = self.engine.make_private(**{**ghost_loss, **arguments, **self.named})
        else:
            made = PrivacyEngine(accountant="rdp").make_private(**{**ghost_loss, **arguments})
            self._attach(made)
        self.module, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if setting.ghost else self._criterion()
        if setting.accumulation:
            self.module.allow_grad_accumulation()

    def _new_engine(self) -> PerInstancePrivacyEngine:
        setting = self.setting
        kind: dict[str, Any] = {} if setting.caps is None else {"caps": list(setting.caps)}
        if setting.budget is not None:
            kind["budget"] = np.full(len(ORDERS), setting.budget)
        if setting.policy == "refresh":
            kind["refresh_every"] = 2
        return PerInstancePrivacyEngine(
            accountant="rdp", norm_policy=setting.policy, orders=ORDERS, levels=LEVELS,
            history=setting.history, **kind,
        )  # fmt: skip

    def _attach(self, made: Any) -> None:
        setting, optimizer = self.setting, made[1]
        if setting.early_hook != "none":
            optimizer.attach_step_hook(EARLY_HOOKS[setting.early_hook])
        rows: dict[str, Any] = {"data_loader": made[-1]}
        if setting.entry == "attach without loader":
            rows = {"dataset": self.data, "sample_rate": setting.rate}
        self.engine.attach(module=made[0], optimizer=optimizer, **rows, **self.named)

    def _criterion(self) -> nn.Module:
        """What the loop trains with."""
        setting = self.setting
        if setting.loss in COUPLED and not setting.ghost:
            return WeightedMean()
        return Slope(setting.reduction, column=setting.loss == "column")

    def _named_loss(self) -> dict[str, Any]:
        loss = self.setting.loss
        if loss in ("unnamed", "weighted unnamed"):
            return {"criterion": self._criterion()} if self.setting.ghost else {}
        if loss == "loss_of":
            return {"loss_of": plain_rows}
        if loss == "weighted named" and not self.setting.ghost:
            return {"criterion": WeightedMean()}
        return {"criterion": Slope(self.setting.reduction, column=loss == "column")}

    def loading(self) -> Any:
        """The loader of a new pass, in a memory manager of its own if there is one."""
        manager = MANAGERS[self.setting.manager]
        if manager is None:
            return self.loader
        return manager(
            data_loader=self.loader, max_physical_batch_size=PHYSICAL, optimizer=self.optimizer
        ).__enter__()


def _louder(optimizer: Any) -> None:
    """An earlier step hook that turns the noise up for the steps to come, once."""
    if not getattr(optimizer, "louder", False):
        optimizer.louder = True
        optimizer.noise_multiplier *= 10.0


def _swinging(optimizer: Any) -> None:
    """An earlier step hook that shows more noise than was added, until the user looks again."""
    optimizer.noise_multiplier *= 3.0


EARLY_HOOKS = {"louder": _louder, "swinging": _swinging}
