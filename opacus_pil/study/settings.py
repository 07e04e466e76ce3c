"""What a study runs: conditions of training, sizes, and the three forms full, quick and smallest.

Constants only, fixed before any result was seen, except as the words beside them say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import _validate as check

MODELS = ("cnn", "mlp", "both")
RECIPE = 2  # raise it when `noisy_steps.py` or `trials.py` compute something else


@dataclass(frozen=True)
class Condition:
    """One way to train and to fine-tune; the same steps serve for both.

    Attributes:
        name: Short name in tables.
        model: "cnn" or "mlp".
        noise_std: Noise added to every parameter at every step, standard deviation; 0 is plain SGD.
        nominal_noise_std: Noise that privacy losses are computed at; `noise_std` where there is
            any, else a nominal value (label `estimate` in either case).
        weight_decay: As in torch.optim.SGD.
        epochs: Of training.
        step_size: Learning rate of training and of fine-tuning.
    """

    name: str
    model: str
    noise_std: float
    nominal_noise_std: float
    weight_decay: float = 0.0
    epochs: int = 20
    step_size: float = 0.3

    def __post_init__(self) -> None:
        """Noise that is there is the noise that is accounted for."""
        if self.noise_std and self.noise_std != self.nominal_noise_std:
            raise ValueError(
                check.expected("nominal_noise_std", "to be noise_std", self.nominal_noise_std)
            )


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        trainings: Independent ones of each condition: split, start, batches and noise of their own.
        folds: Runs without a part of the instances, for what held-out runs say.
        train, test: Images.
        batch_size: Expected, drawn by independent coins.
        set_size: Members of a forget set.
        set_ends: Upper ends of the quantile sets, as fractions of the ranks by privacy loss.
        random_sets: Disjoint random forget sets.
        seeds: Oracles, and unlearning runs, per forget set.
        unlearning_epochs: Of fine-tuning.
        records_per_epoch: Points of the forgetting curve.
        budgets: Epochs of fine-tuning after which the gap to the oracles is measured.
        barrier_rows: Test images that a loss barrier is measured on.
    """

    trainings: int
    folds: int
    train: int
    test: int
    batch_size: int
    set_size: int
    set_ends: tuple[float, ...]
    random_sets: int
    seeds: int
    unlearning_epochs: int
    records_per_epoch: int = 4
    budgets: tuple[int, ...] = (1, 5)
    barrier_rows: int = 500

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which an instance is drawn once on average."""
        return max(round(self.train / self.batch_size), 1)


@dataclass(frozen=True)
class Certified:
    """Claim (d): the logistic head.

    Attributes:
        epsilons: Targets at δ = 1/n.
        set_sizes: Members of the forget sets; easiest, random and hardest of each size.
        steps: Of training; None: those of the demo.
    """

    epsilons: tuple[float, ...]
    set_sizes: tuple[int, ...]
    steps: int | None = None


@dataclass(frozen=True)
class Settings:
    """A whole study."""

    dataset: str
    form: str
    sizes: Sizes
    conditions: tuple[Condition, ...]
    certified: Certified
    order: float = 2.0  # Rényi order of the privacy loss
    other_order: float = 8.0  # to see whether the ranking depends on it
    clip: str = "median"  # rule that gives the bound of the clipped privacy loss
    decay_per_epoch: float = 0.9  # of the contracted loss
    tolerances: tuple[float, ...] = (0.05, 0.1, 0.2)  # of accuracy and of confidence
    stay: int = 4  # records in a row
    level: float = 0.9  # of the prediction intervals
    margin: float = 0.05  # of rank correlation: as good as the best proxy
    early_epochs: int = 2  # window of GraNd and EL2N
    resamples: int = 2000
    recipe: int = field(default=RECIPE)

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for the record."""
        return asdict(self)


_ENDS = (0.05, 0.25, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0)


def _conditions(model: str) -> tuple[Condition, ...]:
    """SGLD and plain SGD; the privacy loss of the latter is at a nominal noise."""
    noisy = Condition("sgld", model, 0.01, 0.01)
    return noisy, replace(noisy, name="sgd", noise_std=0.0)


def study_settings(dataset: str, *, model: str = "both", form: str = "full") -> Settings:
    """Return what a study of this data set and form runs.

    Args:
        dataset: "digits" or "mnist5k".
        model: "cnn", "mlp" or "both".
        form: "full"; "quick", some minutes; "smallest", which only shows that everything runs.
    """
    check.choice("model", model, MODELS)
    check.choice("form", form, ("full", "quick", "smallest"))
    models = ("cnn", "mlp") if model == "both" else (model,)
    found = [c for kind in models for c in _conditions(kind)]
    train, test, size = (2000, 1000, 100) if dataset == "mnist5k" else (1200, 500, 60)
    sizes = Sizes(
        trainings=3, folds=5, train=train, test=test, batch_size=64, set_size=size,
        set_ends=_ENDS, random_sets=4, seeds=2, unlearning_epochs=20,
    )  # fmt: skip
    certified = Certified(epsilons=(0.1, 0.5, 1.0, 2.0), set_sizes=(1, 10))
    whole = Settings(dataset, form, sizes, tuple(found), certified)
    if form == "full":
        return whole
    sizes = replace(
        sizes, trainings=2, train=600, test=300, batch_size=32, set_size=30, random_sets=2,
        seeds=1, unlearning_epochs=8, set_ends=(0.05, 0.5, 0.75, 0.85, 0.95, 1.0),
        barrier_rows=200,
    )  # fmt: skip
    certified = Certified(epsilons=(0.5, 1.0), set_sizes=(10,))
    if form == "quick":
        short = tuple(replace(c, epochs=10) for c in found)
        return replace(whole, sizes=sizes, conditions=short, certified=certified)
    sizes = replace(
        sizes, folds=2, train=200, test=100, set_size=10, set_ends=(0.05, 0.5, 1.0),
        random_sets=1, unlearning_epochs=2, budgets=(1,), barrier_rows=50,
    )  # fmt: skip
    short = tuple(replace(c, epochs=3) for c in found)
    return replace(
        whole, sizes=sizes, conditions=short, stay=2, resamples=200,
        certified=Certified(epsilons=(1.0,), set_sizes=(10,), steps=120),
    )  # fmt: skip
