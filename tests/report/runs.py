"""A small training, and everybody's ε without one, for the tests of pages."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.certificates import ContractionCertificate
from opacus_pil.exposure import PerInstanceEpsilon
from opacus_pil.unlearning.plan import CertifiedPlan, PredictedPlan, RetrainPlan
from opacus_pil.unlearning.result import CertifiedResult, RetrainedResult, UncertifiedResult

HOSTILE = "</script><script>document.title='x'</script><img src=x onerror=x> {{ 7 * 7 }} &amp;"
DELTA = 1e-3


def trained(*, ids=None, policy="last_seen", epochs=3, rows=60, poisson=True, twice=False):
    """An engine after a small training, and data of the same kind that it did not see."""
    torch.manual_seed(0)
    x = torch.randn(2 * rows, 3) * torch.linspace(0.01, 3.0, 2 * rows)[:, None]
    data = TensorDataset(x, (x[:, :1] > 0).float())
    engine = PerInstancePrivacyEngine(norm_policy=policy, instance_ids=ids)
    criterion = torch.nn.BCEWithLogitsLoss()
    module = torch.nn.Linear(3, 1)
    seen = TensorDataset(*(t[::2] for t in data.tensors))
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(seen, batch_size=20), noise_multiplier=1.0, max_grad_norm=0.5,
        criterion=criterion, poisson_sampling=poisson,
    )  # fmt: skip
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(module(inputs), targets).backward()
            optimizer.step()
            if twice:
                optimizer.zero_grad()
                criterion(module(inputs), targets).backward()
                optimizer.step()
    return engine, TensorDataset(*(t[1::2] for t in data.tensors))


def everyone(size, *, seed=0, worst_case=6.0, ids=None, **changes):
    """Everybody's ε, invented: many values, ties at the top."""
    generator = np.random.default_rng(seed)
    epsilon = np.minimum(generator.gamma(2.0, 0.8, size), worst_case)
    names = np.array([f"patient-{i:06d}" for i in range(size)]) if ids is None else np.array(ids)
    fields = {
        "instance_ids": names, "worst_case": worst_case, "norms": generator.gamma(2.0, 2.0, size),
        **changes,
    }  # fmt: skip
    return PerInstanceEpsilon(epsilon, np.full(size, 8.0), 1e-5, "estimate", ("why",), **fields)


CERTIFICATE = ContractionCertificate(0.93, 0.5, shifts=(0.4,) * 30)
COMMON = {
    "forget_set": np.array([3, 5]), "steps": 12, "steps_retrain": 300, "batch_size": 20.0,
    "reason": "why so many", "ids": ("ann", HOSTILE), "reasons": ("taken for granted",),
}  # fmt: skip


def certified() -> CertifiedResult:
    epsilon = CERTIFICATE.epsilon(delta=1e-3, steps=12)
    plan = CertifiedPlan(
        **COMMON, method="dp_sgd", epsilon=epsilon, target_epsilon=epsilon * 1.2, delta=1e-3,
        certificate=CERTIFICATE, steps_worst_case=40,
    )  # fmt: skip
    return CertifiedResult(
        module=torch.nn.Linear(1, 1), plan=plan, steps=12, history=(), model_before="b" * 64,
        model_after="a" * 64,
    )  # fmt: skip


def uncertified() -> UncertifiedResult:
    plan = PredictedPlan(**COMMON, method="finetuning", interval=(5.0, 20.0))
    return UncertifiedResult(module=torch.nn.Linear(1, 1), plan=plan, steps=12, history=())


def retrained() -> RetrainedResult:
    plan = RetrainPlan(**{**COMMON, "steps": 300}, method="retraining")
    return RetrainedResult(module=torch.nn.Linear(1, 1), plan=plan, steps=300, history=())


class Page(html.parser.HTMLParser):
    """Tags, text and the table's data of a page; every tag is closed in order."""

    VOID = frozenset({"meta", "img", "input", "line", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        found = re.search(
            r'<script type="application/json" id="rows">(.*?)</script>', text, flags=re.DOTALL
        )
        self.rows = None if found is None else json.loads(found[1])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
