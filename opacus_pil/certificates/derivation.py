"""Whether the numbers in a certificate's context are those that its constants come from.

A context such as "features of norm at most 1" is only as good as its link to the contraction that
was computed from it: an edited number would speak of other data. So every number that a context
names must be needed for some constant, and give it. Knows the formulas of the constructors, not
where their arguments came from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .assumptions import Assumption
from .batch_laws import step_factor
from .capped_glm import SHIFT_ROUND_UP, full_batch_factor
from .certificate import Certificate
from .chien2024 import Chien2024Certificate, sharp_constants
from .contraction import ContractionCertificate
from .langevin import LangevinCertificate
from .methods import members_of
from .mini_batches import PoissonContractionCertificate

# Relative. Sentences show six digits, which are all that a file of version 1 kept, each good to
# 5e-6; a constant is a product of up to eight of them.
_SIX_DIGITS = 5e-5
Numbers = Mapping[str, Any]


class _Rule(NamedTuple):
    """Contexts that come together, and the constants that they give: (name, kept, derived)."""

    kind: type[Certificate]
    codes: frozenset[str]
    differs: Callable[[Any, Numbers], str | None]
    shared: frozenset[str] = frozenset()  # of the codes: those that other rules have too


def derivation_mismatch(certificate: Certificate) -> str | None:
    """Return which number of a context contradicts the constants; None: all agree."""
    for member in members_of(certificate):
        found = _mismatch(member)
        if found is not None:
            return found
    return None


def context_numbers(certificate: Certificate) -> dict[str, Any]:
    """Return the numbers of the context by name; those that two codes share must be equal."""
    found: dict[str, Any] = {}
    for item in certificate.context:
        found.update(item.numbers if isinstance(item, Assumption) else ())
    return found


def _mismatch(certificate: Certificate) -> str | None:
    numbered = [one for one in certificate.context if isinstance(one, Assumption)]
    numbers: dict[str, Any] = {}
    for name, value in itertools.chain.from_iterable(one.numbers for one in numbered):
        if numbers.setdefault(name, value) != value:
            return f"{name} is {numbers[name]!r} in one context and {value!r} in another"
        if isinstance(value, int | float) and not value >= 0:  # norms, counts and rates
            return f"{name} is {value!r}, which no run has"
    return _broken_rule(certificate, {one.code for one in numbered}, numbers)


def _broken_rule(certificate: Certificate, codes: set[str], numbers: Numbers) -> str | None:
    """Return which code does not give what its rule says, or belongs to no rule."""
    left = set(codes)
    for rule in _RULES:
        if type(certificate) is rule.kind and left & (rule.codes - rule.shared):
            missing = sorted(rule.codes - left)
            if missing:
                return f"a context without {missing[0]!r}, which comes with it"
            found = rule.differs(certificate, numbers)
            if found is not None:
                return f"{found} than its context gives"
            left -= rule.codes
    if left:
        name = type(certificate).__name__
        return f"{min(left)!r}, whose numbers give no constant of a {name}"
    return None


def _full_batch(certificate: ContractionCertificate, n: Numbers) -> str | None:
    beta = _square(n["feature_norm"]) * n["loss_smoothness"] * n["num_instances"]
    beta /= n["expected_batch_size"]
    eta, decay = n["step_size"], n["weight_decay"]
    factor = full_batch_factor(step_size=eta, weight_decay=decay, smoothness=beta)
    kept, noise = certificate.contraction, certificate.noise_std
    later = (certificate.unlearning_contraction, certificate.unlearning_noise_std)
    if not (isinstance(kept, float) and isinstance(noise, float) and later == (None, None)):
        return "other constants at some steps"
    if not abs(kept - factor) <= _slack(factor, step_size=eta, decay=decay, growth=beta):
        return f"another contraction, {kept!r},"
    if certificate.first_unlearning_noise_std is not None and "burst" not in n:
        return "other noise at the first unlearning step"
    scale = eta * n["max_grad_norm"] / n["expected_batch_size"]
    if not _near(noise, scale * n["noise_multiplier"]):
        return f"other noise, {noise!r},"
    return _other_shifts(certificate.shifts, scale * n["cap_sum"] * SHIFT_ROUND_UP)


def _other_shifts(shifts: Sequence[float], first: float) -> str | None:
    """Return how shifts are others; whoever left earlier does not move the later steps."""
    if shifts and not _near(shifts[0], first):
        return f"another shift, {shifts[0]!r},"
    if any(later > earlier for earlier, later in itertools.pairwise(shifts)):
        return "a larger shift at a later step"
    return None


def _mini_batches(certificate: PoissonContractionCertificate, n: Numbers) -> str | None:
    if not _near(certificate.smoothness, n["loss_smoothness"] * _square(n["feature_norm"])):
        return f"another smoothness, {certificate.smoothness!r},"
    bounds, clip = certificate.gradient_bounds, n["max_grad_norm"] * SHIFT_ROUND_UP
    if len(bounds) != n["members"] or not _near(math.fsum(bounds), n["cap_sum"] * clip):
        return "other bounds on the forgotten gradients"
    if max(bounds, default=0.0) > clip * (1.0 + _SIX_DIGITS):
        return f"a bound on a gradient, {max(bounds)!r}, above its clip,"
    return None


def _unclipped(
    certificate: ContractionCertificate | PoissonContractionCertificate, n: Numbers
) -> str | None:
    if n["max_grad_norm"] < n["steepness"] * n["feature_norm"] * (1.0 - _SIX_DIGITS):
        return f"a clip, {n['max_grad_norm']!r}, that gradients reach, other"
    if isinstance(certificate, ContractionCertificate):
        return _full_batch(certificate, n)
    return _mini_batches(certificate, n)


def _burst(certificate: ContractionCertificate, n: Numbers) -> str | None:
    noise, first = certificate.noise_std, certificate.first_unlearning_noise_std
    if certificate.unlearning_noise_std is not None:
        noise = certificate.unlearning_noise_std
    if first is None or not isinstance(noise, float) or not _near(first, noise * n["burst"]):
        return f"other noise at the first unlearning step, {first!r},"
    return None


def _known_batches(certificate: ContractionCertificate, n: Numbers) -> str | None:
    eta, decay = n["step_size"], n["weight_decay"]
    growth = n["smoothness"] * n["unlearning_batch_size"] / n["expected_batch_size"]
    factor = float(
        step_factor(
            n["unlearning_batch_size"],
            step_size=eta,
            weight_decay=decay,
            smoothness=n["smoothness"],
            expected_batch_size=n["expected_batch_size"],
        )
    )
    slack = _slack(factor, step_size=eta, decay=decay, growth=growth)
    kept = certificate.unlearning_contraction
    if kept is None or not abs(kept - factor) <= slack:
        return f"another unlearning contraction, {kept!r},"
    return None


def _in_turn(certificate: ContractionCertificate, n: Numbers) -> str | None:
    if sum(n["phase_steps"]) != len(certificate.shifts) or n["requests"] != len(n["phase_steps"]):
        return f"{len(certificate.shifts)} steps, other"
    return None


def _stationary(certificate: LangevinCertificate, n: Numbers) -> str | None:
    setting = Chien2024Certificate(**{name: n[name] for name in _SETTING})
    sharp = sharp_constants(setting)
    gap = setting.step_size * setting.strong_convexity
    if certificate.reference != "stationary":
        return f"another reference, {certificate.reference!r},"
    if not abs(certificate.lipschitz - sharp.lipschitz) <= _SIX_DIGITS * gap + 1e-12:
        return f"another Lipschitz constant, {certificate.lipschitz!r},"
    for name in ("noise_std", "lsi_constant"):
        if not _near(getattr(certificate, name), getattr(sharp, name)):
            return f"another {name}, {getattr(certificate, name)!r},"
    for order, rdp in zip(certificate.orders, certificate.initial_rdp, strict=True):
        if not _near(rdp, order * sharp.rdp_per_order):
            return f"another curve, {rdp!r} at order {order:g},"
    return None


_SETTING = (
    "num_instances", "num_deleted", "strong_convexity", "smoothness", "step_size",
    "langevin_sigma", "gradient_bound",
)  # fmt: skip
_ONE_OUTPUT = frozenset({"one_linear_output", "smooth_convex_loss", "capped_gradients"})
_UNCLIPPED = frozenset({"clip_never_binds", "bounded_gradients"})
_OUTPUTS = frozenset({"separate_linear_outputs", "smooth_convex_losses", "capped_outputs"})
_FULL_BATCH = frozenset({"full_batch", "decoupled_decay"})
_RULES = (
    _Rule(ContractionCertificate, _OUTPUTS | _FULL_BATCH, _full_batch, _FULL_BATCH),
    _Rule(ContractionCertificate, _UNCLIPPED | _FULL_BATCH, _unclipped, _FULL_BATCH),
    _Rule(ContractionCertificate, _ONE_OUTPUT | _FULL_BATCH, _full_batch),
    _Rule(
        ContractionCertificate, frozenset({"constant_divisor", "convex_retained"}), _known_batches
    ),
    _Rule(ContractionCertificate, frozenset({"noise_burst"}), _burst),
    _Rule(ContractionCertificate, frozenset({"requests_in_turn", "phase_steps"}), _in_turn),
    _Rule(PoissonContractionCertificate, _ONE_OUTPUT, _mini_batches),
    _Rule(PoissonContractionCertificate, _OUTPUTS, _mini_batches),
    _Rule(PoissonContractionCertificate, _UNCLIPPED, _unclipped),
    _Rule(LangevinCertificate, frozenset({"replaced_records", "full_batch_descent"}), _stationary),
)


def _slack(factor: float, *, step_size: float, decay: float, growth: float) -> float:
    """What a step's factor may be off, by the digits of what it comes from.

    The digits of ηλ are what counts, 1 − ηλ would hide them; or of η(λ + β), where it expands.
    """
    expands = 1.0 - factor < (1.0 - 1e-9) * step_size * decay
    return _SIX_DIGITS * step_size * (decay + (growth if expands else 0.0)) + 1e-12


def _square(value: float) -> float:
    return value * value


def _near(kept: Any, derived: float) -> bool:
    """Whether a constant is the derived one, up to the digits that a sentence shows."""
    return abs(kept - derived) <= _SIX_DIGITS * abs(derived) + 1e-300
