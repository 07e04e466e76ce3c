"""How the files in this folder were written: with the code of commit b6005b2, once.

They stand for files that users have, and are never written again: whatever later code does, it has
to read them. To see them made, check that commit out, lay this folder and `readings.py` beside its
tests, and run from its root

    python -m tests.written_by.b6005b2.make

into an empty folder (it refuses to overwrite). `expected.json` says what the objects that were
saved said themselves, before they were saved; nothing in it was read back from a file.

    checkpoint-POLICY-MODE.pt    training checkpoints after the last batch of a pass, with history;
                                 "middle": in the middle of one, with a noise schedule
    accountant.pt                torch.save(accountant.state_dict()): numpy arrays; a budget
    accountant-text-ids.pt       the same with tensors for arrays; string ids, one tombstone
    requests/                    a queue of deletion requests: "ada" served, "bob" still queued
    CLASS.json, CLASS.json.key   certificates of each class that unlearning gives
    ledger.parquet               to_parquet, with a column of labels
    run/unlearning.pt            a run killed at step 5, which goes on from step 4
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.certificates import NoisyFineTuningCertificate, write_certificate
from opacus_pil.unlearning import CertifiedResult
from tests.written_by.readings import (
    DELTA,
    MIDDLE,
    ORDERS,
    POLICIES,
    SIZE,
    STEPS,
    Logistic,
    Training,
    as_tensors,
    hexes,
    of_accountant,
    of_training,
    rows_of,
)

HERE = Path(__file__).parent
RUN_STEPS, KILLED_AT, SAVED_EVERY, RUN_SET = 8, 5, 2, [2, 9]
GOAL = {
    "epsilon": 0.25, "delta": 1e-2, "method": "langevin", "max_steps": 500, "step_grid": 1
}  # fmt: skip
NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.125, 0.25, 3.0)


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


def checkpoints() -> dict[str, Any]:
    cases = [(policy, mode, False) for policy in POLICIES for mode in ("hooks", "ghost")]
    cases += [(policy, "hooks", True) for policy in ("last_seen", "participation")]
    found = {}
    for policy, mode, middle in cases:
        if policy == "participation" and not middle:
            continue
        name = f"checkpoint-{policy}-{mode}{'-middle' if middle else ''}.pt"
        training = Training(policy, mode=mode, middle=middle)

        def save(it: Training, name: str = name, middle: bool = middle) -> None:
            if it.engine.per_instance.steps == (MIDDLE if middle else STEPS):
                it.save(HERE / name)
                found[name] = of_training(it)

        if not middle:
            training.run(after=save)
            found[name] |= {"policy": policy, "mode": mode, "middle": False, "left": []}
            continue
        drawn: list[list[int]] = []
        take = training.step

        def step(x: Any, y: Any, take: Any = take, drawn: Any = drawn) -> None:
            drawn.append(rows_of(x))
            take(x, y)

        training.step = step  # type: ignore[method-assign]
        training.run(after=save)
        left = drawn[MIDDLE : MIDDLE + 2]  # 4 batches in a pass
        found[name] |= {"policy": policy, "mode": mode, "middle": True, "left": left}
    return found


def accountants() -> dict[str, Any]:
    kernel = {"noise_multiplier": 1.0, "sample_rate": 0.25}
    budgeted = PerInstanceAccountant(
        8, orders=ORDERS, levels=16, budget=(3.0, DELTA), caps=np.arange(1, 9) / 8, history=True
    )
    for _ in range(12):
        budgeted.step(indices=[], sensitivities=[], guarantee="bound", **kernel)
    torch.save(budgeted.state_dict(), HERE / "accountant.pt")
    named = PerInstanceAccountant(
        8, orders=ORDERS, levels=16, history=True, instance_ids=[f"person {n}" for n in range(8)]
    )
    for rows in ([0, 1], [2, 7, 5], [1]):
        named.step(indices=rows, sensitivities=[0.25] * len(rows), **kernel)
    named.step(indices=None, sensitivities=None, **kernel)
    named.forget([2])
    named.step(indices=[4], sensitivities=[0.5], noise_multiplier=2.0, sample_rate=0.25)
    torch.save(as_tensors(named.state_dict()), HERE / "accountant-text-ids.pt")
    named.to_parquet(HERE / "ledger.parquet", delta=DELTA, columns={"label": list("aabbccdd")})
    table = named.to_dataframe(delta=DELTA)
    return {
        "accountant.pt": of_accountant(budgeted),
        "accountant-text-ids.pt": of_accountant(named),
        "ledger.parquet": {
            "columns": [*table.columns, "label"],
            "ids": table["instance_id"].tolist(), "label": named.guarantee,
            "epsilon": hexes(table["epsilon"]), "forgotten": table["forgotten"].tolist(),
        },
    }  # fmt: skip


def queue() -> dict[str, Any]:
    socket.gethostname = lambda: "writer"  # the log names the machine that serves
    trained = Logistic().train(STEPS)
    engine = trained.unlearning(requests=HERE / "requests")
    engine.submit([3], request_id="ada")
    engine.serve(seed=5, **GOAL)
    engine.submit([5, 7], request_id="bob")
    trained.module = engine.module  # type: ignore[assignment]
    return {
        **of_training(trained),
        "rows forgotten": sorted(engine.forgotten),
        "requests": [
            {"id": r.request_id, "rows": list(r.rows), "state": r.state, "result": r.result}
            for r in engine.requests.requests()
        ],
        "events": [[e.request_id, e.state] for e in engine.requests.events()],
    }  # fmt: skip


def certificates() -> dict[str, Any]:
    bound, estimate = Training("worst_case"), Training("last_seen")
    for training in (bound, estimate):
        training.run(after=lambda _: None)
    mini = {"steps": 6, "delta": 1e-2, "method": "langevin"}
    cases: dict[str, tuple[Any, list[int], dict[str, Any]]] = {
        "contraction": (Logistic().train(STEPS), [0, 5], GOAL),
        "poisson_contraction": (Logistic(batch=6).train(STEPS), [3, 5], mini),
        "best": (Logistic(batch=6).train(STEPS), [3], mini),
        "data_processing": (bound, [4], {"epsilon": 60.0, "delta": 1e-2}),
        "noisy_finetuning": (
            estimate, [1, 2],
            {"steps": 6, "delta": 1e-2, "method": "noisy_finetuning", "certificate": NOISY},
        ),
    }  # fmt: skip
    found = {}
    for name, (trained, forget, wish) in cases.items():
        engine = trained.unlearning()
        plan = engine.plan(forget, **wish)
        result = engine.unlearn(plan, seed=3)
        assert isinstance(result, CertifiedResult)
        ids = [f"person {n}" for n in range(SIZE)]
        record = result.record(instance_ids=ids, plain_ids=name == "best")
        write_certificate(record, path=HERE / f"{name}.json")
        found[f"{name}.json"] = {
            "class": type(result.certificate).__name__, "epsilon": hexes([result.epsilon]),
            "delta": hexes([record.delta]), "steps": result.steps, "method": plan.method,
            "ids": [ids[row] for row in forget], "model_after": result.model_after,
            "assumptions": list(result.certificate.assumptions), "direction": record.direction,
            "hashed": record.ids_hashed,
        }  # fmt: skip
    return found


def run() -> dict[str, Any]:
    """Kill a run that starts from a checkpoint: whoever goes on starts from there too."""
    training = Training("last_seen")
    training.load(HERE / "checkpoint-last_seen-hooks.pt")
    folder = HERE / "run"
    folder.mkdir()

    def watched(step: int, _: Any) -> dict[str, float]:
        if step == KILLED_AT:
            raise Killed
        return {"step": step, "half": step / 2}

    engine = training.unlearning()
    plan = engine.plan(RUN_SET, steps=RUN_STEPS)
    before = training.engine.get_per_instance_epsilon(DELTA).epsilon
    files = {"checkpoint_dir": folder, "checkpoint_every": SAVED_EVERY}
    with contextlib.suppress(Killed):
        engine.unlearn(plan, seed=9, on_step=watched, **files)
    done = KILLED_AT - KILLED_AT % SAVED_EVERY
    return {
        "done": done, "steps": RUN_STEPS, "forget": RUN_SET, "label": "estimate",
        "history": [{"step": n, "half": n / 2} for n in range(done + 1)],
        "epsilon of the forgotten": hexes(before[RUN_SET]), "ledger steps": STEPS + RUN_STEPS,
    }  # fmt: skip


def main() -> None:
    there = {path.name for path in HERE.iterdir()} - {"make.py", "__pycache__"}
    if there:
        raise SystemExit(f"Expected an empty folder, got {len(there)} files. Never overwrite them.")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # Opacus's notice about a first batch that is empty
    torch.manual_seed(0)
    found = {"checkpoints": checkpoints(), **accountants(), "requests": queue()}
    found |= {"certificates": certificates(), "run": run()}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (HERE / "expected.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
