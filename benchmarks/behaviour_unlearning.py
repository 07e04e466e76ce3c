"""Unlearning at fixed seeds: plans, runs, a queue that is served, and what certificates say.

Public API only. Every story trains its own small model, because a run changes the ledgers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from behaviour_parts import (
    DELTA,
    digest,
    ledger,
    plain,
    refusal,
    reseed,
    sheet,
    weights,
    without,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.certificates import (
    ContractionCertificate,
    NoisyFineTuningCertificate,
    read_certificate,
    read_key,
    verify_certificate,
    write_certificate,
)

SIZE, DELTA_SET, KILLED_AT = 48, 1e-2, 5
ORDERS = [1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0]
NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, 3.0)
# Not the same at each making: the key of hashed ids, the time, and the versions that made it.
UNREPEATABLE = ("checksum", "created", "forgotten", "key_sha256", "software")


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


class Trained:
    """A trained model with what unlearning needs."""

    def __init__(
        self, module: nn.Module, loss: nn.Module, features: int, *, lr: float, batch: int,
        steps: int, decay: float = 0.0, momentum: float = 0.0, **engine: Any,
    ) -> None:  # fmt: skip
        x = torch.randn(SIZE, features)
        x = x / x.norm(dim=1, keepdim=True)
        one_output = isinstance(loss, nn.BCEWithLogitsLoss)
        y = (x[:, :1] > 0).float() if one_output else (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        self.dataset, self.loss = TensorDataset(x, y), loss
        self.engine = PerInstancePrivacyEngine(
            accountant="rdp", **{"orders": ORDERS, "levels": 64, **engine}
        )
        optimizer = torch.optim.SGD(
            module.parameters(), lr=lr, weight_decay=decay, momentum=momentum
        )
        self.module, self.optimizer, loader = self.engine.make_private(
            module=module, optimizer=optimizer, noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(self.dataset, batch_size=batch), criterion=loss,
        )  # fmt: skip
        while self.engine.per_instance.steps < steps:
            for inputs, targets in loader:
                self.optimizer.zero_grad()
                loss(self.module(inputs), targets).backward()
                self.optimizer.step()

    def unlearning(self, **changes: Any) -> UnlearningEngine:
        arguments = {
            "optimizer": self.optimizer, "dataset": self.dataset, "criterion": self.loss,
            "privacy_engine": self.engine, "progress": False,
            "feature_norm": 1.0 if isinstance(self.loss, nn.BCEWithLogitsLoss) else None,
        }  # fmt: skip
        return UnlearningEngine(self.module, **(arguments | changes))


def network_module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def network(**options: Any) -> Trained:
    settings = {"lr": 0.5, "batch": 12, "steps": 12, **options}
    return Trained(network_module(), nn.CrossEntropyLoss(), 4, **settings)


def logistic(*, batch: int = SIZE, bias: bool = False, **options: Any) -> Trained:
    """One linear output, as contraction needs it: full batches or Poisson mini-batches."""
    full = batch == SIZE
    settings: dict[str, Any] = {
        "lr": 7.0 if full else 1.0, "decay": 5e-3 if full else 0.1, "steps": 60 if full else 20,
        "norm_policy": "capped", "caps": np.linspace(0.05, 1.0, SIZE), **options,
    }  # fmt: skip
    if settings["norm_policy"] != "capped":
        del settings["caps"]
    module = nn.Linear(5, 1, bias=bias)
    nn.init.zeros_(module.weight)
    return Trained(module, nn.BCEWithLogitsLoss(), 5, batch=batch, **settings)


def retrained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = network_module()
    return module, torch.optim.SGD(module.parameters(), lr=0.5)


# --- plans and runs -------------------------------------------------------------------------------


def described(plan: Any) -> dict[str, Any]:
    """Return a plan's text and fields; its digest is bound to names inside the package."""
    fields = (
        "status", "method", "steps", "steps_retrain", "steps_worst_case", "batch_size", "cost",
        "epsilon", "target_epsilon", "delta", "strength", "interval", "measured", "fixed_length",
        "requests_served",
    )  # fmt: skip
    found = {name: plain(getattr(plan, name)) for name in fields if hasattr(plan, name)}
    certificate = getattr(plan, "certificate", None)
    return {
        "type": type(plan).__name__, "text": str(plan).splitlines(), **found,
        "certificate": None if certificate is None else type(certificate).__name__,
        "two_sided": getattr(certificate, "two_sided", None),
    }  # fmt: skip


def run(trained: Trained, forget: list[int], *, goal: dict[str, Any], **changes: Any) -> Any:
    """Plan, run, and run the same once more with a kill in the middle."""
    with sheet(6) as found:
        engine = trained.unlearning(**changes)
        plan = engine.plan(forget, **goal)
        found["plan"] = described(plan)
        result = engine.unlearn(
            plan, seed=5, on_step=lambda step, module: {"step": step, "weights": weights(module)},
            record_every=3,
        )  # fmt: skip
        found["result"] = {
            "type": type(result).__name__, "steps": result.steps, "epsilon": plain(result.epsilon),
            "weights": weights(result.module), "history": plain(list(result.history)),
        }  # fmt: skip
        if result.certificate is not None:
            found["record"] = page(result.record(plain_ids=True))
        found["forgotten"] = sorted(engine.forgotten)
        found["ledger"] = ledger(trained.engine.per_instance)
        found["worst case"] = float(trained.engine.get_epsilon(DELTA)).hex()
        found["plan is old"] = refusal(lambda: engine.unlearn(plan))
        found["forgotten before"] = refusal(lambda: engine.plan(forget, steps=1))
    return found


def interrupted(
    trained: Trained, forget: list[int], *, goal: dict[str, Any], **changes: Any
) -> Any:
    """The same run, killed at a step and gone on with: only what its end looks like."""

    def die(step: int, module: nn.Module) -> None:
        if step == KILLED_AT:
            raise Killed

    with sheet(6) as found, tempfile.TemporaryDirectory() as folder:
        engine = trained.unlearning(**changes)
        plan = engine.plan(forget, **goal)
        files = {"checkpoint_dir": folder, "checkpoint_every": 2}
        if plan.steps <= KILLED_AT:
            return {"too short": plan.steps}
        found["killed"] = refusal(lambda: engine.unlearn(plan, seed=5, on_step=die, **files))
        found["left"] = sorted(path.name for path in Path(folder).iterdir())
        result = engine.unlearn(plan, seed=77, **files)
        found["weights"], found["steps"] = weights(result.module), result.steps
        found["epsilon"] = digest(trained.engine.get_per_instance_epsilon(DELTA).epsilon)
        found["left at last"] = sorted(path.name for path in Path(folder).iterdir())
    return found


def page(record: Any) -> dict[str, Any]:
    """Return a certificate's content, without what no two makings share."""
    content = without(record.content(), *UNREPEATABLE)
    content["verification"] = str(verify_certificate(record)).splitlines()[1:]  # not the checksum
    return content | {"fields": sorted(record.content())}


def runs() -> Iterator[tuple[str, Any]]:
    goal = {"epsilon": 1.5, "delta": DELTA_SET, "method": "langevin", "max_steps": 5000}
    noisy = {"method": "noisy_finetuning", "certificate": NOISY, "delta": DELTA_SET}
    cases: dict[str, tuple[Callable[[], Trained], list[int], dict[str, Any], dict[str, Any]]] = {
        "langevin, full batches": (logistic, [0, 5], goal, {}),
        "langevin, bias": (lambda: logistic(bias=True, lr=3.0), [0, 5], goal, {}),
        "langevin, worst case": (
            lambda: logistic(norm_policy="worst_case"), [3], {**goal, "step_grid": 1}, {}
        ),
        "langevin, mini-batches": (
            lambda: logistic(batch=12), [3],
            {"steps": 8, "delta": DELTA_SET, "method": "langevin"}, {},
        ),
        "langevin, steps alone": (logistic, [1, 2], {"steps": 6, "method": "langevin"}, {}),
        "langevin, predicted": (
            lambda: logistic(norm_policy="last_seen"), [2], {**goal, "predict": True}, {}
        ),
        "langevin, adaptive": (
            logistic, [3], {**goal, "epsilon": 60.0, "adaptive": True}, {}
        ),
        "dp_sgd, one of worst case": (
            lambda: network(norm_policy="worst_case"), [4],
            {"epsilon": 30.0, "delta": DELTA_SET}, {},
        ),
        "dp_sgd, a set with history": (
            lambda: network(norm_policy="worst_case", history=True), [4, 7],
            {"steps": 7, "delta": DELTA_SET}, {},
        ),
        "dp_sgd, one with a budget": (
            lambda: logistic(budget=(20.0, DELTA_SET)), [4],
            {"epsilon": 21.0, "delta": DELTA_SET}, {},
        ),
        "dp_sgd, last_seen, steps alone": (network, [4, 7], {"steps": 7}, {}),
        "dp_sgd, full, steps alone": (
            lambda: network(norm_policy="full", momentum=0.9), [4, 7], {"steps": 7}, {}
        ),
        "dp_sgd, certificate of the caller": (
            lambda: network(norm_policy="worst_case"), [4, 7],
            {
                "epsilon": 0.1, "delta": DELTA_SET, "max_steps": 100, "step_grid": 1,
                "certificate": ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 10),
            }, {},
        ),
        "noisy_finetuning, steps": (network, [1, 2], {**noisy, "steps": 7}, {}),
        "noisy_finetuning, target": (
            network, [1], {**noisy, "epsilon": 1.0, "max_steps": 2000}, {}
        ),
        "noisy_finetuning, no ledger": (
            network, [1], {**noisy, "steps": 6},
            {"privacy_engine": None, "training_steps": 12, "batch_size": 12},
        ),
        "finetuning": (network, [1, 2], {"steps": 7, "method": "finetuning"}, {}),
        "finetuning, no ledger": (
            network, [1, 2], {"steps": 7, "method": "finetuning"},
            {"privacy_engine": None, "training_steps": 12, "batch_size": 12},
        ),
        "l1_sparse": (network, [1, 2], {"steps": 7, "method": "l1_sparse", "strength": 0.01}, {}),
        "gradient_difference": (
            network, [1, 2], {"steps": 7, "method": "gradient_difference"}, {}
        ),
        "retraining": (network, [1, 2], {"method": "retraining"}, {"make_model": retrained}),
    }  # fmt: skip
    for name, (make, forget, wish, changes) in cases.items():
        for form, story in (("whole", run), ("interrupted", interrupted)):
            with sheet(2) as found:
                found |= story(make(), forget, goal=wish, **changes)
            yield f"{name}, {form}", found


def plans() -> Iterator[tuple[str, Any]]:
    """Give plans that are refused or say "retrain instead", and requests one after the other."""
    target = {"epsilon": 1.0, "delta": DELTA_SET}
    full, small, net = logistic, lambda: logistic(batch=12), network
    cases: dict[str, tuple[Callable[[], Trained], list[int], dict[str, Any]]] = {
        "out of reach": (full, [47], {"epsilon": 1e-4, "delta": 1e-9, "method": "langevin"}),
        "mini-batches, target": (small, [3], {**target, "method": "langevin", "epsilon": 3.0}),
        "a set of an estimate": (net, [1, 2], target),
        "langevin of a network": (net, [1], {**target, "method": "langevin"}),
        "finetuning with a target": (net, [1], {**target, "method": "finetuning"}),
        "noisy_finetuning alone": (net, [1], {**target, "method": "noisy_finetuning"}),
        "neither target nor steps": (net, [1], {}),
        "both": (net, [1], {**target, "steps": 3}),
        "no rows": (net, [], {"steps": 3}),
        "all rows": (net, list(range(SIZE)), {"steps": 3}),
        "repeated": (net, [1, 1], {"steps": 3}),
        "out of range": (net, [SIZE], {"steps": 3}),
        "unknown method": (net, [1], {"steps": 3, "method": "x"}),
        "strength": (net, [1], {"steps": 3, "strength": 0.1}),
        "retraining": (net, [1], {"method": "retraining"}),
    }  # fmt: skip
    for name, (make, forget, wish) in cases.items():
        with sheet(3) as found:
            found |= described(make().unlearning().plan(forget, **wish))
        yield name, found
    with sheet(3) as found:
        trained = logistic()
        engine = trained.unlearning()
        for number, forget in enumerate(([0], [1, 2], [47])):
            plan = engine.plan(forget, **{**target, "method": "langevin", "max_steps": 5000})
            engine.unlearn(plan, seed=number)
            found[f"request {number}"] = described(plan)
        found["weights"] = weights(engine.module)
        found["ledger"] = ledger(trained.engine.per_instance)
        state = engine.state_dict()
        found["state"] = sorted(state)
        reseed(3)  # the same data: another engine is another process
        again = logistic().unlearning()
        again.load_state_dict(state)
        found["loaded"] = described(again.plan([9], steps=2, method="langevin"))
    yield "one after the other", found


# --- the queue ------------------------------------------------------------------------------------


def served(goal: dict[str, Any], *, make: Callable[[], Trained], **serving: Any) -> dict[str, Any]:
    """Submit to a folder, serve it, and look at everything that can be read afterwards."""
    with tempfile.TemporaryDirectory() as place, sheet(8) as found:
        folder = Path(place) / "requests"
        trained = make()
        engine = trained.unlearning(requests=folder)
        for name, rows in {"ada": [3], "bob": [3, 7], "cyd": [44, 45, 46, 47], "dan": [3]}.items():
            engine.submit(rows, request_id=name)
        found["again"] = refusal(lambda: engine.submit([4], request_id="ada"))
        found["queued"] = [request.state for request in engine.requests.requests()]
        engine.serve(seed=4, **goal, **serving)
        found["requests"] = {
            request.request_id: {
                "state": request.state, "rows": list(request.rows), "result": plain(request.result)
            }
            for request in engine.requests.requests()
        }  # fmt: skip
        found["events"] = [[e.request_id, e.state] for e in engine.requests.events()]
        found["files"] = sorted(
            path.name for path in folder.iterdir() if not path.name.startswith("requests.db-")
        )
        found["weights"], found["forgotten"] = weights(engine.module), sorted(engine.forgotten)
        found["ledger"] = ledger(trained.engine.per_instance)
        for path in sorted(folder.glob("certificate-*.json")):
            record, key = read_certificate(path), read_key(f"{path}.key")
            found[path.name] = page(record)
            ids = [*found["requests"]["ada"]["rows"]]
            report = verify_certificate(record, key=key, ids=ids)
            found[path.name]["with ids"] = str(report).splitlines()[1:]
        reseed(8)  # the same data
        blank = make().unlearning(requests=folder)
        found["next process"] = [weights(blank.module), sorted(blank.forgotten)]
    return found


def queues() -> Iterator[tuple[str, Any]]:
    langevin = {
        "epsilon": 1.2, "delta": DELTA_SET, "method": "langevin", "max_steps": 150, "step_grid": 1
    }  # fmt: skip
    noisy = {"steps": 5, "delta": DELTA_SET, "method": "noisy_finetuning", "certificate": NOISY}
    cases: dict[str, tuple[dict[str, Any], Callable[[], Trained], dict[str, Any]]] = {
        "langevin, one by one": (langevin, logistic, {"max_batch": 1}),
        "langevin, together": (langevin, logistic, {}),
        "dp_sgd, steps alone": ({"steps": 4}, network, {"max_batch": 2}),
        "noisy_finetuning": (noisy, network, {}),
        "nobody has a plan": ({"epsilon": 1e-3, "delta": 1e-9}, network, {}),
    }
    for name, (goal, make, serving) in cases.items():
        yield name, served(goal, make=make, **serving)


def certificate_files() -> dict[str, Any]:
    """Write a page, read it, and change what it says."""
    with tempfile.TemporaryDirectory() as place, sheet(9) as found:
        trained = logistic()
        engine = trained.unlearning()
        plan = engine.plan([0, 5], steps=20, delta=DELTA_SET, method="langevin")
        result = engine.unlearn(plan, seed=1)
        path = Path(place) / "certificate.json"
        record = result.record()
        write_certificate(record, path=path)
        found["files"] = sorted(p.name for p in Path(place).iterdir())
        found["twice"] = refusal(lambda: write_certificate(record, path=path))
        found["page"] = page(read_certificate(path))
        text = path.read_text(encoding="utf-8")
        edits = {
            "smaller epsilon": ('"epsilon": ', '"epsilon": 0'), "cut": (text[300:], ""),
            "version": ('"version": 1', '"version": 99'), "unknown field": ('"delta"', '"delt"'),
        }  # fmt: skip
        for name, (old, new) in edits.items():
            path.write_text(text.replace(old, new, 1), encoding="utf-8")
            found[name] = refusal(lambda: read_certificate(path))
            if "returned" in found[name]:
                report = verify_certificate(read_certificate(path))
                found[name] = [c.name for c in report.checks if c.passed is False]
    return found


def record() -> dict[str, Any]:
    return {
        "runs": dict(runs()), "plans": dict(plans()), "queues": dict(queues()),
        "certificate files": certificate_files(),
    }  # fmt: skip
