"""Shards: which rows of the data set a process draws from when several train together.

Opacus shuffles and deals the rows to the processes; each draws batches from its own. Knows no
model, optimizer or accountant, and asks no other process anything.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler

from .._validate import IntArray
from .passes import Pass, Resumable

if TYPE_CHECKING:
    from .tracker import BatchTracker


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows of the data set that one process draws from.

    Attributes:
        rows: Ascending rows; position k of the shard is row rows[k] of the data set.
        rank: Number of the process.
        world_size: Number of processes.
        num_instances: Size of the data set.
    """

    rows: IntArray
    rank: int
    world_size: int
    num_instances: int

    @classmethod
    def of_process(cls, num_instances: int) -> Shard:
        """Return the shard that Opacus deals to this process at the start of a training."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rows = dealt_rows(num_instances, rank=rank, world_size=world)
        return cls(np.sort(rows.numpy()), rank, world, num_instances)

    def positions(self, rows: npt.ArrayLike) -> IntArray:
        """Return the positions of `rows` of the data set within the shard.

        Raises:
            ValueError: A row of another process.

        >>> Shard(np.array([1, 4, 7]), rank=0, world_size=2, num_instances=8).positions([7, 1])
        array([2, 0])
        """
        wanted = np.asarray(rows, dtype=np.int64)
        found = np.minimum(np.searchsorted(self.rows, wanted), len(self.rows) - 1)
        foreign = np.flatnonzero(self.rows[found] != wanted)
        if len(foreign):
            raise ValueError(
                f"Expected rows of rank {self.rank}'s shard, got {len(foreign)} of {len(wanted)} "
                f"of other ranks (first: row {int(wanted[foreign[0]])}). Each process draws from "
                "its own rows: engine.per_instance.instance_ids."
            )
        return found


def dealt_rows(
    num_instances: int, *, rank: int, world_size: int, seed: int = 0, shuffle: bool = True
) -> torch.Tensor:
    """Return the rows that Opacus deals to one process in epoch 0, in its order."""
    rows = torch.arange(num_instances)
    if shuffle:
        rows = torch.randperm(num_instances, generator=torch.Generator().manual_seed(seed))
    return rows[rank::world_size]


class RecordingShardSampler(Resumable, DistributedUniformWithReplacementSampler):
    """Opacus's Poisson sampler of one process among several, remembering what it emitted.

    Guarantee: one independent coin of probability `sample_rate` per row of the shard and batch, by
        Opacus's own draws. Two things differ from Opacus's sampler. The shard is that of epoch 0
        for good: there `set_epoch` moves rows to other processes, here it changes nothing, so that
        each process keeps the account of its own rows. And an empty draw is an empty batch: there
        it is left out, so that processes would make different numbers of steps, wait for each
        other for ever, and make noisy steps that nobody counts.

    Args:
        sampler: Opacus's, not yet iterated.
        tracker: Told when a new iterator begins.
    """

    def __init__(
        self, sampler: DistributedUniformWithReplacementSampler, *, tracker: BatchTracker
    ) -> None:
        self.__dict__.update(vars(sampler))
        self.dealt = dealt_rows(
            sampler.total_size, rank=sampler.rank, world_size=sampler.num_replicas,
            seed=sampler.shuffle_seed, shuffle=sampler.shuffle,
        )  # fmt: skip
        self.population = self.dealt.numpy()
        self.emitted: deque[list[int]] = deque()
        self._tracker = tracker

    @property
    def shard(self) -> Shard:
        """The rows drawn from."""
        rows = np.sort(self.population)
        return Shard(rows, self.rank, self.num_replicas, self.total_size)

    def __iter__(self) -> Pass:
        """Start a pass with its own queue of emitted batches."""
        # Not a generator: the queue must exist before a DataLoader with workers primes itself.
        running = self.begin(self._draw, redrawn=True)
        self._tracker.begin(running)
        self.emitted = running.emitted
        return running

    def _draw(self, count: int) -> Iterator[list[int]]:
        for _ in itertools.repeat(None, count):
            self._tracker.draws(self.generator, self.sample_rate)
            coins = torch.rand(self.num_samples, generator=self.generator) < self.sample_rate
            rows: list[Any] = self.dealt[coins].tolist()
            yield rows
