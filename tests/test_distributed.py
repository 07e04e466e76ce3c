"""Several processes train together: each keeps the account of its shard, and the shards join."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusBatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from opacus_pil import BatchMemoryManager, LedgerError, PerInstancePrivacyEngine
from opacus_pil.accounting import PerInstanceAccountant
from opacus_pil.heads import OneVsRestLoss
from tests import distributed_runs as runs
from tests.capture.models import convolutional, images
from tests.distributed_runs import BATCH, BOUND, DELTA, SETTINGS, SIZE, WORLD, Ranks

pytestmark = pytest.mark.slow  # starts processes that train together

CAPS = np.linspace(0.1, 1.0, SIZE)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def accountant(state):
    made = PerInstanceAccountant(
        len(state["instance_ids"]), orders=state["orders"].tolist(),
        levels=len(state["sensitivities"]), instance_ids=state["instance_ids"],
    )  # fmt: skip
    made.load_state_dict(state)
    return made


def replayed(
    outcomes, *, engine=(), size=SIZE, batch=BATCH, model=convolutional, **options
):  # fmt: skip
    """Train in one process on the batches that the ranks drew together."""
    data = images(size, dtype=torch.float64)
    torch.manual_seed(1)
    module = model(dtype=torch.float64)
    one = PerInstancePrivacyEngine(**{**SETTINGS, **dict(engine)})
    made = one.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        **{
            "noise_multiplier": 1.0, "max_grad_norm": BOUND, "criterion": nn.CrossEntropyLoss(),
            "noise_generator": torch.Generator().manual_seed(3),
            "data_loader": DataLoader(data, batch_size=batch), **options,
        },
    )  # fmt: skip
    wrapped, optimizer = made[:2]
    loss = made[2] if len(made) == 4 else options.get("criterion", nn.CrossEntropyLoss())
    for drawn in zip(*(found["steps"] for found in outcomes), strict=True):
        rows = [row for part in drawn for row in part]
        with one.batch(indices=np.array(rows, dtype=np.int64)):
            optimizer.zero_grad()
            inputs, targets = data[rows]
            loss(wrapped(inputs), targets).backward()
            optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()
    return one, weights


RUNS = {
    "last_seen": {},
    "ghost": {"grad_sample_mode": "ghost"},
    "per layer": {"clipping": "per_layer", "max_grad_norm": [3.0] * 6},
    "sum": {"loss_reduction": "sum", "criterion": nn.CrossEntropyLoss(reduction="sum")},
    "worst_case": {"engine": {"norm_policy": "worst_case"}},
    "refresh": {"engine": {"norm_policy": "refresh", "refresh_every": 3, "history": True}},
    "full": {"engine": {"norm_policy": "full"}},
    "capped": {"engine": {"norm_policy": "capped", "caps": CAPS}},
    "capped ghost": {
        "engine": {"norm_policy": "capped", "caps": CAPS}, "grad_sample_mode": "ghost",
    },
    "capped by output": {
        "engine": {"norm_policy": "capped", "caps": np.linspace(CAPS, CAPS[::-1], 4, axis=1)},
        "clipping": "per_layer", "max_grad_norm": [1.0, 2.0, 3.0, 4.0], "model": runs.one_vs_rest,
        "criterion": OneVsRestLoss(),
    },
    "budgets": {
        "engine": {"norm_policy": "capped", "budget": (np.linspace(0.5, 9.0, SIZE), DELTA)}
    },
    "few instances": {"size": 13, "batch": 1},  # most draws of a rank are empty
    "few instances ghost": {"size": 13, "batch": 1, "grad_sample_mode": "ghost"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_joined_ledger_is_that_of_one_process_on_the_same_draws(name, ranks):
    options = RUNS[name]
    outcomes = ranks.run(runs.training, **options)
    one, weights = replayed(outcomes, **options)
    size = options.get("size", SIZE)
    for found in outcomes:
        # float64: the ranks' sums are added in another order, over some twenty steps.
        np.testing.assert_allclose(found["weights"], weights, rtol=1e-9, atol=1e-12)
        assert np.array_equal(found["weights"], outcomes[0]["weights"])
        whole = accountant(found["all"])
        assert np.array_equal(whole.instance_ids, np.arange(size))
        # Norms differ by rounding only, far less than a level, and charges are sums of the same
        # table rows in the same order: equal bit for bit.
        assert np.array_equal(whole.rdp(), one.per_instance.rdp())
        assert np.array_equal(whole.spent_rdp(), one.per_instance.spent_rdp())
        assert whole.guarantee == one.per_instance.guarantee
        assert whole.steps == one.per_instance.steps == len(found["steps"])
        assert whole.unattributed_steps == 0
        assert found["epsilon"] == one.get_epsilon(DELTA)
        assert found["kernel"].world_size == WORLD
    if "history" in dict(options.get("engine", {})):
        members = np.array([0, 17, 40])
        assert np.array_equal(whole.group_rdp(members), one.per_instance.group_rdp(members))


def test_shards_are_disjoint_cover_everyone_and_stay_fixed(ranks):
    first, second = ranks.run(runs.training)
    assert len(first["shard"]) + len(second["shard"]) == SIZE
    assert not np.intersect1d(first["shard"], second["shard"]).size
    assert abs(len(first["shard"]) - len(second["shard"])) <= 1
    for found in (first, second):  # both epochs, whatever set_epoch was told
        assert {row for rows in found["steps"] for row in rows} <= set(found["shard"].tolist())
        assert len(found["ledger"]["level"]) == len(found["shard"])  # no state of other instances


def test_every_rank_makes_every_step_however_many_draws_are_empty(ranks):
    first, second = ranks.run(runs.training, size=13, batch=1)
    assert len(first["steps"]) == len(second["steps"]) == 2 * 13
    empty = [[not rows for rows in found["steps"]] for found in (first, second)]
    assert empty[0] != empty[1]  # Opacus's sampler would have left out other steps on each rank
    assert any(a and b for a, b in zip(*empty, strict=True))  # noise alone, and it was counted
    assert sum(run[2] for run in first["history"]) == 26


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_training_and_epsilon_are_opacus_own(mode, ranks):
    # 61 rows at 1/6: an empty draw on a rank has probability (5/6)^30 = 0.4 %, the seed is fixed.
    options = {"grad_sample_mode": mode, "epochs": 1}  # set_epoch(0): Opacus's shards too
    ours = ranks.run(runs.training, **options)
    theirs = ranks.run(runs.training, engine=None, **options)
    attached = ranks.run(runs.training, attach=True, **options)
    for one, two, three in zip(ours, theirs, attached, strict=True):
        assert one["steps"] == two["steps"] == three["steps"]
        assert np.array_equal(one["weights"], two["weights"])
        assert np.array_equal(three["weights"], two["weights"])
        assert one["epsilon"] == two["epsilon"] == three["epsilon"]
        assert np.array_equal(accountant(one["all"]).rdp(), accountant(three["all"]).rdp())


def test_batch_sizes_per_rank_of_a_distributed_sampler_give_the_global_rate(ranks):
    engine = {"norm_policy": "worst_case"}
    found = ranks.run(runs.training, batch=6, per_rank=True, epochs=1, engine=engine)
    rate = 1 / 6  # ceil(ceil(61 / 2) / 6) = 6 batches of a rank, each of its rows at 1/6
    truth = PerInstanceAccountant(1, levels=64, orders=[2.0, 8.0, 32.0])
    for _ in range(6):  # by the noise of the whole sum, which one rank adds
        truth.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=rate)
    for one in found:
        assert one["kernel"].sample_rate == rate
        assert one["kernel"].num_instances == SIZE
        assert one["history"] == [(1.0, rate, 6.0)]
        assert np.array_equal(accountant(one["all"]).rdp(), np.tile(truth.rdp(), (SIZE, 1)))


@pytest.mark.parametrize("manager", [BatchMemoryManager, OpacusBatchMemoryManager])
def test_physical_batches_are_charged_as_the_draws_they_are_parts_of(manager, ranks):
    whole = ranks.run(runs.training)
    parts = ranks.run(runs.training, physical=3, manager=manager)
    for one, two in zip(whole, parts, strict=True):
        assert [sorted(rows) for rows in one["steps"]] == [sorted(rows) for rows in two["steps"]]
        assert np.array_equal(accountant(one["all"]).rdp(), accountant(two["all"]).rdp())


def test_ranks_with_one_seed_throw_coins_of_their_own(ranks):
    apart = ranks.run(runs.warned)
    assert all(not any("same seed" in m for m in messages) for messages, _, _ in apart)
    alike = ranks.run(runs.warned, same_seed=True)
    assert all(any("same seed" in m for m in messages) for messages, _, _ in alike)
    for found in (apart, alike):  # positions within the shard: with one stream they were equal
        assert found[0][1] != found[1][1]


REFUSED = {
    "fixed batches": ({"poisson_sampling": False}, "UnsupportedError", "move instances"),
    "adaptive": (
        {"clipping": "adaptive", "unclipped_num_std": 5.0}, "UnsupportedError", "adaptive",
    ),
    "DDP": ({"kind": "DDP"}, "UnsupportedError", "DifferentiallyPrivateDistributedDataParallel"),
    "other noise": (
        {"noise_by_rank": (1.0, 0.5)}, "ValueError", "noise_multiplier, got 1.0 on rank 0 and 0.5",
    ),
    "caps of a shard": (
        {"engine": {"norm_policy": "capped", "caps": np.ones(30)}}, "ValueError", "caps",
    ),
    "budgets of a shard": (
        {"engine": {"norm_policy": "capped", "budget": (np.ones(30), DELTA)}}, "ValueError",
        "budget",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_sound_number_is_refused_on_every_rank(case, ranks):
    options, kind, message = REFUSED[case]
    for found in ranks.run(runs.refused, **{"kind": "DPDDP", **options}):
        assert found[0] == kind
        assert message in found[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [({"extra_steps": (0, 1)}, "number of steps, got 1"), ({"noise": (1.0, 2.0)}, "same steps")],
)
def test_ranks_that_counted_other_steps_do_not_join(options, why, ranks):
    for kind, message in ranks.run(runs.gathering, **options):
        assert kind == "LedgerError"
        assert why in message


def test_rows_that_one_rank_did_not_know_are_charged_there_and_the_shards_still_join(ranks):
    found = ranks.run(runs.one_rank_unattributed)
    for one in found:
        whole, own = accountant(one["all"]), accountant(one["ledger"])
        assert whole.unattributed_steps == 1
        # Joined against other sums: rounded up once more, by some ulps.
        np.testing.assert_allclose(whole.rdp(one["shard"]), own.rdp(), rtol=1e-11)
        assert (whole.rdp(one["shard"]) >= own.rdp() * (1 - 1e-15)).all()
    assert [accountant(one["ledger"]).unattributed_steps for one in found] == [0, 1]


def test_one_rank_may_gather_alone(ranks):
    (whole, own), (nothing, other) = ranks.run(runs.gathering, dst=0)
    assert (whole, nothing) == (SIZE, None)
    assert own + other == SIZE


def test_overlapping_shards_do_not_join():
    one = PerInstanceAccountant(3, instance_ids=[0, 1, 2])
    with pytest.raises(LedgerError, match=r"1 in common \(first: 2\)"):
        one.merge(PerInstanceAccountant(2, instance_ids=[2, 3]))


def test_rows_are_those_of_the_data_set_on_every_rank(ranks):
    one, _ = replayed([], engine={})
    truth = one.refresh_norms().norms
    for found, held, unattributed, message, kernel in ranks.run(runs.measured):
        np.testing.assert_allclose(found.norms, truth[found.indices], rtol=1e-9)  # float64
        assert (held >= np.minimum(truth[found.indices] / BOUND, 1.0) * (1 - 1e-9)).all()
        assert unattributed == 0
        assert "of other ranks" in message
        assert "in one process" in kernel


@pytest.mark.parametrize("stop", [3, 7])
def test_ranks_go_on_from_files_of_their_own_bit_for_bit(stop, ranks, tmp_path):
    for whole, resumed, message in ranks.run(
        runs.killed_and_resumed, folder=str(tmp_path), stop=stop
    ):
        assert np.array_equal(resumed["weights"], whole["weights"])
        assert resumed["history"] == whole["history"]
        assert np.array_equal(accountant(resumed["all"]).rdp(), accountant(whole["all"]).rdp())
        assert "each rank reads the file that it wrote" in message  # not the other rank's


SCRIPT = """
    import torch, warnings
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from opacus_pil import PerInstancePrivacyEngine as PrivacyEngine

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randint(0, 2, (40,)))
    model = DifferentiallyPrivateDistributedDataParallel(torch.nn.Linear(3, 2))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=8), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    ledger = engine.gather_per_instance(dst=0)
    if rank == 0:
        print(ledger.num_instances, ledger.steps, len(ledger.get_epsilon(1e-2).epsilon))
    torch.distributed.destroy_process_group()
"""


def test_it_runs_under_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["40", "5", "40"]
