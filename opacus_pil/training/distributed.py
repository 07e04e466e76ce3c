"""Several processes, one training: what they must agree on, and one ledger of all their shards.

Processes talk when a training is made private and when ledgers are gathered, never at a step.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..accounting import PerInstanceAccountant
from ..errors import LedgerError, UnsupportedError


def said_by_all(value: Any) -> list[Any]:
    """Return what every process passed, in order of ranks. Every process must call it."""
    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError(
            "Expected a running process group, got none. Call it before "
            "torch.distributed.destroy_process_group()."
        )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def disagreement(claims: Mapping[str, Any]) -> str | None:
    """Return what not every process claims alike, as a sentence; None: nothing.

    Every process must call it, and gets the same answer.
    """
    everywhere = said_by_all(dict(claims))
    for name, value in everywhere[0].items():
        for rank, there in enumerate(everywhere):
            if there.get(name) != value:
                return (
                    f"Expected every rank to have the same {name}, got {value!r} on rank 0 and "
                    f"{there.get(name)!r} on rank {rank}."
                )
    return None


def require_same_arguments(**arguments: Any) -> None:
    """Raise on every process unless all of them make the same training private.

    Raises:
        ValueError: Names what differs.
    """
    differs = disagreement(arguments)
    if differs is not None:
        raise ValueError(f"{differs} Make private with the same arguments on every rank.")


def separate_coins(sampler: Any) -> None:
    """Give this process a generator of its own if another one draws from the same seed.

    Guarantee: coins of different processes are independent, as far as their seeds are. With one
        seed row k of every shard would be drawn at the same steps, and drawing them together
        amplifies privacy by less than Opacus's and this package's accounting takes for granted.

    Args:
        sampler: A RecordingShardSampler; its generator is exchanged.
    """
    own = sampler.generator
    seed = torch.initial_seed() if own is None else own.initial_seed()
    seeds = said_by_all(int(seed))
    if seeds.count(seed) == 1:
        return
    digest = hashlib.sha256(f"coins of rank {sampler.rank} from seed {seed}".encode()).digest()
    device = "cpu" if own is None else own.device
    sampler.generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))
    warnings.warn(
        f"{seeds.count(seed)} ranks draw their batches from the same seed ({seed}): their coins "
        "would fall alike, and the privacy accounting needs independent ones. Each rank's sampler "
        "got a seed of its own, derived from this one. Seed every rank differently to keep "
        "Opacus's draws.",
        stacklevel=3,
    )


def gathered(
    accountant: PerInstanceAccountant, *, claims: Mapping[str, Any], dst: int | None
) -> PerInstanceAccountant | None:
    """Return one accountant of the instances of all processes. Every process must call it.

    Args:
        accountant: Of this process's shard.
        claims: What all processes must agree on beside the ledger's own steps.
        dst: Rank that gets it, None on the others; None: every rank gets it.

    Raises:
        LedgerError: The processes counted other steps, or their shards overlap.
    """
    differs = disagreement({"number of steps": accountant.steps, **claims})
    if differs is not None:
        raise LedgerError(
            f"{differs} Ranks that counted other steps have no common ledger. Step on every batch "
            "on every rank, and resume all ranks from the same step."
        )
    state = accountant.state_dict()
    if dst is None:
        states = said_by_all(state)
    else:
        found = [None] * dist.get_world_size() if dist.get_rank() == dst else None
        dist.gather_object(state, found, dst=dst)
        if found is None:
            return None
        states = found
    shards = [_accountant_of(state, like=accountant) for state in states]
    whole = shards[0]
    for shard in shards[1:]:
        whole.merge(shard)
    return whole


def _accountant_of(
    state: Mapping[str, Any], *, like: PerInstanceAccountant
) -> PerInstanceAccountant:
    made = PerInstanceAccountant(
        len(state["instance_ids"]),
        orders=like.orders.tolist(),
        levels=len(like.levels),
        max_sensitivity=float(like.levels[-1]),
        instance_ids=state["instance_ids"],
    )
    made.load_state_dict(state)
    return made
