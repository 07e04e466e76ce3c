"""What the queue keeps of a run: its certificate file, and plain values for its requests.

Knows results; not when they are written (`serving.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...certificates import write_certificate
from ...errors import CertificateError
from ..plan import CertifiedPlan
from ..result import CertifiedResult, UnlearningResult


def certified(done: CertifiedResult, path: Path) -> dict[str, Any]:
    """Write the certificate file of a run; return its name, or why there is none."""
    try:
        record = done.record()
    except CertificateError as error:
        return {"certificate_file": None, "no_certificate_file": str(error)}
    write_certificate(record, path=path, overwrite=True)
    return {"certificate_file": path.name}


def summary(done: UnlearningResult, *, adaptive: bool) -> dict[str, Any]:
    """Return what was run and what may be claimed, as plain values."""
    plan, epsilon = done.plan, done.epsilon
    proved = plan if isinstance(plan, CertifiedPlan) else None
    return {
        "status": plan.status,
        "method": plan.method,
        "steps": done.steps,
        "epsilon": epsilon if epsilon is not None and math.isfinite(epsilon) else None,
        "delta": proved.delta if proved else None,
        "certificate": type(proved.certificate).__name__ if proved else None,
        "adaptive": "covered: the bound is on everything that was ever released"
        if adaptive and proved
        else "not covered: requests are taken as chosen without a look at a model released before",
    }
