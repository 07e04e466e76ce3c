"""What a certificate stands on besides its formula: evidence of the steps, weights, buffers, data.

Each is checked where it can be, and named in the certificate's context where it is taken for
granted. Knows the training's ledger and the model; no method and no number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from ..certificates import Certificate
from ..errors import CertificateError, UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.account import Account
from ..training.weights import renormed


def weights_left(privacy_engine: PerInstancePrivacyEngine | None, module: nn.Module) -> bool | None:
    """Return whether a module has the weights that a training left; None: nobody has noted them."""
    trainings = () if privacy_engine is None else privacy_engine.trainings
    answers = [training.weights.are(module) for training in trainings]
    if True in answers:
        return True
    return False if False in answers else None


def training_codes(
    account: Account | None, *, module: nn.Module, weights: bool | None
) -> tuple[str, ...]:
    """Return what is taken for granted about the training and the model: codes of a context.

    Args:
        account: The ledgers that a certificate rests on; None: on none.
        module: Plain, as it is now.
        weights: Whether training left the weights that the engine was built with; None: not known.

    Raises:
        CertificateError: Weights that are not the ones training left, or a buffer of the model.
    """
    if weights is False:
        raise CertificateError(
            "Expected the model as training left it, got weights that are not the ones training "
            "left: no step of the ledger made them. Build the engine on the trained module (or a "
            "copy of it), before anything else is loaded or edited."
        )
    _require_public_buffers(module)
    codes = []
    if account is not None and ("earlier_release" in account.findings or weights is None):
        codes.append("labels_without_evidence")
    frozen = any(not parameter.requires_grad for parameter in module.parameters())
    if frozen or any(True for _ in module.buffers()):
        codes.append("frozen_part_is_public")
    return tuple(codes)


def _require_public_buffers(module: nn.Module) -> None:
    """Raise for a buffer that is saved, unless a frozen normalisation layer holds it."""
    allowed = {name for name, part in _statistics(module) for name in _names(name, part)}
    other = [
        name for name, _ in module.named_buffers() if name not in allowed and _saved(module, name)
    ]
    if other:
        raise CertificateError(
            f"Expected a model without buffers for a certificate, got {other[0]!r} (one of "
            f"{len(other)}): what it holds may come from the data, and no step adds noise to it. "
            "Compute constants in the forward pass, or register them with persistent=False."
        )


def require_no_running_statistics(module: nn.Module, *, evaluated: frozenset[str]) -> None:
    """Raise for a normalisation layer that learns from data outside of the noisy steps.

    One that is frozen and in evaluation mode has neither trained nor updated, and every pass leaves
    it so.

    Args:
        module: Plain.
        evaluated: Submodules that were in evaluation mode while training, whatever they are in now.

    Raises:
        UnsupportedError: Names the layer, and the cure.
    """
    for name, part in module.named_modules():
        learns = _learns_outside(part, evaluated=name in evaluated)
        if learns:
            raise UnsupportedError(
                f"Expected a model without BatchNorm or other running statistics, unless frozen "
                f"and in evaluation mode, got {type(part).__name__} at {name or 'the top'!r} that "
                f"{learns}. They keep traces of forgotten instances. Use GroupNorm; or freeze it "
                "before training: layer.requires_grad_(False) and layer.eval()."
            )


def _learns_outside(part: nn.Module, *, evaluated: bool) -> str:
    """Return how a layer learns from data outside of the noisy steps; "": it does not."""
    batch = isinstance(part, nn.modules.batchnorm._BatchNorm)
    if not batch and not getattr(part, "track_running_stats", False):
        return ""
    if getattr(part, "running_mean", None) is None:
        return "normalises by the batch itself"
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            return f"parameter {name!r} trains"
    still = not part.training or evaluated
    return "" if isinstance(part, _NormBase) and still else "is in training mode"


def require_still_weights(module: nn.Module) -> None:
    """Raise for a layer whose forward pass moves weights, for a certificate of noisy steps.

    Raises:
        CertificateError: Names the layer, and the cure.
    """
    name = renormed(module)
    if name:
        raise CertificateError(
            f"Expected a model whose weights are moved by noisy steps only, got an embedding with "
            f"max_norm at {name!r}, which rescales what a batch looks up. Leave max_norm out."
        )


def with_codes(certificate: Certificate, *codes: str) -> Certificate:
    """Return the certificate that names these codes of its context too; itself without codes.

    A certificate of a class of the caller's has no context, and says what it says.
    """
    if not codes or not dataclasses.is_dataclass(certificate):
        return certificate
    return certificate.with_context(*dict.fromkeys(codes))


def _statistics(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the frozen normalisation layers, which `training_mode` keeps as they are."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and not any(p.requires_grad for p in part.parameters()):
            yield name, part


def _names(name: str, part: nn.Module) -> list[str]:
    return [f"{name}.{n}" if name else n for n, _ in part.named_buffers()]


def _saved(module: nn.Module, name: str) -> bool:
    """Whether a buffer is part of the saved model; others are made by its code."""
    path, _, last = name.rpartition(".")
    return last not in module.get_submodule(path)._non_persistent_buffers_set
