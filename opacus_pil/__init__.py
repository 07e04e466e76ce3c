"""Per-instance privacy losses and certified unlearning for Opacus.

The names below are loaded when first used, so that `import opacus_pil.accounting` needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing.audit import audit as audit
    from .auditing.audit_record import Audit as Audit
    from .capture.memory import BatchMemoryManager as BatchMemoryManager
    from .errors import CertificateError as CertificateError
    from .errors import LedgerError as LedgerError
    from .errors import OpacusPilError as OpacusPilError
    from .errors import UnsupportedError as UnsupportedError
    from .privacy_engine import PerInstancePrivacyEngine as PerInstancePrivacyEngine
    from .replaying.replay import replay as replay
    from .unlearning import UnlearningEngine as UnlearningEngine
    from .unlearning import UnlearningPlan as UnlearningPlan
    from .unlearning import UnlearningResult as UnlearningResult

__version__ = "0.1.0"

_HOME = {
    "Audit": "auditing.audit_record",
    "BatchMemoryManager": "capture.memory",
    "CertificateError": "errors",
    "LedgerError": "errors",
    "OpacusPilError": "errors",
    "UnsupportedError": "errors",
    "PerInstancePrivacyEngine": "privacy_engine",
    "UnlearningEngine": "unlearning",
    "UnlearningPlan": "unlearning",
    "UnlearningResult": "unlearning",
    "audit": "auditing.audit",
    "replay": "replaying.replay",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Opacus looks accountants up by name. Where Opacus is loaded already, "per_instance_rdp" is there
# from now on; otherwise from the first use of a name above.
if "opacus" in sys.modules:
    importlib.import_module(".training.worst_case_accountant", __name__)
