"""What the ranks of a distributed training do in the tests, and the ranks themselves.

Two processes are started once and run one function after another: starting them costs more than
all their training. A rank that fails or hangs ends the test, not the test run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine
from opacus_pil.heads import OneVsRest
from tests.capture.models import CLASSES, convolutional, images

WORLD, SIZE, BATCH, BOUND, DELTA = 2, 61, 12, 8.5, 1e-2
# Few levels and orders: their tables are most of the work of so small a training.
SETTINGS = {"accountant": "rdp", "levels": 64, "orders": [2.0, 8.0, 32.0]}
PATIENCE = 60  # seconds after which a rank counts as hanging


class Ranks:
    """WORLD processes in one gloo process group."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, not once per rank
        self._pipes, self._processes = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, folder, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], /, **options: Any) -> list[Any]:
        """Call `function(**options)` on every rank; return the results in order of ranks."""
        for pipe in self._pipes:
            pipe.send((function, options))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"rank {rank} did not answer within {PATIENCE} s")
            result, failure = pipe.recv()
            if failure:
                raise AssertionError(f"rank {rank}: {failure}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _rank(rank: int, folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for expected in ("Secure RNG turned off", "Full backward hook is firing"):  # see pyproject.toml
        warnings.filterwarnings("ignore", expected)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip
    while True:
        function, options = pipe.recv()
        try:
            pipe.send((function(**options), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def one_vs_rest(*, dtype):
    return nn.Sequential(nn.Flatten(), OneVsRest(36, CLASSES).to(dtype))


# --- a training -----------------------------------------------------------------------------------


class Training:
    """One rank's part of a training in float64; plain Opacus's with engine=None."""

    def __init__(
        self, *, engine=(), size=SIZE, batch=BATCH, same_seed=False, per_rank=False, attach=False,
        world=WORLD, model=convolutional, **options,
    ):  # fmt: skip
        self.data = images(size, dtype=torch.float64)
        torch.manual_seed(1)
        module = model(dtype=torch.float64)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        if world > 1:
            torch.manual_seed(20 if same_seed else 20 + dist.get_rank())
            module = DifferentiallyPrivateDistributedDataParallel(module)
        self.module = module
        sampler = DistributedSampler(self.data) if per_rank else None
        settings = {**SETTINGS, **dict(engine or ())}
        own = engine is not None
        self.engine = (PerInstancePrivacyEngine if own and not attach else PrivacyEngine)(
            **(settings if own and not attach else {"accountant": "rdp"})
        )
        arguments = {
            "noise_multiplier": 1.0, "max_grad_norm": BOUND, "criterion": nn.CrossEntropyLoss(),
            "noise_generator": torch.Generator().manual_seed(3),
            "data_loader": DataLoader(self.data, batch_size=batch, sampler=sampler), **options,
        }  # fmt: skip
        made = self.engine.make_private(module=module, optimizer=self.optimizer, **arguments)
        self.wrapped, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.loss = made[2] if len(made) == 4 else arguments["criterion"]
        if attach:
            self.engine = PerInstancePrivacyEngine(**settings)
            self.engine.attach(module=made[0], optimizer=made[1], data_loader=made[-1])
        self.steps: list[list[int]] = []

    def rows_of(self, inputs):
        pixels = self.data.tensors[0]
        return [int((pixels == x).flatten(1).all(1).nonzero()[0, 0]) for x in inputs]

    def step(self, inputs, targets):
        self.optimizer.zero_grad()
        self.loss(self.wrapped(inputs), targets).backward()
        self.optimizer.step()

    def run(self, *, epochs=2, saved=None, physical=None, manager=BatchMemoryManager):
        """Train; `saved` is a step after which to save, and where, and then to stop."""
        # A draw in parts is recorded when its last part has made the step.
        drawn: list[int] = []
        for epoch in range(epochs):
            self.loader.batch_sampler.set_epoch(epoch)  # as loops written for Opacus may do
            loading = contextlib.nullcontext(self.loader)
            if physical:
                loading = manager(
                    data_loader=self.loader, max_physical_batch_size=physical,
                    optimizer=self.optimizer,
                )  # fmt: skip
            with loading as batches:
                for inputs, targets in batches:
                    self.step(inputs, targets)
                    drawn += self.rows_of(inputs)
                    if not self.optimizer._is_last_step_skipped:
                        self.steps.append(drawn)
                        drawn = []
                    if saved and len(self.steps) == saved[0]:
                        self.engine.save_checkpoint(
                            path=saved[1], module=self.wrapped, optimizer=self.optimizer
                        )
                        return self
        return self

    def outcome(self):
        found = {
            "steps": self.steps,
            "weights": torch.cat([p.detach().flatten() for p in self.module.parameters()]).numpy(),
            "epsilon": self.engine.get_epsilon(DELTA),
            "history": [tuple(map(float, run)) for run in self.engine.accountant.history],
        }
        if isinstance(self.engine, PerInstancePrivacyEngine):
            found["shard"] = self.engine.per_instance.instance_ids
            found["ledger"] = self.engine.per_instance.state_dict()
            found["kernel"] = self.engine._trainings.kernels[-1]
            found["all"] = self.engine.gather_per_instance().state_dict()
        return found


def training(*, epochs=2, physical=None, manager=BatchMemoryManager, **options):
    return Training(**options).run(epochs=epochs, physical=physical, manager=manager).outcome()


def warned(**options):
    """Make a training private; return what was said, and who was drawn."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = Training(**options)
    messages = [str(w.message) for w in said]
    draws = [list(rows) for rows in made.loader.batch_sampler]
    positions = [np.searchsorted(np.sort(made.loader.batch_sampler.population), d) for d in draws]
    dealt = made.loader.batch_sampler.population.tolist()
    return messages, [[dealt.index(r) for r in rows] for rows in draws], positions


def refused(*, kind, **options):
    """Return the message of the refusal; nothing may have been changed."""
    engine = PerInstancePrivacyEngine(**options.pop("engine", {}))
    module = convolutional()
    wrapped = DifferentiallyPrivateDistributedDataParallel(module)
    if kind == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(module)
    if "noise_by_rank" in options:
        options["noise_multiplier"] = options.pop("noise_by_rank")[dist.get_rank()]
    arguments = {
        "noise_multiplier": 1.0, "max_grad_norm": 1.0, "data_loader": DataLoader(images(), BATCH),
        **options,
    }  # fmt: skip
    try:
        engine.make_private(
            module=wrapped, optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.1), **arguments
        )
    except Exception as error:
        assert engine.dataset is None
        assert not hasattr(module, "autograd_grad_sample_hooks")
        return type(error).__name__, str(error)
    return "nothing", "was refused"


def gathering(*, extra_steps=(0, 0), dst=None, noise=(1.0, 1.0)):
    """Gather after some ranks were charged steps that the others were not."""
    made = Training()
    rank = dist.get_rank()
    engine = made.engine
    for _ in range(1 + extra_steps[rank]):
        engine.per_instance.step(
            indices=None, sensitivities=None, noise_multiplier=noise[rank], sample_rate=0.2
        )
    try:
        whole = engine.gather_per_instance(dst=dst)
    except Exception as error:
        return type(error).__name__, str(error)
    return None if whole is None else whole.num_instances, engine.per_instance.num_instances


def one_rank_unattributed():
    """On rank 1 one step matches no rows."""
    made = Training(engine={"orders": [2.0, 8.0]})
    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (inputs, targets) in enumerate(made.loader):
            if number == 1 and rank == 1:
                inputs, targets = made.data[[0, 1]]
            made.step(inputs, targets)
            made.steps.append(made.rows_of(inputs))
    return made.outcome()


def measured():
    """Rows and norms of a full pass on request, and explicit rows."""
    made = Training()
    found = made.engine.refresh_norms(criterion=nn.CrossEntropyLoss())
    shard = made.engine.per_instance.instance_ids
    rows = shard[[2, 0]]
    with made.engine.batch(indices=rows):
        made.step(*made.data[rows.tolist()])
    foreign = np.setdiff1d(np.arange(SIZE), shard)[:1]
    try:
        with made.engine.batch(indices=foreign):
            message = ""
    except ValueError as error:
        message = str(error)
    kernel = ""
    try:
        _ = made.engine.kernel
    except Exception as error:
        kernel = str(error)
    ledger = made.engine.per_instance
    return found, ledger.sensitivities, ledger.unattributed_steps, message, kernel


def killed_and_resumed(*, folder, stop, **options):
    """Train to the end; train, save at a step, and go on from the file as a new process would."""
    whole = Training(**options).run().outcome()
    path = Path(folder) / f"rank{dist.get_rank()}.pt"
    Training(**options).run(saved=(stop, path))
    resumed = Training(**options)
    torch.manual_seed(99)
    resumed.engine.load_checkpoint(path=path, module=resumed.wrapped, optimizer=resumed.optimizer)
    rest = resumed.run(epochs=2 - (stop - 1) // len(resumed.loader))  # the first is what is left
    dist.barrier()
    other = Path(folder) / f"rank{1 - dist.get_rank()}.pt"
    try:
        message = ""
        resumed.engine.load_checkpoint(
            path=other, module=resumed.wrapped, optimizer=resumed.optimizer
        )
    except Exception as error:
        message = str(error)
    dist.barrier()
    return whole, rest.outcome(), message
