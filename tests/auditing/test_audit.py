"""audit: what it puts together, when it raises a red flag, and what it refuses."""

import dataclasses
import inspect
import json
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from opacus_pil import UnlearningEngine, audit, replay
from opacus_pil.accounting.best_guess import best_guess
from opacus_pil.accounting.pld import tight_epsilon
from opacus_pil.auditing import Claim, Shadow, canary_split, watch
from opacus_pil.auditing.audit_page import page
from opacus_pil.auditing.membership_test import margin_of
from opacus_pil.cli import main
from opacus_pil.report.numbers import up
from tests.auditing.runs import (
    RATE,
    STEPS,
    described,
    digits,
    halves,
    make_model,
    private,
    train,
    weights_after,
)
from tests.report.runs import Page, certified, uncertified


@pytest.fixture(scope="module")
def ordinary():
    inside, outside = halves()
    return inside, outside, weights_after(inside)


@pytest.fixture(scope="module")
def found(ordinary):
    inside, outside, kept = ordinary
    return audit(**described(inside, kept, held_out=outside, split="random"))


def test_an_ordinary_training_has_upper_numbers_above_lower_ones(found, ordinary):
    inside, _, kept = ordinary
    claimed = tight_epsilon([(1.0, 1.0, RATE, STEPS)], delta=1e-5)
    assert found.claim.epsilon == claimed
    assert found.design.claimed_epsilon == Claim(
        ((1.0, RATE, STEPS),), delta=1e-5, neighbours="replace"
    ).epsilon  # fmt: skip
    assert all(bound.epsilon <= claimed <= found.worst_case_epsilon for bound in found.lower)
    assert found.verdict in ("consistent", "no power")
    account = replay(
        kept, module=make_model, dataset=inside, criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=RATE, steps=STEPS,
    )  # fmt: skip
    np.testing.assert_array_equal(found.upper.epsilon, account.get_epsilon(1e-5).epsilon)
    assert found.upper.guarantee == "estimate"


def test_the_most_exposed_carry_a_tight_epsilon_below_their_renyi_one(found):
    (most,) = found.exposed
    assert most.epsilon == found.upper.epsilon.max()
    assert 0.0 < most.tight_epsilon <= most.epsilon
    assert most.tied == (found.upper.epsilon == most.epsilon).sum()


def test_three_hundred_pairs_have_no_power_at_this_level_and_it_is_said(found):
    assert not found.design.powerful
    assert found.verdict == "no power"
    assert "300 pairs a training of twice the claimed" in found.reasons[0]


def test_members_that_are_remembered_by_heart_are_a_red_flag():
    inside, outside = halves(size=1600)
    data = TensorDataset(
        torch.stack([inside[i][0] for i in range(800)]),
        torch.randint(0, 10, (800,), generator=torch.Generator().manual_seed(1)),
    )  # labels at random: what is known of them was remembered
    other = TensorDataset(
        torch.stack([outside[i][0] for i in range(797)]),
        torch.randint(0, 10, (797,), generator=torch.Generator().manual_seed(2)),
    )

    def wide():
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    torch.manual_seed(0)
    module = wide()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(150):  # nothing private about it, whatever its ledger says
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    claims = {"noise_multiplier": 8.0, "sample_rate": 0.02, "max_grad_norm": 1.0}
    result = audit(
        **described(data, module.state_dict(), make_model=wide, held_out=other, split="random",
                    **claims)
    )  # fmt: skip
    assert result.verdict == "red flag"
    assert "membership is told better than the claim allows" in result.reasons[0]
    assert max(bound.epsilon for bound in result.lower) > result.design.claimed_epsilon
    assert result.attack.auc.low > 0.9


def test_coins_permuted_find_nothing(found):
    assert all(bound.null_share is None or bound.null_share <= 0.1 for bound in found.lower)


def test_without_rows_to_compare_with_nothing_can_be_concluded(ordinary):
    inside, _, kept = ordinary
    result = audit(**described(inside, kept))
    assert result.verdict == "no power"
    assert "neither held-out rows" in result.reasons[0]
    assert result.attack is None
    assert result.hashes["scores"] is None
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.slow
def test_what_was_watched_while_it_trained_is_part_of_the_audit():
    with watch(canaries=200, controls=32, seed=1) as seen:
        _, model, optimizer, criterion, loader = private(batch=150)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        train(model, optimizer, criterion, loader, steps=STEPS)
    options = described(
        digits(), {0: before, STEPS: model.state_dict()}, sample_rate=1 / len(loader)
    )
    result = audit(**options, watched=seen.result)
    assert result.verdict == "consistent"
    assert result.conformance["noise"].state == "agrees"
    with pytest.raises(ValueError, match="to be a check of this training"):
        audit(**{**options, "steps": STEPS + 1}, watched=seen.result)
    broken = dataclasses.replace(seen.result.trainings[0], verdict="red flag", reasons=("x",))
    assert audit(**options, watched=broken).verdict == "red flag"


def test_it_says_that_n_is_public_and_what_the_claim_is_about(found):
    notes = " ".join(found.notes)
    assert "int(N·q) = 30" in notes
    assert "one record added or removed" in notes
    assert "hyper-parameters" in notes


def test_json_keeps_single_records_to_itself_unless_asked(found, ordinary):
    plain = found.to_json()
    assert plain["format"] == "opacus_pil audit"
    assert plain["version"] == 1
    assert plain["records"] is None
    assert "id" not in plain["upper"]["most_exposed"][0]
    assert len(plain["hashes"]["model"]) == len(plain["hashes"]["scores"]) == 64
    inside, outside, kept = ordinary
    told = audit(
        **described(inside, kept, held_out=outside, split="random", per_record=True,
                    instance_ids=[f"p{i}" for i in range(300)])
    )  # fmt: skip
    np.testing.assert_array_equal(told.upper.epsilon, found.upper.epsilon)
    assert told.upper["p7"] == found.upper.epsilon[7]  # upper answers by the caller's ids
    assert told.upper.top(1).epsilon[0] == told.upper.epsilon.max() == told.exposed[0].epsilon
    assert told.upper.worst_case == told.worst_case_epsilon
    records = told.to_json()["records"]
    assert len(records) == 600
    assert sum(r["member"] for r in records) == 300
    assert told.hashes["model"] == found.hashes["model"]
    assert told.to_json()["upper"]["most_exposed"][0]["id"].startswith("p")


def test_the_documented_names_are_those_of_the_file(found):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    for name, value in found.to_json().items():
        assert f"`{name}`" in text
        if isinstance(value, dict) and name not in ("seconds",):
            missing = [key for key in value if f"`{key}`" not in text]
            assert not missing, (name, missing)


def test_the_first_screen_answers_three_questions(found):
    html = page(found)
    first = html[: html.index("<h2 ")]
    for question in ("Is the claimed ε true?", "Who is exposed?", "What can be shown?"):
        assert question in first
    assert "no power" in first
    assert "labelled estimate" in first
    assert "http" not in html.replace("http-equiv", "")
    assert 'id="rows"' not in html  # single records only where they were asked for
    assert "This file is private." in html


def test_what_may_be_shown_holds_claim_test_and_verdict_only(found, tmp_path):
    found.write_report(tmp_path / "p.html", results=[certified()], public=True)
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "Constants only." in page.text
    assert "The verdict is the one word that depends on the data." in page.text
    claimed = up(found.claim.epsilon)
    right = up(100 * best_guess(found.claim.epsilon, delta=found.claim.delta))
    assert f"ε = {claimed} at δ = " in page.text
    assert f"at most {right} % of all cases" in page.text
    assert found.verdict in page.text
    assert found.hashes["model"] in page.text
    upper = dataclasses.replace(found.upper, epsilon=0.37 * found.upper.epsilon)
    other = dataclasses.replace(found, upper=upper, exposed=(), lower=(), p_values=(), attack=None)
    other.write_report(tmp_path / "other.html", public=True)
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == html
    assert found.hashes["scores"] is None or found.hashes["scores"] not in html
    assert page.rows is None
    assert "svg" not in page.tags
    for words in ("Forgetting", "ε at least", "AUC", "most exposed"):
        assert words not in page.text.split("What each number means")[0]


def test_a_red_flag_states_no_epsilon_in_public(found, tmp_path):
    broken = dataclasses.replace(found, verdict="red flag")
    broken.write_report(tmp_path / "p.html", public=True)
    text = Page((tmp_path / "p.html").read_text(encoding="utf-8")).text
    assert "no ε is stated here" in text
    assert up(found.claim.epsilon) not in text


def test_what_was_forgotten_since_joins_the_page(found, tmp_path):
    found.write_report(tmp_path / "audit.html", results=[certified(), uncertified()])
    text = Page((tmp_path / "audit.html").read_text(encoding="utf-8")).text
    assert "Forgetting, request by request" in text
    assert text.index("certified") < text.index("none: nothing is certified")
    assert "Forgetting" not in Page(page(found)).text


def test_an_unlearning_engine_comes_with_the_audited_model(found):
    engine = found.unlearning_engine(
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1), training_steps=STEPS,
        batch_size=30,
    )  # fmt: skip
    assert isinstance(engine, UnlearningEngine)
    plan = engine.plan([found.exposed[0].row], steps=2, method="finetuning")
    assert plan is not None


class Records(torch.utils.data.Dataset):
    """The same rows as batches that are no pairs."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, row):
        inputs, target = self._rows[row]
        return {"pixels": inputs, "label": int(target)}


def test_a_loss_of_ones_own_gives_the_same_scores_and_bounds(found, ordinary):
    inside, outside, kept = ordinary

    def loss_of(module, batch):
        return nn.functional.cross_entropy(
            module(batch["pixels"]), batch["label"], reduction="none"
        )

    same = audit(
        **described(Records(inside), kept, held_out=Records(outside), split="random",
                    criterion=None, loss_of=loss_of)
    )  # fmt: skip
    assert same.lower == found.lower
    assert same.hashes == found.hashes
    np.testing.assert_array_equal(same.upper.epsilon, found.upper.epsilon)


def test_a_delta_that_may_reveal_every_pair_leaves_steinkes_bound_out(ordinary):
    inside, outside, kept = ordinary
    result = audit(**described(inside, kept, held_out=outside, split="random", delta=1 / 300))
    (bound,) = result.lower
    assert "Mahloujifar" in bound.method


# --- canaries thrown before ----------------------------------------------------------------------


def canary_run(seed=0):
    split = canary_split(
        Subset(digits(), range(500)), 200, torch.Generator().manual_seed(seed), kind="mislabelled"
    )
    return split, weights_after(split.dataset)


def test_canaries_thrown_before_training_need_no_held_out_rows():
    split, kept = canary_run()
    result = audit(**described(split.dataset, kept, canaries=split))
    assert result.design.kind == "canaries"
    assert result.design.units == 200
    assert result.design.claimed_epsilon == result.claim.epsilon  # one record added or removed
    assert {bound.assumption for bound in result.lower} == {"none"}
    assert {bound.assumption for bound in result.shown} == {"assumes independence"}


@pytest.mark.slow
def test_shadows_of_another_configuration_are_refused():
    split, kept = canary_run()
    scored = make_model()
    scored.load_state_dict({k.removeprefix("_module."): v for k, v in kept[STEPS].items()})
    margins = {
        i: margin_of(-s)
        for i, s in split.loss_scores(scored, criterion=nn.CrossEntropyLoss()).items()
    }
    same = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": RATE, "steps": STEPS}

    def noisy(values, seed):
        random = np.random.default_rng(seed)
        return {i: value + random.normal() for i, value in values.items()}

    both = [
        Shadow(noisy(margins, k), {i: (n + k) % 2 == 0 for n, i in enumerate(split.ids)}, same)
        for k in range(4)
    ]
    options = described(split.dataset, kept, canaries=split)
    result = audit(**options, shadows=both)
    assert result.attack.attack == "likelihood ratio against shadow models"
    other = [dataclasses.replace(both[0], configuration={**same, "noise_multiplier": 2.0}), *both]
    with pytest.raises(ValueError, match="Train shadows exactly alike"):
        audit(**options, shadows=other)
    fewer = [Shadow(dict(list(margins.items())[1:]), both[0].included, same), *both]
    with pytest.raises(ValueError, match="one score for every canary id"):
        audit(**options, shadows=fewer)


def test_margins_are_the_log_odds_of_the_label():
    for p in (1e-6, 0.3, 0.5, 0.999):
        assert margin_of(-np.log(p)) == pytest.approx(np.log(p / (1 - p)), rel=1e-9)


# --- what is refused ------------------------------------------------------------------------------


def test_designs_that_prove_nothing_are_refused_with_the_cure(ordinary):
    inside, outside, kept = ordinary
    for split in (None, "time"):
        with pytest.raises(ValueError, match="split by time, source or order proves nothing"):
            audit(**described(inside, kept, held_out=outside, split=split))
    late = canary_split(Subset(digits(), range(300)), 50, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="Coins thrown after training"):
        audit(**described(late.dataset, kept, canaries=late))
    with pytest.raises(ValueError, match="Coins thrown afterwards"):
        audit(**described(late.dataset, kept, canaries=late, trained_at=time.time() - 3600))
    with pytest.raises(ValueError, match="held_out or canaries"):
        audit(**described(inside, kept, held_out=outside, split="random", canaries=late))
    with pytest.raises(ValueError, match="canary_split"):
        audit(**described(inside, kept, shadows=[Shadow({}, {}, {})]))
    with pytest.raises(ValueError, match="another number of classes"):
        audit(
            **described(
                inside, kept, make_model=lambda: nn.Sequential(
                    nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))
            )
        )  # fmt: skip
    with pytest.raises(ValueError, match="sample_rate or batch_size"):
        audit(**described(inside, kept, sample_rate=None))
    with pytest.raises(ValueError, match="held-out rows drawn at random"):
        audit(
            **described(inside, kept, held_out=outside, split="random",
                        held_out_ids=range(300, 600))
        )  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_both_files_and_says_the_verdict(tmp_path, capsys, ordinary):
    _, _, kept = ordinary
    for at, weights in kept.items():
        torch.save(weights, tmp_path / f"{at}.pt")
    (tmp_path / "own.py").write_text(
        "from tests.auditing.test_audit import halves, make_model\n"
        "def inside(): return halves()[0]\n"
        "def outside(): return halves()[1]\n"
    )
    (tmp_path / "run.toml").write_text(
        'module = "own:make_model"\ndataset = "own:inside"\nheld_out = "own:outside"\n'
        'split = "random"\ncriterion = "torch.nn:CrossEntropyLoss"\n'
        f'checkpoints = {{0 = "0.pt", {STEPS} = "{STEPS}.pt"}}\n'
        f"noise_multiplier = 1.0\nmax_grad_norm = 1.0\nbatch_size = 30\nsteps = {STEPS}\n"
        "delta = 1e-5\n"
    )
    out = tmp_path / "audit"
    assert main(["audit", str(tmp_path / "run.toml"), "--out", str(out)]) == 3
    said = capsys.readouterr().out
    assert "NO POWER" in said
    assert "an audit never proves privacy" in said
    stored = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert stored["verdict"] == "no power"
    for file in out.iterdir():
        assert file.stat().st_mode & 0o077 == 0
    assert main(["audit", str(tmp_path / "run.toml"), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert "opacus-pil audit run.toml --out audit" in capsys.readouterr().out


def test_steps_before_the_first_checkpoint_are_charged_as_by_replay_and_it_is_said(ordinary):
    inside, _, kept = ordinary
    last = max(kept)
    found = audit(**described(inside, {last: kept[last]}))
    options = {k: v for k, v in described(inside, {last: kept[last]}).items()
               if k not in ("make_model", "delta", "exposed")}  # fmt: skip
    account = replay(module=make_model, **options)
    np.testing.assert_array_equal(found.upper.epsilon, account.get_epsilon(1e-5).epsilon)
    assert "before_first='worst_case'" in str(found)
    assert inspect.signature(audit).parameters["before_first"].default == (
        inspect.signature(replay).parameters["before_first"].default
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--delta", "2"], "Expected delta in (0, 1)"), (["--out", "a_file/deep/audit"], "a_file to")],
)
def test_the_command_refuses_before_code_is_run(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "it_would_run.py").write_text("def describe():\n    raise ZeroDivisionError\n")
    assert main(["audit", "it_would_run:describe", *options]) == 2
    assert says in capsys.readouterr().err
