"""A copy of a module without Opacus's hooks, and whether it treats the rows of a batch one by one.

Knows modules and what Opacus leaves on them; no data and no loss.
"""

from __future__ import annotations

import copy
from typing import Any

from opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..errors import UnsupportedError

# Attributes that Opacus leaves on the modules it hooks.
_LEFTOVERS = (
    "autograd_grad_sample_hooks", "activations", "max_batch_len", "ft_compute_sample_grad",
)  # fmt: skip


def measurable_copy(module: nn.Module) -> nn.Module:
    """Copy a module without Opacus's hooks, ready for a full pass.

    Modules that hold trained parameters are in training mode, dropout modules off, all others
    (a frozen BatchNorm, say) in the mode they were in.

    Raises:
        UnsupportedError: A layer that mixes instances; Opacus's validator says which.
    """
    inner = module._module if isinstance(module, AbstractGradSampleHooks) else module
    clone = _unhooked(inner)
    for part in clone.modules():
        if any(p.requires_grad for p in part.parameters(recurse=False)):
            part.training = True  # Opacus measures nothing in evaluation mode
        elif isinstance(part, _DropoutNd):
            part.training = False
    clone.training = True
    mixing = batch_dependent(clone)
    try:
        ModuleValidator.validate(clone, strict=True)
    except UnsupportedModuleError as error:
        mixing = mixing or str(error)
    if mixing:
        raise UnsupportedError(
            f"Expected a module that treats instances one by one, got {type(inner).__name__}: "
            f"{mixing}"
        )
    return clone


def batch_dependent(module: nn.Module) -> str:
    """Return which normalisation layer depends on the batch, and what to do; "": none.

    A BatchNorm in evaluation mode with fixed statistics treats rows one by one; InstanceNorm does
    so in either mode, but updates statistics in training mode, if it keeps any.
    """
    for name, part in module.named_modules():
        if not isinstance(part, _NormBase):
            continue
        instance = isinstance(part, nn.modules.instancenorm._InstanceNorm)
        if part.training and (part.track_running_stats or not instance):
            return (
                f"{type(part).__name__} at {name or 'the top'!r} is in training mode. Put it into "
                "evaluation mode and freeze it, or use GroupNorm."
            )
    return ""


def _unhooked(inner: nn.Module) -> nn.Module:
    """Return a copy in which nothing of Opacus is left; what it leaves is shared, not copied."""
    memo: dict[int, Any] = {}
    for part in inner.modules():
        left = [part.__dict__[name] for name in _LEFTOVERS if name in part.__dict__]
        hooks = (*part._forward_hooks.values(), *part._backward_hooks.values())
        left += [owner for owner in map(_hook_owner, hooks) if owner is not None]
        memo.update({id(thing): thing for thing in left})
    clone = copy.deepcopy(inner, memo)
    for part in clone.modules():
        for name in _LEFTOVERS:
            part.__dict__.pop(name, None)
        for own in (part._forward_hooks, part._backward_hooks):
            for key in [key for key, hook in own.items() if _hook_owner(hook) is not None]:
                del own[key]
    return clone


def _hook_owner(hook: Any) -> Any:
    """Return the Opacus object that a module hook belongs to, or None for the user's own hooks."""
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    return owner if isinstance(owner, AbstractGradSampleHooks | AbstractGradSampleModule) else None
