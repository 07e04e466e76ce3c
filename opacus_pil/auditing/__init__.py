"""What measurement can say about a claim: lower bounds on ε, and whether code does as accounted.

An audit never proves privacy. Bounds and verdicts load numpy and scipy only; what looks at a
training loads torch when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .canary_record import CanaryEvidence as CanaryEvidence
from .checked import ScriptCheck as ScriptCheck
from .checked import TrainingCheck as TrainingCheck
from .claim import Claim as Claim
from .comparison import Check as Check
from .conformance import Conformance as Conformance
from .conformance import conformance as conformance
from .error_test import step_bound as step_bound
from .error_test import total_variation_bound as total_variation_bound
from .error_test import wrong_guess_bound as wrong_guess_bound
from .guesses import Guesses as Guesses
from .lower_bound import ASSUMPTIONS as ASSUMPTIONS
from .lower_bound import LowerBound as LowerBound
from .one_run import GaussianTradeOff as GaussianTradeOff
from .one_run import mahloujifar_bound as mahloujifar_bound
from .one_run import one_run_lower_bound as one_run_lower_bound
from .one_run import steinke_bound as steinke_bound
from .pairs import PairedBounds as PairedBounds
from .pairs import paired_bounds as paired_bounds

if TYPE_CHECKING:
    from .gradient_canaries import GradientCanaries as GradientCanaries
    from .natural_canaries import CanaryBounds as CanaryBounds
    from .natural_canaries import CanarySplit as CanarySplit
    from .natural_canaries import Shadow as Shadow
    from .natural_canaries import canary_split as canary_split
    from .watching import assert_private as assert_private
    from .watching import watch as watch


def __getattr__(name: str) -> Any:
    value: Any
    if name in ("CanaryBounds", "CanarySplit", "Shadow", "canary_split"):
        from . import natural_canaries

        value = getattr(natural_canaries, name)
    elif name == "GradientCanaries":
        from .gradient_canaries import GradientCanaries as value
    elif name == "assert_private":
        from .watching import assert_private as value
    elif name == "watch":
        from .watching import watch as value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value
