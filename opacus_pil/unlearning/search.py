"""Searching for the fewest steps, with a sign of life: a bar that counts looks at a certificate.

Knows that a certificate's search asks for its ε again and again; not how many times it will.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ..certificates import BestCertificate, Certificate


@contextmanager
def searching(certificate: Certificate, *, progress: bool) -> Iterator[Certificate]:
    """Give a certificate that is the same but for a progress bar, which moves at each ε.

    Args:
        certificate: Left as it is; what it keeps of its computations is shared.
        progress: Show the bar when the output is a terminal; it goes when the search ends.
    """
    disable = None if progress else True
    with tqdm(desc="planning", unit=" ε", disable=disable, leave=False) as bar:
        yield _watched(certificate, bar)


def _watched(certificate: Certificate, bar: tqdm) -> Certificate:
    twin = copy.copy(certificate)
    if isinstance(certificate, BestCertificate):
        members = tuple(_watched(member, bar) for member in certificate.members)
        twin.__dict__["members"] = members
        return twin
    own = certificate.epsilon

    def epsilon(**goal: Any) -> float:
        found = own(**goal)
        bar.update()
        return found

    twin.__dict__["epsilon"] = epsilon  # in front of the method, for this twin alone
    return twin
