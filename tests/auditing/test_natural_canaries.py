"""Natural canaries: coins before training, scores by id, and no tight bound in a verdict."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil.auditing import Claim, Shadow, canary_split
from tests.auditing.runs import digits

CLAIM = Claim(((1.0, 1.0, 1),), delta=1e-5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some(count=200, size=1000, **options):
    data = TensorDataset(torch.arange(size).float()[:, None], torch.arange(size) % 10)
    return canary_split(data, count, seeded(), **options), data


def test_coins_are_fair_independent_of_the_choice_and_fixed_by_the_generator():
    split, data = some()
    included = np.array(list(split.included.values()))
    assert 60 < included.sum() < 140  # 200 fair coins: 5.6 standard deviations
    assert len(split.dataset) == len(data) - (~included).sum()
    assert some()[0].included == split.included
    assert split.again(seeded(1)).included != split.included
    assert split.again(seeded(1)).ids == split.ids


def test_the_training_set_is_everybody_but_the_canaries_that_are_out():
    split, _ = some()
    rows = {int(split.dataset[i][0]) for i in range(len(split.dataset))}
    out = {i for i, inside in split.included.items() if not inside}
    assert rows == set(range(1000)) - out


def test_a_mislabelled_canary_has_another_label_in_training_and_in_its_score():
    split, data = some(kind="mislabelled", classes=10)
    place = {int(split.dataset[i][0]): i for i in range(len(split.dataset))}
    seen = set()
    for number, row in enumerate(split.rows.tolist()):
        own, audited = int(data[row][1]), int(split.item(number)[1])
        assert audited != own
        seen.add((audited - own) % 10)
        if split.included[row]:
            assert int(split.dataset[place[row]][1]) == audited
    assert seen == set(range(1, 10))
    others = set(range(1000)) - set(split.rows.tolist())
    assert all(int(split.dataset[place[r]][1]) == int(data[r][1]) for r in others)


def test_loss_scores_are_minus_each_canarys_loss_by_id():
    split = canary_split(digits(), 50, seeded(), ids=[f"row {i}" for i in range(1797)])
    module = nn.Linear(64, 10)
    scores = split.loss_scores(module, criterion=nn.CrossEntropyLoss(), batch_size=16)
    assert list(scores) == list(split.ids)
    for number, name in enumerate(split.ids):
        x, y = split.item(number)
        loss = nn.functional.cross_entropy(module(x[None]), y[None])
        assert scores[name] == pytest.approx(-float(loss.detach()), rel=1e-5)
    own = split.loss_scores(
        module,
        loss_of=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"),
    )
    assert own == pytest.approx(scores, rel=1e-5)
    with pytest.raises(ValueError, match="criterion or loss_of, got both or none"):
        split.loss_scores(module)


def test_an_overfitted_model_exceeds_its_claim_and_only_valid_bounds_are_for_the_verdict():
    split = canary_split(digits(), 300, seeded(), kind="mislabelled", classes=10)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    batch = next(iter(DataLoader(split.dataset, batch_size=len(split.dataset))))
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
        optimizer.step()
    scores = split.loss_scores(module, criterion=nn.CrossEntropyLoss())
    found = split.bounds(scores, delta=1e-5, claim=Claim(((8.0, 1.0, 1),), delta=1e-5), guesses=200)
    assert [b.assumption for b in found.lower] == ["none", "none"]
    assert [b.assumption for b in found.shown] == ["assumes independence"] * 2
    assert all(b.for_verdict for b in found.lower)
    assert not any(b.for_verdict for b in found.shown)
    assert found.lower[0].epsilon > 1.0
    assert found.lower[1].p_value < 1e-6
    assert found.lower[0].null_share < 0.13


@pytest.mark.slow
def test_a_correct_mechanism_whose_canaries_share_a_coin_is_not_refuted():
    # With probability .38 everybody's answer is told at ε = 1.5; no more than 1-GDP allows, and
    # tests that take canaries as independent refute it each time.
    p = norm.cdf(0)
    refuted, tight, runs = 0, 0, 60
    for seed in range(runs):
        split, _ = some(count=300, size=400)
        random = np.random.default_rng(seed)
        told = 1 / (1 + np.exp(-1.5)) if random.random() < 0.35 else p
        right = random.random(300) < told
        coins = np.array(list(split.included.values()))
        scores = np.where(right, coins, ~coins) + 0.1 * random.random(300)
        found = split.bounds(
            dict(zip(split.ids, scores, strict=True)), delta=1e-5, claim=CLAIM, guesses=300,
            trained_at=split.thrown_at + 1,
        )  # fmt: skip
        refuted += found.lower[1].p_value < 0.05
        tight += found.shown[1].p_value < 0.05
    assert refuted <= 8  # 3 of 60 expected at most; 9 has probability 4e-3
    assert tight > 12


def test_likelihood_ratios_rank_by_shadow_models_of_the_same_configuration():
    split, _ = some(count=40)
    settings = {"noise_multiplier": 1.0, "steps": 10}
    random = np.random.default_rng(0)

    def margins(included):
        return {i: float(random.normal() + 3.0 * inside) for i, inside in included.items()}

    shadows = []
    for seed in range(8):
        again = split.again(seeded(seed + 1))
        shadows.append(Shadow(margins(again.included), again.included, settings))
    scores = split.likelihood_ratio_scores(
        margins(split.included), shadows=shadows, configuration=settings
    )
    inside = np.array([split.included[i] for i in split.ids])
    values = np.array([scores[i] for i in split.ids])
    assert (values[inside] > 0).mean() > 0.7
    assert (values[~inside] < 0).mean() > 0.7

    other = Shadow(shadows[0].margins, shadows[0].included, {**settings, "steps": 20})
    with pytest.raises(ValueError, match=r"shadow 1 with steps=20 against 10 .1 differ"):
        split.likelihood_ratio_scores(
            margins(split.included), shadows=[shadows[0], other], configuration=settings
        )
    missing = Shadow(shadows[0].margins, shadows[0].included, {"steps": 10})
    with pytest.raises(ValueError, match=r"noise_multiplier=None against 1.0"):
        split.likelihood_ratio_scores(
            margins(split.included), shadows=[missing], configuration=settings
        )
    with pytest.raises(ValueError, match="in at least one shadow model and out of another"):
        split.likelihood_ratio_scores(
            margins(split.included), shadows=shadows[:1], configuration=settings
        )


def test_coins_thrown_after_training_are_refused_with_the_cure():
    split, _ = some()
    scores = dict.fromkeys(split.ids, 0.0)
    with pytest.raises(ValueError, match=r"nobody has read.*train on split.dataset"):
        split.bounds(scores, delta=1e-5)
    with pytest.raises(ValueError, match="training that began 60 s earlier"):
        split.bounds(scores, delta=1e-5, trained_at=split.thrown_at - 60)
    _ = split.dataset[0]
    assert split.bounds(scores, delta=1e-5).lower[0].epsilon < 0.5


def test_scores_that_do_not_match_by_id_are_refused():
    split, _ = some()
    _ = split.dataset[0]
    scores = dict.fromkeys(split.ids, 0.0)
    scores.pop(split.ids[0])
    with pytest.raises(ValueError, match="1 ids without a score"):
        split.bounds(scores, delta=1e-5)
    with pytest.raises(ValueError, match="well below 1 / canaries"):
        split.bounds(dict.fromkeys(split.ids, 0.0), delta=0.01)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((2000, seeded()), {}, ValueError, "Expected count"),
        ((10, 0), {}, TypeError, "to be a torch.Generator"),
        ((10, seeded()), {"kind": "strange"}, ValueError, "natural, mislabelled"),
        ((10, seeded()), {"ids": ["a"]}, ValueError, "one distinct id for each of 1000 rows"),
        ((10, seeded()), {"kind": "mislabelled", "classes": 3}, ValueError, "labels up to"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(arguments, options, error, message):
    data = TensorDataset(torch.arange(1000).float(), torch.arange(1000) % 10)
    with pytest.raises(error, match=message):
        canary_split(data, *arguments, **options)


def test_items_without_a_label_cannot_be_mislabelled():
    with pytest.raises(ValueError, match=r"pairs .input, label."):
        canary_split(TensorDataset(torch.arange(9.0)), 3, seeded(), kind="mislabelled")
