"""What a study runs: conditions of training, sizes, and the three forms full, quick and smallest.

Constants only, fixed before any result was seen, except as the words beside them say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import _validate as check

MODELS = ("cnn", "mlp", "both")
RECIPE = 1  # raise it when `training.py` or `trials.py` compute something else


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
        complete: All forget sets and seeds; else quantile sets and fewer seeds.
        top_sets: A complete condition also forgets the top decile of each score.
        step_size: Learning rate of training and of fine-tuning.
    """

    name: str
    model: str
    noise_std: float
    nominal_noise_std: float
    weight_decay: float = 0.0
    epochs: int = 20
    complete: bool = False
    top_sets: bool = False
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
        train, test: Images.
        batch_size: Expected, drawn by independent coins.
        set_size: Members of a quantile or random forget set.
        set_ends: Upper ends of the quantile sets, as fractions of the ranks by privacy loss.
        random_sets: Disjoint random forget sets.
        seeds: Oracles, and unlearning runs, per forget set of a complete condition.
        few_seeds: The same elsewhere.
        unlearning_epochs: Of fine-tuning.
        records_per_epoch: Points of the forgetting curve.
        budgets: Epochs of fine-tuning after which the gap to the oracles is measured.
        barrier_rows: Test images that a loss barrier is measured on.
    """

    train: int
    test: int
    batch_size: int
    set_size: int
    set_ends: tuple[float, ...]
    random_sets: int
    seeds: int
    few_seeds: int
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
    tolerances: tuple[float, ...] = (0.05, 0.1)  # of accuracy and of confidence
    stay: int = 4  # records in a row
    early_epochs: int = 2  # window of GraNd and EL2N
    resamples: int = 2000
    recipe: int = field(default=RECIPE)

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for the record."""
        return asdict(self)


_ENDS = (0.05, 0.25, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0)


def _conditions(model: str) -> tuple[Condition, ...]:
    """SGLD and plain SGD in full; other noise, weight decay and stopping point with fewer sets.

    A training of the CNN takes five times that of the MLP: it gets fewer of everything.
    """
    noise, cheap = 0.01, model == "mlp"
    noisy = Condition("sgld", model, noise, noise, complete=True, top_sets=cheap)
    plain = replace(noisy, name="sgd", noise_std=0.0)
    small = replace(plain, complete=False, top_sets=False)
    found = (
        noisy,
        plain,
        replace(small, name="sgd, 5 epochs", epochs=5),
        Condition("sgld, twice the noise", model, 2 * noise, 2 * noise),
    )
    if not cheap:
        return found
    return (
        *found,
        Condition("sgld, half the noise", model, noise / 2, noise / 2),
        replace(small, name="sgd, weight decay", weight_decay=2e-3),
    )


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
    if dataset == "mnist5k":
        sizes = Sizes(
            train=2000, test=1000, batch_size=64, set_size=100, set_ends=_ENDS, random_sets=4,
            seeds=3, few_seeds=2, unlearning_epochs=20,
        )  # fmt: skip
    else:
        sizes = Sizes(
            train=1200, test=500, batch_size=64, set_size=60, set_ends=_ENDS, random_sets=4,
            seeds=3, few_seeds=2, unlearning_epochs=20,
        )  # fmt: skip
    certified = Certified(epsilons=(0.1, 0.5, 1.0, 2.0), set_sizes=(1, 10))
    whole = Settings(dataset, form, sizes, tuple(found), certified)
    if form == "full":
        return whole
    few = tuple(replace(c, top_sets=False) for c in found if c.complete)
    sizes = replace(
        sizes, train=600, test=300, batch_size=32, set_size=30, random_sets=2,
        seeds=2, unlearning_epochs=8, set_ends=(0.05, 0.5, 0.75, 0.85, 0.95, 1.0),
        barrier_rows=200,
    )  # fmt: skip
    certified = Certified(epsilons=(0.5, 1.0), set_sizes=(10,))
    if form == "quick":
        short = tuple(replace(c, epochs=10) for c in few)
        return replace(whole, sizes=sizes, conditions=short, certified=certified)
    sizes = replace(
        sizes, train=200, test=100, set_size=10, set_ends=(0.05, 0.5, 1.0), random_sets=1,
        seeds=1, unlearning_epochs=2, budgets=(1,), barrier_rows=50,
    )  # fmt: skip
    short = tuple(replace(c, epochs=3) for c in few)
    return replace(
        whole, sizes=sizes, conditions=short, stay=2, resamples=200,
        certified=Certified(epsilons=(1.0,), set_sizes=(10,), steps=120),
    )  # fmt: skip
