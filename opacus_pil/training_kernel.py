"""The public constants of a DP-SGD run, and which runs have a per-instance accounting at all."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opacus import PrivacyEngine
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.utils.uniform_sampler import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from torch import nn
from torch.distributed._composable.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from . import _validate as check
from .capture.indices import RecordingSampler, require_in_order
from .errors import UnsupportedError

GRAD_SAMPLE_MODES = ("hooks", "functorch", "ew", "ghost", "no_op")


@dataclass(frozen=True)
class TrainingKernel:
    """What stays fixed when instances leave: unlearning and oracles keep it, never re-derive it.

    Attributes:
        sample_rate: Probability that an instance is drawn into a batch. In (0, 1].
        expected_batch_size: What Opacus divides a mean-reduced gradient sum by.
        noise_multiplier: Noise std on the gradient sum / max_grad_norm. Unitless.
        max_grad_norm: Clip bound on a per-sample gradient norm.
        loss_reduction: "mean" or "sum".
        grad_sample_mode: As in Opacus, one of GRAD_SAMPLE_MODES.
        batch_first: Whether the batch is the inputs' first dimension.
        num_instances: Size of the training set.
        clipping: "flat", "per_layer" or "adaptive".
        poisson_sampling: False for fixed batches.
        world_size: Number of processes that draw from a shard each; `sample_rate` is that of each.
        rand_on_empty: Opacus puts a random instance into an empty draw.
    """

    sample_rate: float
    expected_batch_size: int
    noise_multiplier: float
    max_grad_norm: float
    loss_reduction: str
    grad_sample_mode: str
    batch_first: bool
    num_instances: int
    clipping: str = "flat"
    poisson_sampling: bool = True
    world_size: int = 1
    rand_on_empty: bool = False


def require_map_style(data_loader: Any) -> None:
    """Raise unless the loader and its data set have a length and rows, in order."""
    cure = "Pass a DataLoader over a map-style data set (with __len__ and __getitem__)."
    if not isinstance(data_loader, DataLoader):
        raise TypeError(check.expected("data_loader", "to be a DataLoader", data_loader, cure))
    dataset = data_loader.dataset
    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not map_style:
        raise UnsupportedError(
            f"Expected data_loader to have a length, got data_loader over "
            f"{type(dataset).__name__}, which has none. Without it neither the sample rate nor an "
            f"instance is defined. {cure}"
        )
    check.integer("len(data_loader)", len(data_loader), low=1, cure=cure)
    require_in_order(data_loader)  # Opacus would drop the setting without a word


def require_uniform_batches(data_loader: DataLoader[Any], *, distributed: bool = False) -> None:
    """Raise if Opacus would replace the loader's sampler by one that draws something else."""
    size, batch_size = len(data_loader.dataset), data_loader.batch_size  # type: ignore[arg-type]
    sampler, batches = data_loader.sampler, data_loader.batch_sampler
    if distributed and isinstance(sampler, DistributedSampler):
        size = len(sampler)  # batch_size is then meant per process
    cure = (
        "Opacus draws every row of the data set uniformly at rate 1 / len(data_loader) and drops "
        "the sampler. Train on a Subset, or on a DataLoader with shuffle=True."
    )
    drawn_already = isinstance(data_loader, DPDataLoader) and (
        type(batches) in _POISSON
        or (isinstance(batches, RecordingSampler) and batches.population is None)
    )
    if not drawn_already:
        whole = type(sampler) in (SequentialSampler, DistributedSampler) or (
            type(sampler) is RandomSampler and not sampler.replacement
        )
        for name, found, fine in (
            ("sampler", sampler, whole),
            ("batch_sampler", batches, batches is None or type(batches) is BatchSampler),
        ):
            if not fine:
                kind = type(found).__name__
                replaced = " with replacement" if type(found) is RandomSampler else ""
                raise UnsupportedError(
                    f"Expected a uniform sampler, got {name}={kind}{replaced}. {cure}"
                )
    if batch_size is not None:
        allowed = {max(size // batch_size, 1), -(-size // batch_size)}
        if len(data_loader) not in allowed:
            raise UnsupportedError(
                f"Expected len(data_loader) to be rows / batch_size ({size} / "
                f"{batch_size}), got {len(data_loader)}. {cure}"
            )


def require_known_options(options: Mapping[str, Any]) -> None:
    """Raise for a keyword that Opacus would swallow without a word.

    Raises:
        TypeError: Names it, and the keyword that is closest.
    """
    known = known_options()
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            cure = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            if name in ("instance_ids", "norm_policy", "caps", "budget", "history", "orders"):
                cure = f"Pass it to PerInstancePrivacyEngine({name}=...)."
            raise TypeError(
                f"Expected keywords of make_private, got an unknown one: {name!r}. {cure}"
            )


def known_options() -> frozenset[str]:
    """Return the keywords that Opacus's engine, optimizers and accountants take."""
    own = _names(PrivacyEngine.make_private, PrivacyEngine.make_private_with_epsilon)
    adaptive = _names(AdaClipDPOptimizer.__init__) - _names(DPOptimizer.__init__)
    conversions = _names(
        RDPAccountant.get_epsilon, RDPAccountant.get_privacy_spent, PRVAccountant.get_epsilon,
        GaussianAccountant.get_epsilon,
    )  # fmt: skip
    return frozenset((own | adaptive | conversions | {"epsilon_tolerance"}) - {"delta", "kwargs"})


def _names(*functions: Callable[..., Any]) -> set[str]:
    return {name for f in functions for name in inspect.signature(f).parameters} - {"self"}


_POISSON = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)


def require_supported(
    module: nn.Module, options: Mapping[str, Any], *, norm_policy: str = "last_seen"
) -> None:
    """Raise for a combination of Opacus's options without a sound per-instance number."""
    clipping = check.choice(
        "clipping", options.get("clipping", "flat"), ("flat", "per_layer", "adaptive")
    )
    if clipping == "adaptive" and norm_policy == "capped":
        raise UnsupportedError(
            "Expected flat clipping with norm_policy='capped', got clipping='adaptive'. The count "
            "that adaptive clipping releases is not bounded by a cap."
        )
    mode = options.get("grad_sample_mode", "hooks")
    if mode not in GRAD_SAMPLE_MODES:
        raise UnsupportedError(
            f"Expected grad_sample_mode to be one of {', '.join(GRAD_SAMPLE_MODES)}, got "
            f"grad_sample_mode={mode!r}. Parameters sharded over processes have no norm in one "
            "place. Pass one of these."
        )
    if options.get("poisson_sampling", True) == (norm_policy == "participation"):
        raise UnsupportedError(
            "Expected poisson_sampling=False with norm_policy='participation' and only there, got "
            f"poisson_sampling={options.get('poisson_sampling', True)} with {norm_policy=}. "
            "Shuffled batches get no amplification by sampling: only who is in the batch is "
            "charged. Change one of the two, or use another engine for the other kind of batches."
        )
    inner = module._module if isinstance(module, AbstractGradSampleHooks) else module
    if isinstance(inner, DistributedDataParallel | FSDPModule):
        raise UnsupportedError(
            f"Expected a plain module, or Opacus's DifferentiallyPrivateDistributedDataParallel, "
            f"got module={type(inner).__name__}, which adds up gradients or shards parameters "
            "before they are clipped and noised. Wrap in Opacus's."
        )
    if is_distributed(module):
        _require_shards(options, clipping=clipping)


def is_distributed(module: Any) -> bool:
    """Whether several processes train this module together, by Opacus's wrapper."""
    inner = module._module if isinstance(module, AbstractGradSampleHooks) else module
    return isinstance(inner, DifferentiallyPrivateDistributedDataParallel)


def _require_shards(options: Mapping[str, Any], *, clipping: str) -> None:
    """Raise for a distributed training whose processes cannot keep the account of their shards."""
    if not options.get("poisson_sampling", True):
        raise UnsupportedError(
            "Expected Poisson sampling in a distributed training, got poisson_sampling=False. "
            "Fixed batches move instances between ranks (DistributedSampler deals them anew at "
            "each epoch and repeats some; without it every rank trains on all of them), so that no "
            "rank knows what an instance has lost. Leave poisson_sampling out."
        )
    if clipping == "adaptive":
        raise UnsupportedError(
            "Expected flat or per-layer clipping in a distributed training, got "
            "clipping='adaptive', for which Opacus has no distributed optimizer. Use flat clipping."
        )


def require_plain(module: nn.Module, optimizer: Optimizer) -> None:
    """Raise unless Opacus has touched neither and the optimizer holds the module's parameters."""
    hooked = isinstance(module, AbstractGradSampleHooks) or hasattr(
        module, "autograd_grad_sample_hooks"
    )
    if hooked or isinstance(optimizer, DPOptimizer):
        raise ValueError(
            f"Expected a plain module and optimizer, got {type(module).__name__} and "
            f"{type(optimizer).__name__} of Opacus. Pass a plain copy of the module and an "
            "optimizer of its parameters."
        )
    owned = {id(p) for p in module.parameters()}
    if any(id(p) not in owned for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "Expected optimizer to hold parameters of module, got others. Build it from "
            "module.parameters()."
        )
