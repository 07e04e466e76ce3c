"""What of Opacus and torch is listened to while a watch lasts, and how it is put back.

Functions are exchanged on their classes and call what was there before, whose results, errors and
random numbers are theirs. Knows no training and no measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opacus import PrivacyEngine
from opacus.accountants import GaussianAccountant, PRVAccountant
from opacus.optimizers import DPOptimizer

Patch = tuple[Any, str, Any, Any]  # owner, name, theirs, ours


@contextmanager
def listening(
    *,
    constructed: Callable[[Any], None],
    made: Callable[[Any, Any], None],
    without_step: Callable[[Exception], None],
    further: Sequence[Patch],
) -> Iterator[None]:
    """Listen to what Opacus makes and tells while the context lasts.

    Args:
        constructed: Called with each DPOptimizer.
        made: Called with an engine, and what its `make_private` returned.
        without_step: Called with what an accountant of Opacus raised for the ε of no steps.
        further: Other functions to exchange.
    """
    construct, make = DPOptimizer.__init__, PrivacyEngine.make_private

    def constructing(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        constructed(self)

    def making(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = make(self, *args, **kwargs)
        made(self, result)
        return result

    def telling(tell: Any) -> Any:
        def get_epsilon(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return tell(self, *args, **kwargs)
            except Exception as error:
                if not self.history:
                    without_step(error)
                raise

        return functools.wraps(tell)(get_epsilon)

    patches: list[Patch] = [
        (DPOptimizer, "__init__", construct, functools.wraps(construct)(constructing)),
        (PrivacyEngine, "make_private", make, functools.wraps(make)(making)),
        *(
            (kind, "get_epsilon", kind.get_epsilon, telling(kind.get_epsilon))
            for kind in (PRVAccountant, GaussianAccountant)
        ),
        *further,
    ]
    for owner, name, _, ours in patches:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, theirs, ours in patches:
            if getattr(owner, name) is ours:  # a script that patched it again keeps its own
                setattr(owner, name, theirs)
