"""watch: trainings that know nothing of it, right and with one thing wrong each."""

import copy

import opacus.optimizers.optimizer as opacus_optimizer
import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import GaussianAccountant, PRVAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.auditing import assert_private, watch
from tests.auditing.runs import (
    DividesByTheBatch,
    HalfNoise,
    NoClip,
    NoNoise,
    Twice,
    digits,
    exchanged,
    private,
    train,
    weights,
)

FEW = {"canaries": 60, "controls": 64, "seed": 1}  # conformance needs none of them


def watched(fault=None, *, steps=24, each=None, **settings):
    """Train under watch; `fault(optimizer)` may change the optimizer as a script would."""
    with watch(**FEW) as audit:
        engine, model, optimizer, criterion, loader = private(**settings)
        optimizer = optimizer if fault is None else fault(optimizer) or optimizer
        train(model, optimizer, criterion, loader, steps=steps, each=each or (lambda: None))
    return audit.result, model, engine


def names(result):
    return [check.name for t in result.trainings for check in t.conformance.violations]


@pytest.mark.parametrize(
    "settings",
    [{}, {"clipping": "per_layer"}, {"mode": "functorch"}, {"mode": "ew"}, {"mode": "ghost"}],
    ids=lambda s: "-".join(s.values()) or "hooks",
)
def test_a_correct_training_is_consistent_and_keeps_every_bit(settings):
    _, model, _, criterion, loader = made = private(**settings)
    train(model, made[2], criterion, loader, steps=12)
    result, again, _ = watched(steps=12, **settings)
    assert result.verdict == "consistent", str(result)
    assert (weights(model) - weights(again)).abs().max() == 0.0
    (training,) = result.trainings
    assert training.claim == ((1.0, 1 / 12, 12),)
    measured = {c.name for c in training.conformance.checks if c.state == "agrees"}
    assert {"noise", "noise_per_tensor", "noise_over_steps", "clip", "divisor", "rate", "rows",
            "batch_sizes", "steps", "all_noised", "after_noise"} <= measured  # fmt: skip
    if settings.get("mode") == "ghost":
        assert "ghost clipping" in training.why_no_canaries
        assert "only this inequality" in training.conformance["clip"].reason
    else:
        assert training.evidence.steps == 12


def reseeds():
    torch.manual_seed(0)


def twice_the_steps(optimizer):
    hook, count = optimizer.step_hook, [0]

    def every_second(inner):
        count[0] += 1
        if count[0] % 2:
            hook(inner)

    optimizer.attach_step_hook(every_second)


def one_layer(optimizer):
    def add_noise(self):
        DPOptimizer.add_noise(self)
        for p in self.params[1:]:
            p.grad = p.summed_grad.view_as(p).clone()

    return exchanged(optimizer, type("OneLayer", (DPOptimizer,), {"add_noise": add_noise}))


def clips_the_average(optimizer):
    def clip(self):
        for p, g in zip(self.params, self.grad_samples, strict=True):
            p.summed_grad = g.mean(dim=0)
        total = torch.stack([p.summed_grad.norm() for p in self.params]).norm()
        for p in self.params:
            p.summed_grad *= self.expected_batch_size * min(1.0, 1.0 / float(total))

    return exchanged(optimizer, type("Average", (DPOptimizer,), {"clip_and_accumulate": clip}))


@pytest.mark.parametrize(
    ("fault", "reason", "others"),
    [
        (lambda o: exchanged(o, NoNoise), "noise", {"noise_per_tensor"}),
        (lambda o: exchanged(o, HalfNoise), "noise", {"noise_per_tensor"}),
        (one_layer, "noise_per_tensor", {"noise"}),
        (lambda o: exchanged(o, NoClip), "clip", {"gradient"}),
        (clips_the_average, "clip", {"gradient"}),
        (twice_the_steps, "steps", set()),
        (lambda o: exchanged(o, DividesByTheBatch), "divisor", set()),
        (lambda o: exchanged(o, Twice), "gradient", {"after_noise"}),
    ],
    ids=["no noise", "half noise", "one layer", "no clip", "clips the average", "twice the steps",
         "divides by the batch", "gradient twice"],
)  # fmt: skip
def test_a_fault_is_a_red_flag_for_the_right_reason(fault, reason, others):
    result, _, _ = watched(fault, steps=36)
    assert result.verdict == "red flag"
    assert reason in names(result)
    canaries = {"canary_hits", "canary_noise", "canary_membership", "canary_steps"}
    assert set(names(result)) <= {reason} | others | canaries


@pytest.mark.slow
def test_noise_that_begins_anew_at_every_step():
    noise = torch.Generator()
    result, _, _ = watched(each=lambda: noise.manual_seed(3), noise_generator=noise)
    assert names(result) == ["noise_over_steps"]
    result, _, _ = watched(each=reseeds)  # torch's own stream, which the sampler draws from too
    assert {"noise_over_steps", "rows"} <= set(names(result))


def test_a_loader_at_twice_the_rate_that_the_engine_did_not_make():
    with watch(**FEW) as audit:
        _, model, optimizer, criterion, loader = private()
        own = DPDataLoader(digits(), sample_rate=2 * loader.sample_rate)
        train(model, optimizer, criterion, own)
    assert names(audit.result) == ["loader", "rate"]
    assert audit.verdict == "red flag"


def test_shuffled_batches_accounted_as_poisson_draws():
    result, _, _ = watched(steps=24, poisson_sampling=False)
    assert names(result) == ["batch_sizes"]


def test_a_ledger_whose_hook_was_replaced_counts_nothing():
    result, _, engine = watched(lambda o: o.attach_step_hook(lambda _: None), steps=6)
    assert engine.accountant.history == []
    assert result.trainings[0].epsilon == 0.0
    assert "weights moved 6 times, the ledger counts 0" in str(result)
    assert result.verdict == "red flag"


def test_a_ledger_that_says_infinity_is_no_claim():
    result, _, _ = watched(steps=4, noise=0.0)
    assert result.verdict == "red flag"
    assert "the ledger itself says ε = inf" in result.reasons[0]


def test_an_optimizer_built_by_hand_around_the_same_plain_one_inherits_what_belongs_to_it():
    def by_hand(optimizer):
        own = HalfNoise(
            optimizer.original_optimizer, noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=optimizer.expected_batch_size,
        )  # fmt: skip
        own.attach_step_hook(optimizer.step_hook)
        return own

    result, _, _ = watched(by_hand)
    assert len(result.trainings) == 1
    assert {"noise", "noise_per_tensor"} <= set(names(result))
    assert result.trainings[0].conformance["rate"].state == "agrees"
    assert "0.weight" in str(result)


def test_nobody_counts_an_optimizer_without_an_accountant():
    with watch(**FEW) as audit:
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = DPOptimizer(
            torch.optim.SGD([parameter], lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=1,
        )  # fmt: skip
        parameter.grad_sample = torch.ones(2, 2)
        optimizer.step()
    assert audit.verdict == "red flag"
    assert "no accountant counts the steps" in audit.result.reasons[0]


def test_a_parameter_that_moves_without_noise_is_named():
    with watch(**FEW) as audit:
        _, model, optimizer, criterion, loader = private()
        head = nn.Parameter(torch.zeros(10))
        optimizer.original_optimizer.add_param_group({"params": [head.requires_grad_(False)]})
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            head.grad = torch.ones(10)
            optimizer.step()
            break
    assert "all_noised" in names(audit.result)


def test_a_step_of_the_plain_optimizer_alone_has_no_noise():
    with watch(**FEW) as audit:
        _, model, optimizer, criterion, loader = private()
        train(model, optimizer, criterion, loader, steps=8)
        inputs, targets = next(iter(loader))
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.original_optimizer.step()
    found = set(names(audit.result))
    assert {"all_noised", "steps"} <= found


def test_opacus_functions_that_a_script_patches_are_watched_as_patched(monkeypatch):
    monkeypatch.setattr(
        opacus_optimizer, "_generate_noise", lambda std, reference, **_: torch.zeros_like(reference)
    )
    result, _, _ = watched(steps=10)
    training = result.trainings[0]
    assert "no noise at all" in training.conformance["noise"].reason
    assert training.evidence.noise_ratio == 0.0


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_training_with_draws_of_nobody_is_measured(mode):
    result, _, _ = watched(steps=120, batch=1, mode=mode, noise=2.0)  # 1/e of them are empty
    (training,) = result.trainings
    measured = {c.name for c in training.conformance.checks if c.state == "agrees"}
    assert {"noise", "clip", "rate", "batch_sizes", "steps", "loader"} <= measured, str(result)
    assert result.verdict == "consistent", str(result)


def test_physical_batches_make_one_step():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    with watch(**FEW) as audit:
        _, model, optimizer, criterion, loader = private()
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=40, optimizer=optimizer
        ) as split:
            for _ in range(2):
                for inputs, targets in split:
                    optimizer.zero_grad()
                    criterion(model(inputs), targets).backward()
                    optimizer.step()
    assert audit.verdict == "consistent", str(audit)
    assert audit.result.trainings[0].claim == ((1.0, 1 / 12, 24),)


def test_our_own_engine_is_watched_like_opacus():
    def run():
        engine = PerInstancePrivacyEngine(accountant="rdp")
        _, model, optimizer, criterion, loader = private(engine=engine)
        train(model, optimizer, criterion, loader, steps=12)
        return engine, model

    alone, plain = run()
    with watch(**FEW) as audit:
        engine, model = run()
    assert audit.verdict == "consistent", str(audit)
    assert audit.result.trainings[0].evidence.steps == 12
    assert (weights(plain) - weights(model)).abs().max() == 0.0
    before, after = (e.get_per_instance_epsilon(1e-5) for e in (alone, engine))
    assert (before.epsilon == after.epsilon).all()
    assert before.guarantee == after.guarantee


def test_caps_of_our_own_engine_are_not_taken_for_a_broken_clip():
    with watch(**FEW) as audit:
        engine = PerInstancePrivacyEngine(
            accountant="rdp", norm_policy="capped", caps=[0.5] * len(digits())
        )
        _, model, optimizer, criterion, loader = private(engine=engine)
        train(model, optimizer, criterion, loader, steps=12)
    assert "cap of its own" in audit.result.trainings[0].conformance["clip"].reason
    assert audit.verdict != "red flag"


@pytest.mark.slow
def test_two_trainings_share_the_level_and_are_judged_each():
    with watch(**FEW) as audit:
        for seed, kind in ((0, None), (1, HalfNoise)):
            _, model, optimizer, criterion, loader = private(seed=seed)
            if kind is not None:
                exchanged(optimizer, kind)
            train(model, optimizer, criterion, loader, steps=12)
    assert [t.verdict for t in audit.result.trainings] == ["consistent", "red flag"]
    assert audit.verdict == "red flag"
    assert audit.result.trainings[0].conformance.level == pytest.approx(0.0005)


def test_a_text_classifier_in_ghost_mode_conforms():
    tokens = torch.randint(0, 50, (300, 12), generator=torch.Generator().manual_seed(0))
    labels = (tokens[:, 0] > 25).long()

    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(50, 8), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
        )

    with watch(**FEW) as audit:
        engine, net = PrivacyEngine(), model()
        net, optimizer, criterion, loader = engine.make_private(
            module=net, optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(tokens, labels), batch_size=30),
            noise_multiplier=0.8, max_grad_norm=0.1, grad_sample_mode="ghost",
            criterion=nn.CrossEntropyLoss(),
        )  # fmt: skip
        train(net, optimizer, criterion, loader, steps=20)
    assert audit.verdict == "consistent", str(audit)
    assert audit.result.trainings[0].conformance["noise"].state == "agrees"


def test_opacus_and_torch_are_as_they_were_afterwards_also_after_an_error():
    def patched():
        return (
            DPOptimizer.__init__, PrivacyEngine.make_private, PRVAccountant.get_epsilon,
            GaussianAccountant.get_epsilon, UniformWithReplacementSampler.__iter__,
            BatchSampler.__iter__, _BaseDataLoaderIter.__next__, _BaseDataLoaderIter._next_index,
        )  # fmt: skip

    before = patched()
    seen = []

    def script():
        with watch(**FEW) as audit:
            seen.extend([audit, private()[2], patched()])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script()
    audit, optimizer, during = seen
    assert not any(one is other for one, other in zip(before, during, strict=True))
    assert before == patched()
    assert not {"pre_step", "add_noise", "scale_grad"} & set(optimizer.__dict__)
    with pytest.raises(RuntimeError, match="Ask after the with block"):
        _ = audit.verdict


def test_a_step_that_fails_on_canary_rows_does_not_stop_the_training():
    result, _, _ = watched(clips_the_average, steps=6)  # divides by zero where no canary is drawn
    training = result.trainings[0]
    if training.evidence is None:
        assert "fails on canary rows (ZeroDivisionError" in training.why_no_canaries
    assert "clip" in names(result)


def test_measuring_that_fails_is_said_and_is_no_power(monkeypatch):
    from opacus_pil.auditing.step_meter import StepMeter

    def fails(*_, **__):
        raise ZeroDivisionError("a test")

    monkeypatch.setattr(StepMeter, "_settle", fails)
    with watch(canaries=0) as audit:
        _, model, optimizer, criterion, loader = private()
        train(model, optimizer, criterion, loader, steps=3)
    assert audit.verdict == "no power"
    assert "measuring failed (ZeroDivisionError: a test)" in str(audit)


def test_nothing_private_is_no_power_and_fails_a_unit_test():
    with watch(**FEW) as audit:
        copy.copy(1)
    assert audit.verdict == "no power"
    assert "made no private optimizer" in str(audit)
    with pytest.raises(AssertionError, match="made no private optimizer"):
        assert_private(lambda: None)
    with watch(**FEW) as audit:
        private()
    assert "no private optimizer made a step: nothing to audit" in str(audit)


@pytest.mark.parametrize("accountant", ["prv", "gdp"])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # of no steps
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")  # Opacus's
def test_an_epsilon_of_no_steps_is_a_verdict_and_no_error_from_inside_opacus(accountant):
    def asks(engine, *_):
        return engine.get_epsilon(1e-5)

    def wrong_optimizer(engine, model, optimizer, criterion, loader):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.original_optimizer.step()
        engine.get_epsilon(1e-5)

    with pytest.raises((ValueError, IndexError)):  # if Opacus mends it, all of this may go
        asks(*private(engine=PrivacyEngine(accountant=accountant)))
    with watch(**FEW) as audit:
        asks(*private(engine=PrivacyEngine(accountant=accountant)))
    assert audit.verdict == "no power"
    assert audit.result.reasons[0] == "no private optimizer made a step: nothing to audit"
    assert "asked for the ε of a ledger without a step" in str(audit)
    with watch(**FEW) as audit:
        wrong_optimizer(*private(engine=PrivacyEngine(accountant=accountant)))
    assert audit.verdict == "red flag"
    assert "weights moved 12 times, the ledger counts 0" in str(audit)
    assert "asked for the ε of a ledger without a step" in str(audit)
    with pytest.raises(AssertionError, match="nothing to audit"):
        assert_private(lambda: asks(*private(engine=PrivacyEngine(accountant=accountant))))


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # of no steps
def test_other_errors_and_those_that_a_script_catches_are_as_without_watch():
    def none_yet(engine):
        try:
            engine.get_epsilon(1e-5)
        except ValueError:
            return True
        return False

    with watch(**FEW) as audit:  # caught: the training goes on, and nothing is said of it
        engine, model, optimizer, criterion, loader = private(engine=PrivacyEngine())
        assert none_yet(engine)
        train(model, optimizer, criterion, loader)
        assert engine.get_epsilon(1e-5) > 0
    assert audit.verdict == "consistent", str(audit)
    assert audit.result.notes == ()

    def another_error():
        with watch(**FEW):
            assert none_yet(private(engine=PrivacyEngine())[0])
            raise ValueError("of the script")

    with pytest.raises(ValueError, match="of the script"):
        another_error()

    def right_but_for_the_end():
        with watch(**FEW):
            train(*private()[1:])
            private(engine=PrivacyEngine())[0].get_epsilon(1e-5)

    with pytest.raises(ValueError, match="NaN"):  # "consistent" must not hide that a script failed
        right_but_for_the_end()


@pytest.mark.slow
def test_assert_private_passes_a_correct_training_and_fails_a_broken_one():
    def run(fault=None):
        _, model, optimizer, criterion, loader = private()
        if fault is not None:
            exchanged(optimizer, fault)
        train(model, optimizer, criterion, loader, steps=10)

    assert assert_private(run, canaries=60, seed=0).verdict == "consistent"
    with pytest.raises(AssertionError, match=r"0\.5\d* of the accounted noise"):
        assert_private(lambda: run(HalfNoise), canaries=60, seed=0)


def test_a_short_training_says_that_it_cannot_tell():
    result, _, _ = watched(steps=1)
    training = result.trainings[0]
    assert not training.evidence.powerful
    assert training.conformance["noise_over_steps"].state == "not measurable"


def test_the_result_is_plain_json():
    import json

    result, _, _ = watched(steps=4)
    found = json.loads(json.dumps(result.to_json()))
    assert found["verdict"] == result.verdict
    assert found["trainings"][0]["conformance"]["checks"][0]["name"] == "noise"
    assert found["seconds"]["script"] > 0
