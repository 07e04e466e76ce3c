"""Trainings at fixed seeds: every norm policy, mode and clipping, and ways to interrupt them.

Public API only. `record()` gives a dictionary of JSON values; the loop is the one of the README.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from behaviour_parts import DELTA, beside, digest, losses, plain, reseed, sheet, weights
from opacus import PrivacyEngine
from opacus.schedulers import LambdaGradClip, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine

SIZE, BATCH, EPOCHS, CLASSES, PHYSICAL = 40, 8, 3, 4, 5
STEPS, MIDDLE = EPOCHS * SIZE // BATCH, 7  # of 15: in the middle of the second pass
BOUND = 2.0  # between the smallest and the largest gradient norm
ORDERS = [1.5, 2.0, 4.0, 8.0, 16.0, 64.0]

CAPS = np.linspace(0.1, 1.0, SIZE)
POLICIES: dict[str, dict[str, Any]] = {
    "worst_case": {"norm_policy": "worst_case"},
    "last_seen": {"norm_policy": "last_seen"},
    "refresh": {"norm_policy": "refresh", "refresh_every": 4},
    "full": {"norm_policy": "full"},
    "capped": {"norm_policy": "capped", "caps": CAPS},
    "capped+budget": {"norm_policy": "capped", "caps": CAPS, "budget": (6.0, DELTA)},
    "participation": {"norm_policy": "participation"},
}
MODES = ("hooks", "functorch", "ew", "ghost")
CLIPPINGS: dict[str, dict[str, Any]] = {
    "flat": {},
    "per_layer": {"clipping": "per_layer", "max_grad_norm": [1.0, 0.5, 1.5, 0.8]},
    "adaptive": {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.3,
        "max_clipbound": 20.0, "min_clipbound": 0.1, "unclipped_num_std": 5.0,
    },
}  # fmt: skip
MANAGERS = {"opacus_pil": BatchMemoryManager, "opacus": OpacusManager}


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(SIZE, 1, 6, 6, generator=generator)
    return TensorDataset(pixels, torch.randint(0, CLASSES, (SIZE,), generator=generator))


def sentences() -> TensorDataset:
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(0, 7, (SIZE, 5), generator=generator)
    return TensorDataset(words, torch.randint(0, CLASSES, (SIZE,), generator=generator))


def convolutional(dropout: float = 0.0) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, CLASSES))


class Words(nn.Module):
    """Embedding, a layer that is used at every word, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(words))).mean(dim=1))


class Training:
    """A private training that can be stopped, saved and gone on with.

    Args:
        policy: Key of POLICIES, or the engine's arguments.
        attach: Let Opacus make it private and attach our engine.
        manager: Key of MANAGERS; None: whole batches.
        schedules: Some of "noise", "clip".
        own: Give generators for rows and noise.
        options: Of make_private.
    """

    def __init__(
        self, policy: str | dict[str, Any] = "last_seen", *, attach: bool = False,
        manager: str | None = None, schedules: tuple[str, ...] = (), workers: int = 0,
        own: bool = False, model: Callable[[], nn.Module] = convolutional, data: Any = None,
        batch: int = BATCH, engine: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        given = POLICIES[policy] if isinstance(policy, str) else policy
        settings = {"accountant": "rdp", "orders": ORDERS, "levels": 512, **given, **(engine or {})}
        self.engine = PerInstancePrivacyEngine(**settings)
        self.data = images() if data is None else data
        self.module = model()
        if policy == "participation":
            options = {"poisson_sampling": False, **options}
        noise, rows = (torch.Generator().manual_seed(n) if own else None for n in (31, 32))
        arguments = {
            "module": self.module,
            "optimizer": torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9),
            "data_loader": DataLoader(
                self.data, batch_size=batch, shuffle=True, num_workers=workers, generator=rows
            ),
            "noise_multiplier": 1.0, "max_grad_norm": BOUND, "noise_generator": noise,
            "criterion": nn.CrossEntropyLoss(),
        }  # fmt: skip
        maker = PrivacyEngine(accountant="rdp") if attach else self.engine
        made = maker.make_private(**(arguments | options))
        self.wrapped, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.loss = made[2] if len(made) == 4 else options.get("criterion", nn.CrossEntropyLoss())
        if attach:
            self.engine.attach(
                module=self.wrapped, optimizer=self.optimizer, data_loader=self.loader,
                criterion=nn.CrossEntropyLoss(),
            )  # fmt: skip
        self.schedules: dict[str, Any] = {}
        if "noise" in schedules:
            self.schedules["noise_scheduler"] = StepNoise(self.optimizer, step_size=4, gamma=0.9)
        if "clip" in schedules:
            self.schedules["grad_clip_scheduler"] = LambdaGradClip(
                self.optimizer, scheduler_function=lambda step: 1.1 if step % 5 == 0 else 1.0
            )
        self.manager, self.epoch, self.steps = manager, 0, 0
        self.rest: dict[str, Any] = {}  # other entries of a loaded checkpoint

    def loading(self) -> contextlib.AbstractContextManager[Any]:
        if self.manager is None:
            return contextlib.nullcontext(self.loader)
        return MANAGERS[self.manager](
            data_loader=self.loader, max_physical_batch_size=PHYSICAL, optimizer=self.optimizer
        )

    def step(self, inputs: Any, targets: Any) -> bool:
        """Step on one batch; say whether it was a noisy step or part of one."""
        before = self.engine.per_instance.steps
        self.optimizer.zero_grad()
        self.loss(self.wrapped(inputs), targets).backward()
        self.optimizer.step()
        return bool(self.engine.per_instance.steps > before)

    def run(
        self, *, until: int | None = None, after: Callable[[Training], Any] | None = None
    ) -> Training:
        """Train to the end, or to a step; call `after` at each step."""
        with self.loading() as loader:
            while self.epoch < EPOCHS:
                for inputs, targets in loader:
                    if not self.step(inputs, targets):
                        continue
                    for schedule in self.schedules.values():
                        schedule.step()
                    self.steps += 1
                    if after is not None:
                        after(self)
                    if self.steps == until:
                        return self
                self.epoch += 1
        return self

    def saved(self) -> bytes:
        file = io.BytesIO()
        self.engine.save_checkpoint(
            path=file, module=self.wrapped, optimizer=self.optimizer, **self.schedules,
            checkpoint_dict={"epoch": self.epoch, "steps": self.steps},
        )  # fmt: skip
        return file.getvalue()

    def load(self, data: bytes) -> Training:
        self.rest = self.engine.load_checkpoint(
            path=io.BytesIO(data), module=self.wrapped, optimizer=self.optimizer, **self.schedules
        )
        self.epoch, self.steps = self.rest["epoch"], self.rest["steps"]
        return self

    def outcome(self) -> dict[str, Any]:
        return {
            "weights": weights(self.module), "taken": self.steps, **losses(self.engine),
            "noise": float(self.optimizer.noise_multiplier).hex(),
            "clip": plain(self.optimizer.max_grad_norm),
        }  # fmt: skip


def trained(seed: int = 1, **options: Any) -> dict[str, Any]:
    """Record one training from beginning to end."""
    with sheet(seed) as found:
        found |= Training(**options).run().outcome()
    return found


def resumed(seed: int = 1, *, middle: int = MIDDLE, **options: Any) -> dict[str, Any]:
    """Record one that is saved in the middle and goes on in new objects, from another seed."""
    with sheet(seed) as found:
        files: list[bytes] = []  # saved inside the loop: a pass that was left is not gone on with
        Training(**options).run(
            until=middle, after=lambda it: it.steps == middle and files.append(it.saved())
        )
        reseed(seed + 97)
        found |= Training(**options).load(files[-1]).run().outcome()
    return found


def grid() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every combination of policy, mode and clipping, in five variants.

    The first is whole, the others hold only what differs from it.
    """
    variants: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
        "saved and resumed": (resumed, {}),
        "opacus_pil.BatchMemoryManager": (trained, {"manager": "opacus_pil"}),
        "opacus.BatchMemoryManager": (trained, {"manager": "opacus"}),
        "attached": (trained, {"attach": True}),
    }
    for policy in POLICIES:
        for mode in MODES:
            for clipping, options in CLIPPINGS.items():
                case = {"policy": policy, "grad_sample_mode": mode, **options}
                plainly = trained(**case)
                found = {"plain": plainly}
                for name, (run, changes) in variants.items():
                    found[name] = beside(run(**case, **changes), plainly)
                yield f"{policy}, {mode}, {clipping}", found


SCHEDULES = {"noise": ("noise",), "clip": ("clip",), "noise and clip": ("noise", "clip")}


def scheduled() -> Iterator[tuple[str, dict[str, Any]]]:
    for policy in POLICIES:
        for mode in ("hooks", "ghost"):
            for name, schedules in SCHEDULES.items():
                if name != "noise and clip" and policy not in ("last_seen", "capped+budget"):
                    continue
                case = {"policy": policy, "grad_sample_mode": mode, "schedules": schedules}
                whole = trained(**case)
                found = {"plain": whole, "saved and resumed": beside(resumed(**case), whole)}
                yield f"{policy}, {mode}, {name}", found
    for clipping in ("per_layer", "adaptive"):
        case = {"schedules": ("noise",), **CLIPPINGS[clipping]}
        whole = trained(**case)
        found = {"plain": whole, "saved and resumed": beside(resumed(**case), whole)}
        yield f"last_seen, hooks, {clipping}, noise", found


def uses() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give single trainings of every other kind, each with its resumed twin."""
    kinds: dict[str, dict[str, Any]] = {
        "workers": {"workers": 2},
        "workers, opacus_pil.BatchMemoryManager": {"workers": 2, "manager": "opacus_pil"},
        "opacus_pil.BatchMemoryManager": {"manager": "opacus_pil"},
        "opacus.BatchMemoryManager": {"manager": "opacus"},
        "generators": {"own": True},
        "generators, fixed batches": {"policy": "participation", "own": True},
        "history": {"engine": {"history": True}},
        "history, budget": {"policy": "capped+budget", "engine": {"history": True}},
        "budget as a curve": {
            "policy": {"norm_policy": "capped", "budget": np.linspace(1.0, 30.0, len(ORDERS))}
        },
        "budget per instance": {
            "policy": {"norm_policy": "capped", "budget": (np.linspace(3.0, 9.0, SIZE), DELTA)}
        },
        "policy by default": {"policy": {}},
        "policy by default, fixed batches": {"policy": {}, "poisson_sampling": False},
        "sum": {
            "criterion": nn.CrossEntropyLoss(reduction="sum"), "loss_reduction": "sum",
            "policy": "full",
        },
        "empty draws": {"batch": 2},
        "empty draws, a random instance instead": {"batch": 2, "rand_on_empty": True},
        "noise-free": {"noise_multiplier": 0.0},
        "embedding, hooks": {"model": Words, "data": sentences(), "policy": "full"},
        "embedding, ghost": {
            "model": Words, "data": sentences(), "policy": "full", "grad_sample_mode": "ghost"
        },
        "float64": {
            "model": lambda: convolutional().double(), "policy": "full",
            "data": TensorDataset(images().tensors[0].double(), images().tensors[1]),
        },
    }  # fmt: skip
    kinds |= {
        f"dropout, {policy}": {"policy": policy, "model": lambda: convolutional(0.3)}
        for policy in ("last_seen", "full", "participation", "worst_case")
    }
    kinds |= {f"accountant {n}": {"engine": {"accountant": n}} for n in ("gdp", "per_instance_rdp")}
    for name, case in kinds.items():
        whole = trained(**case)
        yield name, {"plain": whole, "saved and resumed": beside(resumed(**case), whole)}
    # Its ε takes a second; the ledgers are those of "rdp".
    yield "accountant prv", {"plain": trained(engine={"accountant": "prv"})}
    for mode in MODES:
        with sheet(1) as found:
            training = Training(grad_sample_mode=mode).run(until=3)
            found["norms"] = digest(training.wrapped.per_sample_gradient_norms.cpu().numpy())
            found["module"] = type(training.wrapped).__name__
            found["optimizer"] = type(training.optimizer).__name__
        yield f"per_sample_gradient_norms, {mode}", found


def record() -> dict[str, Any]:
    return {"grid": dict(grid()), "schedules": dict(scheduled()), "uses": dict(uses())}
