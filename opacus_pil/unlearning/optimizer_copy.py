"""An optimizer as it was before its first step, for the parameters of another model.

Momentum and the like were computed with the instances that are to be forgotten, so nothing of them
may come along. Knows torch's optimizers and their attributes. It does *not* know what a class of
the user's own computes: a number among its attributes or in its groups is taken for a setting.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from ..errors import UnsupportedError

_SETTINGS = ("defaults", "param_groups")
_SCHEDULER = ("step", "_opt_called")  # how a scheduler follows its optimizer: by its own `step`


def fresh_optimizer(
    optimizer: torch.optim.Optimizer, *, module: nn.Module, twin: nn.Module
) -> torch.optim.Optimizer:
    """Return an optimizer of the same type and settings for `twin`, as if it had never stepped.

    The class's constructor is not called: its arguments are not kept anywhere (AdamW's differ from
    its `defaults`, a subclass's may be anything). Attributes are copied instead, the parameters and
    submodules of `module` replaced by those of `twin`, hooks and nested optimizers included. Groups
    keep the values they have now, a learning rate that a scheduler has lowered for one; schedulers
    themselves stay with the original. `state` is empty, or what Adagrad's constructor puts there.

    Guarantee: nothing that can be reached from the copy, through attributes, containers and the
    variables of hooks, is a parameter, a state or a group of the original, which is left as it was.

    Args:
        optimizer: Of `module`, stepped or not.
        module: The model it optimizes.
        twin: A copy of `module`; `module` itself for a fresh optimizer of the same model.

    Raises:
        ValueError: A parameter that is not one of `module`.
        UnsupportedError: An attribute that holds a tensor or array of several numbers, which may
            have been computed in training (`state` is where such things are known and left
            behind); one that cannot be copied; a hook that holds on to the original.

    A class that fills `state` in its own constructor, and is not Adagrad, is not known as such: its
    copy fails at its first step.
    """
    partners: dict[int, Any] = {
        id(mine): theirs
        for kind in ("parameters", "buffers", "modules")
        for mine, theirs in zip(getattr(module, kind)(), getattr(twin, kind)(), strict=True)
    }
    for part in _optimizers(optimizer):
        _require_own_parameters(part, partners)
    left_behind = {
        id(thing): thing for thing in _own_things(optimizer) if partners.get(id(thing)) is not thing
    }
    copying = _Copying(partners)
    result = copying.of(optimizer)
    for name, value in result.__dict__.items():
        if any(id(thing) in left_behind for thing in _reachable(value)):
            raise UnsupportedError(
                f"Expected an optimizer that can be made for another model, got "
                f"{type(optimizer).__name__} whose {name!r} holds on to the parameters or state of "
                "this one. Let a hook use the optimizer that it is called with."
            )
    copying.refuse_computed()
    return result


def _require_own_parameters(optimizer: torch.optim.Optimizer, partners: dict[int, Any]) -> None:
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in partners:
                raise ValueError(
                    f"Expected the optimizer to hold parameters of the module only, got parameter "
                    f"{place} of group {number}, shape {tuple(parameter.shape)}, that the module "
                    "does not have. Build the optimizer with this module's parameters, after any "
                    "replacement of layers."
                )


def _own_things(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Yield what belongs to the original alone: itself, parameters, groups and state."""
    kinds = (torch.optim.Optimizer, torch.Tensor, np.ndarray, dict, list, set)
    for part in _optimizers(optimizer):
        yield part
        for thing in _reachable([part.state, part.param_groups]):
            if isinstance(thing, kinds):  # small numbers and names are everybody's
                yield thing


def _optimizers(value: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizers that would be copied with a value."""
    copied = _reachable(value, shared=False)
    return (thing for thing in copied if isinstance(thing, torch.optim.Optimizer))


class _Copying:
    """Copies an optimizer and those inside it; the parts of the twin stand for the module's."""

    def __init__(self, partners: dict[int, Any]) -> None:
        self._memo = dict(partners)  # as of copy.deepcopy
        self._known = {id(part): part for part in partners.values()}
        self._copies: list[torch.optim.Optimizer] = []

    def of(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Copy the attributes into an empty object of the type, but not what `state` holds."""
        result: torch.optim.Optimizer = object.__new__(type(optimizer))
        self._memo[id(optimizer)] = result
        own = dict(optimizer.__dict__)
        if hasattr(own.get("step"), "_wrapped_by_lr_sched"):
            own = {name: value for name, value in own.items() if name not in _SCHEDULER}
        if "state" in own:  # some wrappers share it with the optimizer inside, or ask that one
            self._memo.setdefault(id(own["state"]), defaultdict(dict))
        for inner in list(_optimizers(own)):
            if id(inner) not in self._memo:
                self.of(inner)
        for name, value in own.items():
            result.__dict__[name] = self._copy(optimizer, name, value)
        if isinstance(result, torch.optim.Adagrad):
            result.state.update(_initial_state(result))
        self._copies.append(result)
        for part in (result, result.state, result.defaults, result.param_groups):
            self._known[id(part)] = part
        return result

    def _copy(self, optimizer: torch.optim.Optimizer, name: str, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"Expected attributes of {type(optimizer).__name__} that can be copied, got "
                f"{name!r} of type {type(value).__name__}: {error}. Keep it outside of the "
                "optimizer."
            ) from error

    def refuse_computed(self) -> None:
        """Raise if a copy holds numbers that may have been computed in training."""
        for result in self._copies:
            for name, value in result.__dict__.items():
                for thing in _reachable(value, known=self._known):
                    if _size(thing) > 1:
                        raise UnsupportedError(
                            f"Expected {type(result).__name__} to keep what it computes in "
                            f"`state`, got attribute {name!r} with a {type(thing).__name__} of "
                            f"shape {tuple(thing.shape)}: it may hold something of the instances "
                            "that are to be forgotten. Move it into `state`, or, if it is a "
                            "setting, into the parameter groups."
                        )


def _size(thing: Any) -> int:
    """Return how many numbers a tensor or an array holds; 0 for everything else."""
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    return thing.size if isinstance(thing, np.ndarray) else 0


def _initial_state(optimizer: torch.optim.Adagrad) -> dict[Any, Any]:
    """Return what Adagrad's own constructor puts into the state."""
    groups = [dict(group) for group in optimizer.param_groups]
    value = optimizer.defaults["initial_accumulator_value"]
    return torch.optim.Adagrad(groups, initial_accumulator_value=value).state


def _reachable(
    value: Any, *, shared: bool = True, known: dict[int, Any] | None = None
) -> Iterator[Any]:
    """Yield what a value holds: in containers, attributes, bound methods.

    Args:
        value: Where to begin.
        shared: Also what a deep copy leaves where it is: the variables of functions, weak
            references, and what belongs to objects that know how to copy themselves. Never what a
            name in a function's module stands for.
        known: Neither these things, by id, nor what is behind them.
    """
    seen: dict[int, Any] = {}  # holds what it names: the number of a thing that is gone is reused
    todo = [value]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or (known is not None and id(thing) in known):
            continue
        seen[id(thing)] = thing
        yield thing
        todo += _held(thing, shared=shared)


def _held(thing: Any, *, shared: bool) -> list[Any]:
    """Return what a thing holds itself; see `_reachable`."""
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.FunctionType | weakref.ref):
        return _shared_by(thing) if shared else []
    if isinstance(thing, type | types.ModuleType | torch.Tensor):
        return []
    own = shared or not hasattr(thing, "__deepcopy__")
    return [getattr(thing, "__dict__", None)] if own else []


def _shared_by(thing: Any) -> list[Any]:
    """Return the variables of a function, or what a weak reference stands for."""
    if isinstance(thing, weakref.ref):
        return [thing()]
    variables = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
    return [*variables, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that was never set
        return False
