"""Per-instance privacy losses and certified unlearning for Opacus.

The names below are loaded when first used, so that `import opacus_pil.accounting` needs no torch.
"""

from __future__ import annotations

import importlib
import logging
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
    from .files.ledger_table import LedgerTable as LedgerTable
    from .privacy_engine import PerInstancePrivacyEngine as PerInstancePrivacyEngine
    from .replaying.replay import replay as replay
    from .unlearning import UnlearningEngine as UnlearningEngine
    from .unlearning import UnlearningPlan as UnlearningPlan
    from .unlearning import UnlearningResult as UnlearningResult

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet unless it is asked for

_HOME = {
    "Audit": "auditing.audit_record",
    "BatchMemoryManager": "capture.memory",
    "CertificateError": "errors",
    "LedgerError": "errors",
    "LedgerTable": "files.ledger_table",
    "OpacusPilError": "errors",
    "UnsupportedError": "errors",
    "PerInstancePrivacyEngine": "privacy_engine",
    "UnlearningEngine": "unlearning",
    "UnlearningPlan": "unlearning",
    "UnlearningResult": "unlearning",
    "audit": "auditing.audit",
    "replay": "replaying.replay",
}

_ROOMS = ("accounting", "auditing", "certificates", "evaluation", "heads", "plots")

__all__ = [*_HOME, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
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
