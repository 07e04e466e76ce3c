"""An estimator in scikit-learn's manner whose rows can be forgotten with a certificate.

Needs scikit-learn, of the extra "sklearn"; nothing else in the package imports it from here.
"""

from .certified_classifier import CertifiedClassifier as CertifiedClassifier
from .forgotten import Forgotten as Forgotten

__all__ = ["CertifiedClassifier", "Forgotten"]
