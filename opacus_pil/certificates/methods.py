"""Which unlearning methods can be certified, in which words, and by which certificates.

Knows names and classes; what a method's steps do is not seen from a file.
"""

from __future__ import annotations

from .best import BestCertificate
from .certificate import Certificate
from .chien2024 import Chien2024Certificate
from .contraction import ContractionCertificate
from .data_processing import DataProcessingCertificate
from .langevin import LangevinCertificate
from .mini_batches import PoissonContractionCertificate
from .noisy_finetuning import NoisyFineTuningCertificate

# Noise-free fine-tuning has no certificate, and retraining needs none.
METHOD_WORDS = {
    "dp_sgd": "noisy steps of the training's own kind (DP-SGD)",
    "langevin": "noisy steps of the training's own kind (Langevin)",
    "noisy_finetuning": "the model clipped once, then clipped averaged gradients with noise",
}
CERTIFIED_METHODS = tuple(METHOD_WORDS)
# The model is changed before the first step, so also where no step was run.
CLIPS_FIRST = ("noisy_finetuning",)

_KERNEL = ("dp_sgd", "langevin")  # two names for the same steps
SPEAKS_OF: dict[type[Certificate], tuple[str, ...]] = {
    Chien2024Certificate: _KERNEL,
    ContractionCertificate: _KERNEL,
    DataProcessingCertificate: CERTIFIED_METHODS,  # of whatever follows training
    LangevinCertificate: _KERNEL,
    NoisyFineTuningCertificate: ("noisy_finetuning",),
    PoissonContractionCertificate: _KERNEL,
}


def members_of(certificate: Certificate) -> tuple[Certificate, ...]:
    """Return the certificates that a BestCertificate compares, or the certificate itself."""
    return certificate.members if isinstance(certificate, BestCertificate) else (certificate,)


def method_mismatch(certificate: Certificate, method: str) -> str | None:
    """Return why this certificate cannot speak of runs by `method`; None: nothing against it."""
    if method not in CERTIFIED_METHODS:
        known = ", ".join(CERTIFIED_METHODS)
        return f"method {method!r}, which is none that can be certified ({known})"
    for member in members_of(certificate):
        if method not in SPEAKS_OF.get(type(member), ()):
            return f"method {method!r} with a {type(member).__name__}"
    return None
