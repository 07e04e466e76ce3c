"""Every number that a context of a head says is held against the constants that it gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opacus_pil.certificates import ContractionCertificate
from opacus_pil.certificates.derivation import context_numbers
from tests.certificates import records
from tests.certificates.records import failed, record_of
from tests.certificates.test_certificate_edits import (
    content_of,
    edited,
    places,
    read_back,
    with_edit,
)

MAKERS = {
    make.__name__: make
    for make in (
        records.one_output_glm, records.one_vs_rest_glm, records.one_vs_rest_poisson,
        records.unclipped_glm, records.unclipped_poisson,
    )
}  # fmt: skip


def edits(value):
    if isinstance(value, float):
        return [edited(value), 0.5 * value, 2.0 * value, 0.0, -value]
    return [edited(value), 0, 2 * value] if isinstance(value, int) else [edited(value)]


@pytest.mark.parametrize("name", MAKERS)
def test_an_edited_number_is_found_or_gives_the_same_constants(name):
    """Smoother losses on shorter features contract as ηλ says, up to a limit: true for both."""
    record = record_of(MAKERS[name](np.random.default_rng(5)))
    assert not failed(record)
    content = content_of(record)
    kept = set()
    for place in (p for p in places(content) if "context" in p):
        value = content
        for key in place:
            value = value[key]
        for other in edits(value):
            changed = with_edit(content, place)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = other
            read = read_back(json.loads(json.dumps(changed)))
            if read is not None and not failed(read):
                kept.add(place[-1])
                still_gives(read.certificate)
    free = {"feature_norm", "loss_smoothness", "num_instances", "steepness"}
    if "poisson" in name:
        free = {"feature_norm", "steepness"} if "unclipped" in name else set()
    assert kept <= free


def still_gives(certificate) -> None:
    """The formulas of the theory at the numbers that are said now."""
    n = context_numbers(certificate)
    assert n["feature_norm"] >= 0.0
    assert n["loss_smoothness"] >= 0.0
    if "steepness" in n:
        assert n["steepness"] >= 0.0
        assert n["max_grad_norm"] >= n["steepness"] * n["feature_norm"] * (1.0 - 1e-4)
    if isinstance(certificate, ContractionCertificate):
        beta = n["loss_smoothness"] * n["feature_norm"] ** 2
        beta *= n["num_instances"] / n["expected_batch_size"]
        eta, decay = n["step_size"], n["weight_decay"]
        factor = max(abs(1.0 - eta * decay), abs(1.0 - eta * (decay + beta)))
        assert factor <= certificate.contraction + 1e-4 * eta * decay
