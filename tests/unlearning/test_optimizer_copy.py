"""A copy steps as if it had never stepped, and knows nothing of the one it was made from."""

import copy
import functools
import gc
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from opacus_pil.errors import UnsupportedError
from opacus_pil.unlearning.optimizer_copy import fresh_optimizer
from opacus_pil.unlearning.twin import plain_module
from opacus_pil.unlearning.twin import twin_of as out_of_the_wrapper

from .runs import network_run

EVERY = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
# Settings under which most of what a class can do is switched on.
SETTINGS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"weight_decay": 0.03},
    "Adagrad": {"initial_accumulator_value": 0.25, "lr_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "LBFGS": {"lr": 0.3, "history_size": 3, "max_iter": 4},
    "NAdam": {"decoupled_weight_decay": True, "weight_decay": 0.01},
    "Adafactor": {"weight_decay": 0.01},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)  # matrices only: Muon takes nothing else
        self.second = nn.Linear(4, 2, bias=False)
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.offset


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def steps(optimizer, module, *, count=3, seed=5):
    """Take steps on gradients that depend on the seed alone."""
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            sparse = isinstance(optimizer, torch.optim.SparseAdam)
            parameter.grad = (noise.to_sparse() if sparse else noise) * parameter.requires_grad
        if isinstance(optimizer, torch.optim.LBFGS):
            target = torch.randn(module.second.weight.shape, generator=drawn)

            def closure(target=target):
                optimizer.zero_grad()
                loss = ((module.second.weight - target) ** 2).sum()
                loss = loss + (module.first.weight**4).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            optimizer.step()


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def twin_of(module):
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.grad = None
        parameter.owner = twin
    return twin


def reachable(root):
    """Everything behind an object that the garbage collector knows of, but for code and modules."""
    code = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType)
    found, todo = {}, [root]
    while todo:
        thing = todo.pop()
        if id(thing) in found or isinstance(thing, code):
            continue
        found[id(thing)] = thing
        if isinstance(thing, types.FunctionType):
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        elif isinstance(thing, weakref.ref):
            todo.append(thing())
        else:
            todo += gc.get_referents(thing)
    return found


def assert_apart(new, old, module):
    """Nothing behind the copy is a parameter, a group or a state of the original."""
    behind = reachable(new)
    mine = [old, module, old.state, old.param_groups, *old.param_groups, *module.parameters()]
    mine += [group["params"] for group in old.param_groups]
    for state in old.state.values():
        mine += [thing for thing in reachable(state).values() if isinstance(thing, torch.Tensor)]
    assert [thing for thing in mine if id(thing) in behind] == []


def compare(make, *, module=None):
    """Fresh against rebuilt after training, on equal gradients; return original and copy."""
    module = module or net()
    old = make(module)
    steps(old, module)
    before = (weights(module), copy.deepcopy(old.state_dict()))
    left, right = twin_of(module), twin_of(module)
    new = fresh_optimizer(old, module=module, twin=left)
    assert type(new) is type(old)
    assert_apart(new, old, module)
    fresh = make(right)
    assert str(new.state_dict()) == str(fresh.state_dict())  # Adagrad's first sums included
    steps(new, left, seed=9)
    steps(fresh, right, seed=9)
    assert equal(weights(left), weights(right))
    assert not equal(weights(left), before[0])
    # the original is as it was, and goes on as if nobody had copied it
    assert equal(weights(module), before[0])
    assert str(old.state_dict()) == str(before[1])
    return old, new


def settings_of(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_optimizer_of_torch_steps_as_a_fresh_one(name):
    kind, how = EVERY[name], SETTINGS.get(name, {})
    old, new = compare(lambda module: kind(module.parameters(), **how))
    assert settings_of(new) == settings_of(old)
    assert new.defaults == old.defaults
    assert new.defaults is not old.defaults


@pytest.mark.parametrize("name", sorted(EVERY))
def test_the_copy_of_a_trained_optimizer_forgets_what_training_computed(name):
    """The test above could pass for an optimizer without a state: here it must matter."""
    module, kind, how = net(), EVERY[name], SETTINGS.get(name, {})
    old = kind(module.parameters(), **how)
    steps(old, module)
    assert old.state  # what SETTINGS are for
    left, right = twin_of(module), twin_of(module)
    new = fresh_optimizer(old, module=module, twin=left)
    keeping = kind(right.parameters(), **how)
    keeping.load_state_dict(old.state_dict())
    steps(new, left, seed=9)
    steps(keeping, right, seed=9)
    assert not equal(weights(left), weights(right))


@pytest.mark.parametrize("name", sorted(EVERY))
def test_only_adagrad_fills_its_state_in_the_constructor(name):
    """What `fresh_optimizer` relies on: a new torch that breaks it is noticed here."""
    optimizer = EVERY[name](net().parameters())
    assert bool(optimizer.state) == (name == "Adagrad")


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"maximize": True}])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_flags_are_kept(name, flags):
    _, new = compare(lambda module: EVERY[name](module.parameters(), lr=0.01, **flags))
    assert new.param_groups[0][next(iter(flags))] is True


def test_a_learning_rate_that_is_a_tensor_is_cloned_with_its_sharing():
    def make(module):
        return torch.optim.Adam(module.parameters(), lr=torch.tensor(0.02))

    old, new = compare(make)
    rate = new.param_groups[0]["lr"]
    assert rate is not old.param_groups[0]["lr"]
    assert rate is new.defaults["lr"]  # as the constructor leaves it
    rate.fill_(7.0)
    assert float(old.param_groups[0]["lr"]) == pytest.approx(0.02)


def test_groups_keep_their_own_settings_names_and_extra_keys():
    def make(module):
        return torch.optim.AdamW(
            [
                {"params": [("a", module.first.weight)], "lr": 0.5, "tag": "head"},
                {"params": [("b", module.second.weight)], "weight_decay": 0.5},
            ],
            lr=0.01,
        )

    old, new = compare(make)
    assert settings_of(new) == settings_of(old)
    assert [group["param_names"] for group in new.param_groups] == [["a"], ["b"]]
    assert new.param_groups[0]["tag"] == "head"
    assert [group["lr"] for group in new.param_groups] == [0.5, 0.01]


def test_named_parameters_and_frozen_ones():
    module = net()
    module.first.weight.requires_grad_(False)
    frozen = module.first.weight.clone()
    _, new = compare(lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1), module=module)
    assert new.param_groups[0]["param_names"] == ["first.weight", "second.weight"]
    assert torch.equal(new.param_groups[0]["params"][0], frozen)
    # an optimizer of the trainable ones alone
    compare(
        lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad]), module=module
    )


def test_a_scheduled_rate_is_kept_and_the_scheduler_stays_with_the_original():
    module = net()
    old = torch.optim.SGD(module.parameters(), lr=0.4, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(old, 1, gamma=0.5)
    steps(old, module)
    scheduler.step()
    assert "step" in old.__dict__  # torch hangs the scheduler's own step on the optimizer
    twin = twin_of(module)
    new = fresh_optimizer(old, module=module, twin=twin)
    assert new.param_groups[0]["lr"] == 0.2
    assert_apart(new, old, module)
    before = weights(module)
    steps(new, twin)
    assert equal(weights(module), before)
    assert not equal(weights(twin), before)
    scheduler.step()
    assert (old.param_groups[0]["lr"], new.param_groups[0]["lr"]) == (0.1, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps before its optimizer
        again = torch.optim.lr_scheduler.StepLR(new, 1, gamma=0.5)
        steps(new, twin, count=1)
        again.step()
    assert new.param_groups[0]["lr"] == 0.1


# --- classes of the user's own -------------------------------------------------------------------


class Scaled(torch.optim.SGD):
    """Another constructor, settings and parameters among the attributes, a hook of its own."""

    def __init__(self, model, config, *, label):
        super().__init__(model.parameters(), lr=config["lr"], momentum=config["momentum"])
        self.model = model
        self.config, self.label, self.factor = config, label, torch.tensor(0.5)
        self.by_name = dict(model.named_parameters())
        self.last = [model.second.weight]
        self.register_step_pre_hook(self._scale)
        self.register_step_post_hook(functools.partial(_note, self.last))

    def _scale(self, optimizer, args, kwargs):
        assert optimizer is self
        for parameter in self.by_name.values():
            parameter.grad.mul_(self.factor)


def _note(parameters, optimizer, args, kwargs):
    optimizer.largest = float(parameters[0].detach().abs().max())


def test_a_subclass_with_another_constructor_attributes_and_hooks():
    config = {"lr": 0.1, "momentum": 0.9}
    _, new = compare(lambda module: Scaled(module, config, label="mine"))
    assert (new.label, new.config, float(new.factor)) == ("mine", config, 0.5)
    assert new.model is new.param_groups[0]["params"][0].owner
    assert new.by_name["second.weight"] is new.model.second.weight is new.last[0]
    assert new.param_groups[0]["params"][1] is new.last[0]
    assert new.largest == float(new.last[0].detach().abs().max())


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and shares its groups and its state."""

    def __init__(self, inner, every):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.every, self.count = inner, every, 0
        self.param_groups, self.state, self.defaults = (
            inner.param_groups, inner.state, inner.defaults,
        )  # fmt: skip

    def step(self, closure=None):
        self.inner.step()

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_a_wrapper_is_copied_with_what_it_wraps(kind):
    old, new = compare(lambda module: Lookahead(kind(module.parameters(), lr=0.1), 5))
    assert new.inner is not old.inner
    assert new.param_groups is new.inner.param_groups
    assert new.state is new.inner.state
    assert new.every == 5


class Pair(torch.optim.Optimizer):
    """One optimizer for each parameter, groups and state only there."""

    def __init__(self, module):
        parameters = list(module.parameters())
        super().__init__(parameters, {})
        self.parts = {
            "first": torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9),
            "others": [torch.optim.Adagrad(parameters[1:], lr=0.1)],
        }
        self.parts["first"].scale = 2.0  # torch's own way to copy an optimizer would lose it

    def step(self, closure=None):
        self.parts["first"].step()
        self.parts["others"][0].step()


def test_optimizers_inside_an_optimizer_are_fresh_too():
    old, new = compare(Pair)
    assert old.parts["first"].state
    assert new.parts["first"].scale == 2.0


class Anchored(torch.optim.SGD):
    """Keeps what it computed outside of its state."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.mean = {"of": [torch.zeros(4, 3)]}

    def step(self, closure=None):
        self.mean["of"][0] += self.param_groups[0]["params"][0].grad
        return super().step(closure)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.numpy()])
def test_what_training_may_have_computed_outside_of_the_state_is_refused(wrap):
    module = net()
    old = Anchored(module.parameters())
    steps(old, module)
    old.mean = [wrap(old.mean["of"][0])]
    with pytest.raises(UnsupportedError, match=r"attribute 'mean' with a .* of shape \(4, 3\)"):
        fresh_optimizer(old, module=module, twin=twin_of(module))


def test_what_cannot_be_copied_is_named():
    module = net()
    old = torch.optim.SGD(module.parameters(), lr=0.1)
    old.stream = (i for i in range(3))
    with pytest.raises(
        UnsupportedError, match=r"got 'stream' of type generator: .*Keep it outside"
    ):
        fresh_optimizer(old, module=module, twin=twin_of(module))


@pytest.mark.parametrize("by", ["closure", "default", "weak reference", "callable"])
def test_a_hook_that_holds_on_to_the_original_is_refused(by):
    module = net()
    old = torch.optim.SGD(module.parameters(), lr=0.1)
    parameter = module.first.weight

    def closed(optimizer, args, kwargs):
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)

    def defaulted(optimizer, args, kwargs, held=parameter):
        held.grad.zero_()

    own = weakref.ref(old)

    def weak(optimizer, args, kwargs):
        own().zero_grad()

    hooks = {"closure": closed, "default": defaulted, "weak reference": weak}
    if by == "callable":
        old.after = types.SimpleNamespace(call=lambda: old.state)
    else:
        old.register_step_pre_hook(hooks[by])
    with pytest.raises(UnsupportedError, match="holds on to the parameters or state of this one"):
        fresh_optimizer(old, module=module, twin=twin_of(module))


def test_a_hook_that_uses_the_optimizer_it_is_called_with_comes_along():
    seen = []

    def make(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda own, args, kwargs: seen.append(id(own)))
        return optimizer

    _, new = compare(make)
    assert id(new) in seen


class Namespace(types.SimpleNamespace):
    """Anything that can be referred to weakly."""


class Watch:
    """A hook that reports to somebody, and whose copy reports to nobody."""

    def __init__(self, owner):
        self.owner = owner

    def __deepcopy__(self, memo):
        return Watch(None)

    def __call__(self, optimizer, args, kwargs):
        pass


@pytest.mark.parametrize("hold", [weakref.ref, lambda owner: owner])
def test_a_hook_that_knows_how_to_copy_itself_is_asked_to(hold):
    module = net()
    old = torch.optim.Adam(module.parameters(), lr=0.1)
    training = Namespace(optimizer=Anchored(module.parameters()), norms=np.ones(7))
    old.register_step_pre_hook(Watch(hold(training)))
    steps(old, module)
    new = fresh_optimizer(old, module=module, twin=twin_of(module))
    (hook,) = new._optimizer_step_pre_hooks.values()
    assert hook.owner is None
    assert_apart(new, old, module)


# --- parameters ----------------------------------------------------------------------------------


def test_a_parameter_that_the_module_does_not_have_is_named():
    module = net()
    stray = nn.Parameter(torch.ones(7))
    old = torch.optim.SGD([{"params": module.parameters()}, {"params": [stray]}], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, shape \(7,\), that the module"):
        fresh_optimizer(old, module=module, twin=twin_of(module))


def test_a_fresh_optimizer_of_the_same_model():
    module = net()
    old = torch.optim.Adam(module.parameters(), lr=0.1)
    steps(old, module)
    right = twin_of(module)
    new = fresh_optimizer(old, module=module, twin=module)
    assert [p is q for p, q in zip(new.param_groups[0]["params"], module.parameters(), strict=True)]
    steps(new, module)
    other = torch.optim.Adam(right.parameters(), lr=0.1)
    steps(other, right)
    assert equal(weights(module), weights(right))


def test_shared_parameters_stay_shared():
    module = net()
    module.third = module.first
    twin = twin_of(module)
    new = fresh_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), module=module, twin=twin)
    assert [p is q for p, q in zip(new.param_groups[0]["params"], twin.parameters(), strict=True)]
    assert len(new.param_groups[0]["params"]) == 2


def test_settings_that_are_arrays_belong_into_the_groups():
    def make(module):
        group = {"params": list(module.parameters()), "scale": np.arange(3.0)}
        return torch.optim.SGD([group], lr=0.1)

    module = net()
    old = make(module)
    new = fresh_optimizer(old, module=module, twin=twin_of(module))
    assert np.array_equal(new.param_groups[0]["scale"], np.arange(3.0))
    assert new.param_groups[0]["scale"] is not old.param_groups[0]["scale"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam])
@pytest.mark.parametrize("method", ["finetuning", "dp_sgd"])
def test_an_engine_unlearns_is_saved_and_goes_on_with_any_optimizer(kind, method):
    def make():
        run = network_run()  # the same every time
        return run.unlearning(optimizer=kind(run.module.parameters(), lr=0.01))

    def unlearn(engine, rows):
        return engine.unlearn(engine.plan(rows, method=method, steps=3), seed=1)

    engine = make()
    before = weights(engine.module)
    assert not equal(weights(unlearn(engine, [0, 1]).module), before)
    restored = make()
    restored.load_state_dict(engine.state_dict())
    # the state holds nothing that the optimizer computed, and is enough to go on from
    assert equal(weights(unlearn(engine, [2]).module), weights(unlearn(restored, [2]).module))


def test_the_engines_copy_works_through_opacus_wrapper():
    module = net()
    wrapped = GradSampleModule(module)
    old = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    twin = out_of_the_wrapper(wrapped)
    new = fresh_optimizer(old, module=plain_module(wrapped), twin=twin)
    assert [id(p) for p in new.param_groups[0]["params"]] == [id(p) for p in twin.parameters()]
