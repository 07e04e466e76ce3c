"""Which trainings have a per-instance accounting at all: every argument is checked here, once.

Knows Opacus's options, loaders and wrappers; changes nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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

from .. import _validate as check
from ..capture.ghost import SEQUENCE_ROUNDING
from ..capture.indices import RecordingSampler, require_in_order
from ..errors import UnsupportedError
from ..heads.one_vs_rest import one_vs_rest_of
from .policies import NormPolicy
from .update import adaptive_noise

GRAD_SAMPLE_MODES = ("hooks", "functorch", "ew", "ghost", "no_op")


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
            cure = ""
            if name in ("instance_ids", "norm_policy", "caps", "budget", "history", "orders"):
                cure = f"Pass it to PerInstancePrivacyEngine({name}=...)."
            raise TypeError(check.unknown_keyword("make_private", name, known, cure))


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


@dataclass(frozen=True)
class Asked:
    """What make_private was asked for, checked.

    Attributes:
        size: Instances of the data set.
        noise_multiplier: Of the training.
        max_grad_norm: Bound on a whole gradient.
        clipping: "flat", "per_layer" or "adaptive".
        grad_sample_mode: One of GRAD_SAMPLE_MODES.
        poisson_sampling: Whether batches are drawn by coins.
        distributed: Whether several processes train together.
        released_count: Shift of adaptive clipping's count, in units of the gradients' noise.
        cap_rounding: Relative error of the norms that caps are held against.
        output_bounds: As in TrainingKernel.
    """

    size: int
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    grad_sample_mode: str
    poisson_sampling: bool
    distributed: bool
    released_count: float
    cap_rounding: float
    output_bounds: tuple[float, ...] = ()

    def require_caps_of_outputs(self) -> None:
        """Raise where layers are clipped one by one and it is not known which cap is whose.

        Raises:
            UnsupportedError: Says what they must be.
        """
        if self.clipping == "per_layer" and not self.output_bounds:
            raise UnsupportedError(
                "Expected an optimizer of OneVsRest.parameters(), in their order, under caps per "
                "output, got others. Which cap is whose would not be known."
            )


def checked_arguments(
    module: Any,
    *,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: Any,
    options: Mapping[str, Any],
    policy: NormPolicy,
) -> Asked:
    """Return the arguments of make_private, or raise for a use without a sound number.

    Raises:
        UnsupportedError, TypeError, ValueError: Names the argument.
    """
    require_known_options(options)
    noise = check.noise_multiplier(noise_multiplier)
    clipping = options.get("clipping", "flat")
    bound = _checked_bound(max_grad_norm, clipping=clipping)
    bounds: tuple[float, ...] = ()
    if clipping == "per_layer":
        _require_bound_per_layer(max_grad_norm, optimizer)
        bounds = tuple(float(b) for b in max_grad_norm)
    poisson = options.get("poisson_sampling", True)
    require_map_style(data_loader)
    require_supported(module, options, policy=policy)
    distributed = is_distributed(module)
    if poisson:
        require_uniform_batches(data_loader, distributed=distributed)
    return asked(
        module, options, size=len(data_loader.dataset),  # type: ignore[arg-type]
        noise_multiplier=noise, max_grad_norm=bound, layer_bounds=bounds, optimizer=optimizer,
    )  # fmt: skip


def asked(
    module: Any,
    options: Mapping[str, Any],
    *,
    size: int,
    noise_multiplier: float,
    max_grad_norm: float,
    layer_bounds: tuple[float, ...],
    optimizer: Optimizer,
) -> Asked:
    """Return what a training that is supported asks for.

    Args:
        layer_bounds: Where layers are clipped one by one: of each, in the optimizer's order.
        optimizer: Plain or private.
    """
    clipping, mode = options.get("clipping", "flat"), options.get("grad_sample_mode", "hooks")
    inner = module if isinstance(module, nn.Module) else module._module
    released = 0.0
    if clipping == "adaptive":
        deviation = float(options.get("unclipped_num_std", math.inf))
        released = adaptive_noise(noise_multiplier, deviation)[1]
    rounding = max((float(torch.finfo(p.dtype).eps) for p in inner.parameters()), default=0.0)
    return Asked(
        size=size,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        grad_sample_mode=mode,
        poisson_sampling=options.get("poisson_sampling", True),
        distributed=is_distributed(module),
        released_count=released,
        cap_rounding=max(rounding, SEQUENCE_ROUNDING) if mode == "ghost" else rounding,
        output_bounds=layer_bounds if _clips_outputs(inner, optimizer) else (),
    )


def _clips_outputs(module: nn.Module, optimizer: Optimizer) -> bool:
    """Whether each trained tensor is one output of an OneVsRest head, in their order.

    Outputs that share a tensor are not apart: its gradient is that of several losses.
    """
    head = one_vs_rest_of(module)
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return (
        head is not None
        and len(held) == head.classes
        and list(map(id, held)) == list(map(id, head.parameters()))
    )


def require_supported(
    module: nn.Module, options: Mapping[str, Any], *, policy: NormPolicy | None = None
) -> None:
    """Raise for a combination of Opacus's options without a sound per-instance number."""
    clipping = check.choice(
        "clipping", options.get("clipping", "flat"), ("flat", "per_layer", "adaptive")
    )
    if policy is not None:
        inner = module._module if isinstance(module, AbstractGradSampleHooks) else module
        by_output = clipping == "per_layer" and one_vs_rest_of(inner) is not None
        policy.require_clipping("by_output" if by_output else clipping)
    mode = options.get("grad_sample_mode", "hooks")
    if mode not in GRAD_SAMPLE_MODES:
        raise UnsupportedError(
            f"Expected grad_sample_mode to be one of {', '.join(GRAD_SAMPLE_MODES)}, got "
            f"grad_sample_mode={mode!r}. Parameters sharded over processes have no norm in one "
            "place. Pass one of these."
        )
    if policy is not None:
        policy.require_batches(poisson_sampling=options.get("poisson_sampling", True))
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


def _require_bound_per_layer(bounds: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless there is a clip bound for each parameter tensor that trains."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if len(bounds) != len(held):
        raise ValueError(
            f"Expected max_grad_norm to be one bound per parameter tensor of the optimizer "
            f"({len(held)}), got {len(bounds)}. With clipping='per_layer' pass a list of as many."
        )


def _checked_bound(max_grad_norm: Any, *, clipping: str) -> float:
    """Return the clip bound on a whole gradient; one bound per layer with per-layer clipping."""
    cure = "Pass a positive number; with clipping='per_layer' a list of one per parameter."
    if clipping != "per_layer":
        return check.real("max_grad_norm", max_grad_norm, low=0.0, open_low=True, cure=cure)
    bounds = check.real_array("max_grad_norm", max_grad_norm, low=0.0, open_low=True, cure=cure)
    if bounds.ndim != 1 or not len(bounds):
        raise ValueError(check.expected("max_grad_norm", "to be a list", max_grad_norm, cure))
    return float(np.linalg.norm(bounds))
