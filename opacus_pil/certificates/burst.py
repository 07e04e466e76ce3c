"""More noise in the first unlearning step, which hides at once what later steps need not.

Knows certificates of contraction; which noise a target takes is asked by whoever plans.
"""

from __future__ import annotations

import dataclasses

from .. import _validate
from .assumptions import assumption
from .contraction import ContractionCertificate


def with_burst(certificate: ContractionCertificate, burst: float) -> ContractionCertificate:
    """Return the certificate of a run whose first unlearning step adds `burst` times the noise.

    Guarantee: that of ContractionCertificate. Of the noise of K steps without shifts only
        Σ c^(2(K−t))·ζ_t² counts wherever one chord is the hull: a noisier first step buys the same
        μ as noisier later ones, and the steps after it repair the model most.

    Args:
        certificate: With steps of unlearning all alike.
        burst: >= 1; 1 returns the certificate itself.

    Returns:
        The same training, and unlearning steps of which the first is noisier.

    Raises:
        ValueError: Below 1.

    Edge cases (first match wins):
        no unlearning step    the noise of training alone: nothing is added

    Source: the programme of ContractionCertificate with one ζ_t for each step.

    >>> plain = ContractionCertificate(0.9, 1.0, shifts=(1.0,))
    >>> with_burst(plain, 2.0).mu(1) < plain.mu(1)
    True
    """
    factor = _validate.real("burst", burst, low=1.0)
    if factor == 1.0:
        return certificate
    noise = certificate.unlearning_noise_std
    if noise is None:
        noise = certificate.noise_std  # type: ignore[assignment]
    assert isinstance(noise, float)  # a sequence needs one for unlearning
    found = dataclasses.replace(certificate, first_unlearning_noise_std=noise * factor)
    return found.with_context(assumption("noise_burst", burst=factor))
