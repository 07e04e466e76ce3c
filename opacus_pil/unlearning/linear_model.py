"""The models whose training contracts: linear outputs, alone or on a frozen part.

Looks at modules and refuses by name whatever makes them something else; no run and no ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from ..capture.randomness import untouched_generators
from ..capture.unhooked import batch_dependent
from ..heads import BoundedFeatures, OneVsRest
from ..heads.one_vs_rest import head_of
from ..training.task import training_mode
from .conditions import Condition, require_contracting

_SAME = 1e-4  # relative: float32 in two modes of the same layers


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """A model that is linear in its trainable parameters.

    Attributes:
        outputs: Number of them.
        separate: Whether each has a parameter tensor of its own (OneVsRest).
        bias: Whether there is one beside the weights.
        radius: Bound on the features' norm by construction; None: there is none.
        features_of: From a batch of inputs to features, shape (batch, features); None: inputs are
            features.
    """

    outputs: int
    separate: bool
    bias: bool
    radius: float | None
    features_of: Callable[[torch.Tensor], torch.Tensor] | None


def linear_model(module: nn.Module, *, evaluated: frozenset[str] = frozenset()) -> LinearModel:
    """Return a plain module as the linear model that it is.

    Args:
        module: Its only trainable part is a torch.nn.Linear or an OneVsRest.
        evaluated: Submodules that are in evaluation mode whenever it is trained.

    Raises:
        CertificateError: It is none; the message says what is in the way.
    """
    head = head_of(module)
    require_contracting(_head(module, head))
    assert isinstance(head, nn.Linear | OneVsRest)
    require_contracting(_untouched(module, head))
    frozen = None
    if head is not module:
        require_contracting(_fixed_features(module, head, evaluated=evaluated))
        frozen = _FrozenPart(module, head, evaluated=evaluated)
    separate = isinstance(head, OneVsRest)
    return LinearModel(
        outputs=head.classes if isinstance(head, OneVsRest) else head.out_features,
        separate=separate,
        bias=isinstance(head, nn.Linear) and head.bias is not None,
        radius=_radius(module, head),
        features_of=frozen,
    )


class _FrozenPart:
    """What a model's head is given for a batch of inputs; looks whether it is all that counts.

    Args:
        module: The model.
        head: What is trained of it.
        evaluated: Submodules that are in evaluation mode whenever it is trained.
    """

    def __init__(self, module: nn.Module, head: nn.Module, *, evaluated: frozenset[str]) -> None:
        self._module, self._head, self._evaluated = module, head, evaluated
        self._compared = False

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the features, shape (batch, features).

        Raises:
            CertificateError: The head is called several times or not last, or what it is given
                depends on what is trained, or on the mode.
        """
        features, depends = self._seen(inputs)
        require_contracting(
            [
                Condition(
                    not depends,
                    "features that do not depend on what is trained",
                    "some that do",
                    "Freeze everything but the head: requires_grad_(False) before make_private.",
                )
            ]
        )
        if not self._compared and len(features):
            self._compare(inputs, features)
            self._compared = True
        return features

    def _compare(self, inputs: torch.Tensor, features: torch.Tensor) -> None:
        """Hold features against those of the mode in training, by a head with other weights."""
        source = torch.Generator().manual_seed(0)
        mine = {id(p) for p in self._head.parameters()}
        others = {
            name: torch.randn(p.shape, generator=source).to(p)
            for name, p in self._module.named_parameters()
            if id(p) in mine
        }
        again, _ = self._seen(inputs, as_trained=others)
        size = float(features.double().norm())
        far = float((again.double() - features.double()).norm())
        require_contracting(
            [
                Condition(
                    again.shape == features.shape and not far > _SAME * size,
                    "features that are the same in training, whatever the head's weights are",
                    "others",
                    "Leave out of the frozen part what is random or reads the head; or train with "
                    "it in evaluation mode: frozen.eval() after model.train().",
                )
            ]
        )

    def _seen(
        self, inputs: torch.Tensor, *, as_trained: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, bool]:
        """Return what the head is given, and whether a gradient would flow into it.

        Args:
            inputs: A batch.
            as_trained: Weights of the head in place of its own, for a look in the mode of training;
                None: in evaluation mode.
        """
        given: list[Any] = []
        left: list[Any] = []
        hooks = [
            self._head.register_forward_pre_hook(lambda _, seen: given.append(seen[0])),
            self._head.register_forward_hook(
                lambda _, __, seen: left.append(seen.detach().clone())
            ),
        ]
        modes = {part: part.training for part in self._module.modules()}
        device = next(self._module.parameters()).device
        try:
            with untouched_generators(device):
                if as_trained is None:
                    self._module.eval()
                    with torch.enable_grad():
                        found = self._module(inputs.to(device))
                else:
                    training_mode(self._module, evaluated=self._evaluated)
                    with torch.no_grad():
                        found = functional_call(self._module, as_trained, (inputs.to(device),))
        finally:
            for hook in hooks:
                hook.remove()
            for part, mode in modes.items():
                part.training = mode
        once = len(given) == 1 and isinstance(given[0], torch.Tensor)
        same = once and isinstance(found, torch.Tensor) and found.shape == left[0].shape
        require_contracting(
            [
                Condition(
                    same and torch.allclose(found, left[0], rtol=0.0, atol=0.0, equal_nan=True),
                    "a model that gives what its head gives, once",
                    f"{len(given)} calls" if not once else "another output",
                    "What follows the head is part of the loss: leave it out, or put it into the "
                    "frozen part.",
                )
            ]
        )
        return given[0].detach(), bool(given[0].requires_grad)


def _head(module: nn.Module, head: nn.Module | None) -> Iterator[Condition]:
    yield Condition(
        head is not None,
        "a torch.nn.Linear model with one output, or a model whose only trainable part is one "
        "(or an OneVsRest)",
        type(module).__name__,
        "Clipping breaks contraction for any other model; freeze all but the head, or use "
        "method='dp_sgd'.",
    )


def _untouched(module: nn.Module, head: nn.Module) -> Iterator[Condition]:
    """Hold the parts against what their classes do: no hooks, no replaced methods."""
    inside = list(head.modules())
    hooked = [
        hook
        for part in (module, *inside)
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        if not _of_opacus(hook)
    ]
    yield Condition(
        not hooked,
        "a model without forward hooks of yours",
        f"{len(hooked)}",
        "They may change what the layer computes. Remove them.",
    )
    outputs = list(head.outputs) if isinstance(head, OneVsRest) else []
    strange = [
        type(one).__name__ for one in outputs
        if type(one) is not nn.Linear or one.bias is not None or len(one.weight) != 1
    ]  # fmt: skip
    if isinstance(head, OneVsRest) and len(set(head.parameters())) != head.classes:
        strange.append(f"{head.classes} outputs that share weights")
    strange += [f"{type(p).__name__} with its own forward" for p in inside if "forward" in vars(p)]
    yield Condition(
        not strange,
        "outputs that are bias-free torch.nn.Linear, as OneVsRest makes them",
        ", ".join(sorted(set(strange))),
        "A bias beside the weights is clipped with them: append it as a feature "
        "(heads.BoundedFeatures).",
    )


def _fixed_features(
    module: nn.Module, head: nn.Module, *, evaluated: frozenset[str]
) -> Iterator[Condition]:
    """Hold the frozen part against what makes features a function of their row alone."""
    random = [
        name for name, part in module.named_modules()
        if isinstance(part, _DropoutNd) and part.p > 0.0 and name not in evaluated
    ]  # fmt: skip
    yield Condition(
        not random,
        "a frozen part without randomness",
        f"dropout at {', '.join(map(repr, random))}",
        "Train with the frozen part in evaluation mode: frozen.eval() after model.train().",
    )
    mixing = batch_dependent(module)
    yield Condition(
        not mixing,
        "a frozen part that treats rows one by one",
        mixing,
        "Put it into evaluation mode.",
    )


def _radius(module: nn.Module, head: nn.Module) -> float | None:
    """Return the bound that a last BoundedFeatures gives by construction."""
    if not isinstance(module, nn.Sequential) or len(module) < 2 or module[-1] is not head:
        return None
    last: Any = module[-2]
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    return last.radius if type(last) is BoundedFeatures else None


def _of_opacus(hook: Any) -> bool:
    """Whether a forward hook is one that Opacus, or we, hang on modules to see their inputs."""
    owner = getattr(hook, "__self__", hook)
    return type(owner).__module__.startswith(("opacus.", "opacus_pil."))
