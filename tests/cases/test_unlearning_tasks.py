"""C2, C10: what the training did is what unlearning does, or it is refused beforehand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, TensorDataset, default_collate

from opacus_pil import UnlearningEngine
from opacus_pil.certificates import NoisyFineTuningCertificate
from opacus_pil.errors import CertificateError, OpacusPilError, UnsupportedError
from opacus_pil.evaluation import calibrate, evaluate, evaluate_task, retrained_oracles
from opacus_pil.unlearning import CertifiedPlan
from opacus_pil.unlearning.twin import twin_of

from .unlearning_models import (
    DELTA,
    LANGEVIN,
    SIZE,
    classes,
    features,
    logistic,
    network,
    network_module,
    train,
    weights,
)

NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, 3.0)
METHODS = [
    {"steps": 3},
    {"steps": 3, "delta": DELTA},
    {"steps": 3, "method": "finetuning"},
    {"steps": 3, "method": "l1_sparse"},
    {"steps": 3, "method": "gradient_difference"},
    {"steps": 3, "delta": DELTA, "method": "noisy_finetuning", "certificate": NOISY},
    {"method": "retraining"},
]


# --- C2: batches that are no pairs ----------------------------------------------------------------


class Records(Dataset):
    """Items like those of a tokenized text data set."""

    def __init__(self, size=SIZE):
        torch.manual_seed(3)
        self.data = torch.randint(0, 20, (size, 6))
        self.labels = (self.data[:, 0] > 9).long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"input_ids": self.data[row], "labels": self.labels[row]}


class Output:
    """What a transformer answers with."""

    def __init__(self, logits):
        self.logits = logits


class Classifier(nn.Module):
    """Called by keyword, as models of texts are."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, input_ids, labels=None):
        return Output(self.last(self.words(input_ids).mean(dim=1)))


def of_records(module, batch):
    logits = module(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


class Sequences(Dataset):
    """Sequences of several lengths, and their classes."""

    def __init__(self, size=SIZE):
        draws = np.random.default_rng(1)
        self.data = [torch.tensor(draws.integers(1, 9, 2 + k % 4)) for k in range(size)]
        self.labels = torch.tensor([int(row[0]) % 2 for row in self.data])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        return self.data[row], self.labels[row]


def padded(items):
    return pad_sequence([s for s, _ in items], batch_first=True), torch.stack([c for _, c in items])


class OfSequences(nn.Module):
    """Reads padding as nothing."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        there = (tokens > 0).unsqueeze(2)
        return self.last((self.words(tokens) * there).sum(dim=1) / there.sum(dim=1).clamp(min=1))


def of_sequences(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


class Triples(Dataset):
    """Features, class and weight."""

    def __init__(self):
        torch.manual_seed(3)
        self.data = features()
        self.targets = (self.data[:, 0] > 0).long()
        self.labels = torch.linspace(0.5, 1.0, SIZE)

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        return self.data[row], self.targets[row], self.labels[row]


def of_triples(module, batch):
    x, y, weight = batch
    return weight * nn.functional.cross_entropy(module(x), y, reduction="none")


def scaled_by_ten(items):
    x, y = default_collate(items)
    return 10.0 * x, y


KINDS = {
    "records": (Records, Classifier, {"loss_of": of_records}),
    "padded": (Sequences, OfSequences, {"criterion": nn.CrossEntropyLoss(), "collate_fn": padded}),
    "padded, own loss": (Sequences, OfSequences, {"loss_of": of_sequences, "collate_fn": padded}),
    "triples": (Triples, network_module, {"loss_of": of_triples}),
    "scaled in the collate": (
        classes, network_module, {"criterion": nn.CrossEntropyLoss(), "collate_fn": scaled_by_ten}
    ),
}  # fmt: skip


def trained_on(kind, mode, **options):
    make_data, make_module, described = KINDS[kind]
    torch.manual_seed(0)
    dataset = make_data()
    trained = train(make_module(), dataset, mode=mode, **described, **options)
    trained.arguments["make_model"] = lambda: _fresh(make_module)
    return trained


def _fresh(make_module):
    module = make_module()
    return module, torch.optim.SGD(module.parameters(), lr=0.5)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_unlearning_trains_on_the_batches_that_were_trained_on(kind, mode):
    for goal in METHODS:
        trained = trained_on(kind, mode)
        unlearning = trained.unlearning()
        before = weights(unlearning.module)
        result = unlearning.unlearn(unlearning.plan([2], **goal), seed=1)
        assert unlearning.forgotten == {2}, goal
        assert not torch.equal(weights(result.module), before), goal
        assert isinstance(result.plan, CertifiedPlan) == ("delta" in goal), goal


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_is_that_of_a_loop_written_by_hand(kind):
    """Without noise and clipping one full batch of fine-tuning is plain descent."""
    trained = trained_on(kind, "hooks")
    described = KINDS[kind][2]
    unlearning = trained.unlearning()
    twin = twin_of(unlearning.module)
    rows = [row for row in range(SIZE) if row != 2]
    collate = described.get("collate_fn", default_collate)
    batch = collate([trained.dataset[row] for row in rows])
    loss_of = described.get("loss_of") or (
        lambda module, pair: described["criterion"](module(pair[0]), pair[1])
    )
    gradient = torch.autograd.grad(loss_of(twin, batch).mean(), list(twin.parameters()))
    expected = torch.cat([(p - 0.5 * g).reshape(-1).double() for p, g in zip(
        twin.parameters(), gradient, strict=True)])  # fmt: skip
    unlearning._state.batch_size = float(SIZE)
    result = unlearning.unlearn(unlearning.plan([2], steps=1, method="finetuning"))
    torch.testing.assert_close(weights(result.module), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", ["records", "padded"])
def test_sweeps_oracles_calibration_and_evaluation_do_too(kind, mode):
    trained = trained_on(kind, mode, policy="last_seen")
    make_module = KINDS[kind][1]
    norms = trained.engine.refresh_norms().norms
    assert norms.shape == (SIZE,)

    def oracles(forget):
        return retrained_oracles(
            lambda seed: _fresh(make_module), privacy_engine=trained.engine,
            dataset=trained.dataset, forget_set=forget, steps=3, seeds=[0], progress=False,
        )  # fmt: skip

    found = calibrate(
        trained.unlearning(), pilot_sets=[[0], [1, 2], [3], [4]], oracles=oracles, max_steps=2,
        tolerance=100.0, stay=1,
    )  # fmt: skip
    assert found.times == (0, 0, 0, 0)
    metrics = evaluate_task(trained.unlearning().module, trained.dataset, task=trained.engine.task)
    assert 0.0 <= metrics.accuracy <= 1.0
    assert metrics.loss > 0.0


def test_metrics_of_a_task_are_those_of_its_tensors():
    trained = network()
    module = trained.unlearning().module
    by_task = evaluate_task(module, trained.dataset, task=trained.engine.task, batch_size=5)
    by_tensors = evaluate(module, *trained.dataset.tensors, criterion=nn.CrossEntropyLoss())
    assert by_task.accuracy == by_tensors.accuracy
    assert by_task.loss == pytest.approx(by_tensors.loss, rel=1e-6)  # float32 sums


@pytest.mark.parametrize("kind", ["records", "triples"])
def test_batches_that_nobody_described_are_refused_before_anything_runs(kind):
    make_data, make_module, _ = KINDS[kind]
    torch.manual_seed(0)
    module = make_module()
    unlearning = UnlearningEngine(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), dataset=make_data(),
        criterion=nn.CrossEntropyLoss(), training_steps=3, batch_size=8, progress=False,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="loss_of="):
        unlearning.plan([0], steps=2, method="finetuning")


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_first_draw_that_is_empty_is_a_batch_like_the_others(kind, seed, caplog):
    trained = trained_on(kind, "hooks", batch_size=1, steps=2)
    trained.engine._trainings.kernels[:] = [replace(trained.engine.kernel, sample_rate=1e-6)]
    unlearning = trained.unlearning()
    unlearning.unlearn(unlearning.plan([2], steps=2), seed=seed)  # nobody is ever drawn
    assert unlearning.forgotten == {2}
    assert "First batch is empty" not in caplog.text


# --- C10: a loop that squeezes --------------------------------------------------------------------


def squeezed(policy="worst_case", *, loss=nn.BCEWithLogitsLoss, named=True, mode="hooks"):
    torch.manual_seed(0)
    x = features()
    dataset = TensorDataset(x, (x[:, 0] > 0).float())
    criterion = loss()

    def loss_of(module, batch):
        return type(criterion)(reduction="none")(module(batch[0]).squeeze(1), batch[1])

    def backward(step, wrapped, batch):
        criterion(wrapped(batch[0]).squeeze(1), batch[1]).backward()

    if not named:
        return train(nn.Linear(5, 1), dataset, loss_of=loss_of, policy=policy, mode=mode)
    trained = train(
        nn.Linear(5, 1), dataset, criterion=criterion, backward=backward, policy=policy,
        batch_size=SIZE,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=4.0, weight_decay=5e-3),
    )  # fmt: skip
    trained.arguments["feature_norm"] = 1.0
    return trained


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's, in the training's own probe
@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss, nn.MSELoss, nn.HuberLoss])
@pytest.mark.parametrize("goal", [LANGEVIN, METHODS[0], METHODS[1], METHODS[4]])
def test_labels_of_one_dimension_and_one_output_are_refused_by_the_plan(loss, goal):
    unlearning = squeezed(loss=loss).unlearning()
    with pytest.raises(OpacusPilError, match=r"loss_of|single rows|BCEWithLogitsLoss"):
        unlearning.plan([0], **goal)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_and_run_where_the_loop_is_described(mode):
    for goal in METHODS[:6]:
        unlearning = squeezed(named=False, mode=mode).unlearning()
        unlearning.unlearn(unlearning.plan([0], **goal), seed=1)


def test_ghost_clipping_of_a_column_of_losses_is_refused_by_the_plan():
    trained = squeezed(named=False, mode="ghost")
    x, y = trained.dataset.tensors
    trained.dataset = TensorDataset(x, y[:, None])
    unlearning = trained.unlearning(criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(UnsupportedError, match=r"shape \(2,\), got shape \(2, 1\)"):
        unlearning.plan([0], steps=2)


def test_another_loss_than_the_trainings_unlearns_but_is_not_counted_as_it():
    trained = logistic()
    other = trained.unlearning(
        criterion=None, loss_of=lambda m, b: nn.functional.softplus(m(b[0]))[:, 0]
    )
    with pytest.raises(CertificateError, match="BCEWithLogitsLoss"):
        other.plan([0], **LANGEVIN)
    joined = trained.unlearning(collate_fn=scaled_by_ten)
    with pytest.raises(CertificateError, match="training's own loss and collate_fn"):
        joined.plan([0], **LANGEVIN)
    other.unlearn(other.plan([0], steps=2), seed=1)


@pytest.mark.parametrize("again", [nn.BCEWithLogitsLoss(), None])
def test_the_trainings_loss_may_be_said_again(again):
    trained = logistic()
    changes = {} if again is None else {"criterion": again}
    assert trained.unlearning(**changes).plan([0], **LANGEVIN).steps > 0


def test_rows_that_depend_on_each_other_carry_no_certificate_of_noisy_fine_tuning():
    def contrasted(module, batch):
        logits = module(batch[0])
        own = nn.functional.cross_entropy(logits, batch[1], reduction="none")
        return own + logits.mean()

    unlearning = network(policy="last_seen").unlearning(criterion=None, loss_of=contrasted)
    with pytest.raises(CertificateError, match="mixes rows"):
        unlearning.plan([0], **METHODS[5])
    unlearning.plan([0], steps=2)


def test_a_rehearsal_leaves_no_trace():
    trained = network(module=network_module(nn.Dropout(0.5)))
    unlearning = trained.unlearning()
    before = unlearning.module.state_dict()
    modes = [part.training for part in unlearning.module.modules()]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 the generator that users seed
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    unlearning.plan([0], steps=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert modes == [part.training for part in unlearning.module.modules()]
    assert all(torch.equal(v, before[k]) for k, v in unlearning.module.state_dict().items())


class Shaken(nn.Module):
    """Random in evaluation mode too, as functional dropout is."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return nn.functional.dropout(self.last(x), 0.5)


def test_what_could_not_be_compared_is_named():
    trained = network(module=Shaken(), policy="last_seen")
    plan = trained.unlearning().plan([0], **METHODS[5])
    assert plan.certificate.context == ("rows_independent_not_checked",)


class Augmented(Dataset):
    """Adds its own noise to a row whenever it is asked for."""

    def __init__(self):
        torch.manual_seed(0)
        self.data, self.targets = classes().tensors

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        return self.data[row] + 1e-3 * torch.randn(5), self.targets[row]


def test_random_items_are_named_and_carry_no_contraction():
    plan = network(dataset=Augmented()).unlearning().plan([0], **METHODS[1])
    assert "augmentation_random" in plan.certificate.context
    trained = logistic()

    class Noisy(TensorDataset):
        def __getitem__(self, row):
            x, y = super().__getitem__(row)
            return x * torch.rand(()), y

    trained.dataset = Noisy(*trained.dataset.tensors)
    with pytest.raises(CertificateError, match="random ones"):
        trained.unlearning().plan([0], **LANGEVIN)


def test_rows_that_left_need_not_be_there_any_more():
    trained = logistic()
    inner = trained.dataset

    class Files(Dataset):
        gone = frozenset()

        def __len__(self):
            return SIZE

        def __getitem__(self, row):
            assert row not in self.gone
            return inner[row]

    trained.dataset = Files()
    unlearning = trained.unlearning()
    unlearning.unlearn(unlearning.plan([3], **LANGEVIN))
    Files.gone = frozenset({3})
    unlearning.unlearn(unlearning.plan([7], **LANGEVIN))
    assert unlearning.forgotten == {3, 7}
