"""What the killed processes run: they rebuild an engine without training, and go on.

A process may be told to kill itself at its n-th lasting operation: before or after a file is
synced, renamed or deleted, or a transaction is committed. These are all the points that a kill can
tell apart from outside; kills at random times do the rest.
"""

import contextlib
import os
import signal
import warnings

import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.unlearning.requests import database as request_database

STEPS, EVERY, SEED, SIZE = 12, 4, 11, 48


def private_run(dataset):
    """A small network, made private but not trained, with a coarse ledger that loads fast."""
    torch.manual_seed(99)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    private = PerInstancePrivacyEngine(norm_policy="last_seen", orders=[2.0, 8.0, 32.0], levels=32)
    made = private.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=DataLoader(dataset, batch_size=12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        criterion=criterion,
    )
    return private, criterion, made


def engine_of(dataset, private, criterion, made, **changes):
    return UnlearningEngine(
        made[0], optimizer=made[1], dataset=dataset, criterion=criterion,
        privacy_engine=private, progress=False, **changes,
    )  # fmt: skip


def trained_engine(dataset, **changes):
    private, criterion, made = private_run(dataset)
    module, optimizer, loader = made
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
    return engine_of(dataset, private, criterion, made, **changes)


def blank_engine(dataset, **changes):
    """What a new process has: architecture, settings and data, but nothing that was trained."""
    private, criterion, (module, *others) = private_run(dataset)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return engine_of(dataset, private, criterion, (module, *others), **changes)


def serve(folder, dataset, die_at=None, max_batch=2):
    """Serve all requests in `folder`; kill this process at lasting operation `die_at`."""
    _prepare(die_at)
    engine = blank_engine(dataset, requests=folder)
    torch.seed()  # what the process did before must not matter
    engine.serve(steps=STEPS, max_batch=max_batch, checkpoint_every=EVERY, seed=SEED)


def unlearn(folder, dataset, state, die_at=None):
    """Unlearn with a checkpoint and write what came out."""
    _prepare(die_at)
    engine = blank_engine(dataset)
    engine.load_state_dict(state)
    torch.manual_seed(5)  # dropout
    plan = engine.plan([3, 7], steps=STEPS)
    engine.unlearn(plan, checkpoint_dir=folder, checkpoint_every=EVERY, seed=SEED)
    torch.save(engine.state_dict(), folder.parent / "result.pt")


def _prepare(die_at):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if die_at is not None:
        _die_at_operation(die_at)


def _die_at_operation(number):
    """Kill this process before (odd) or after (even) operation `number // 2`, counted from 0."""
    left = number // 2

    def die_if(due):
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def operation():
        nonlocal left
        mine, left = left == 0, left - 1
        die_if(mine and number % 2)
        yield
        die_if(mine)

    def watched(function):
        def call(*arguments, **options):
            with operation():
                return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    database = request_database.RequestDatabase
    writing = database.writing

    @contextlib.contextmanager
    def committed(self):
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(writing(self))
            yield connection
            with operation():
                stack.pop_all().close()  # commits

    database.writing = committed
