"""canary_split: natural canaries, thrown into a training by fair coins before it begins.

For black boxes: the training sees a data set, the auditor a model's outputs. Knows data sets,
models and scores by id; no optimizer. Bounds whose canaries might depend on each other are shown
and never take part in a verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from .. import _validate as check
from .._validate import IntArray
from ..capture.row_losses import LossOf, moved_to, pair_loss
from ..evaluation.membership import membership_scores
from .claim import Claim
from .error_test import ASSUMED, total_variation_bound, wrong_guess_bound
from .guesses import by_rank, planned, require_same_ids
from .lower_bound import LowerBound
from .one_run import (
    mahloujifar_bound,
    mahloujifar_p_value,
    require_small_delta,
    steinke_bound,
    steinke_expected,
)

KINDS = ("natural", "mislabelled")


@dataclass(frozen=True)
class Shadow:
    """What one shadow model says of the canaries.

    Attributes:
        margins: Log-odds of each canary's label, by id.
        included: Whether the canary was in this model's training, by id.
        configuration: What the model was trained with: noise, rate, clip bound, steps, network.
    """

    margins: Mapping[Hashable, float]
    included: Mapping[Hashable, bool]
    configuration: Mapping[str, Any]


@dataclass(frozen=True)
class CanaryBounds:
    """Lower bounds from one training with natural canaries.

    Attributes:
        lower: Those that assume nothing of the canaries: for the verdict.
        shown: Tighter ones that assume independent canaries: beside it, never in it.
    """

    lower: tuple[LowerBound, ...]
    shown: tuple[LowerBound, ...]


class CanarySplit:
    """Canaries and their coins, and the data set to train on. Made by `canary_split`.

    Attributes:
        dataset: To train on: everybody else, and the canaries that are in.
        rows: Shape (canaries,), their rows in the data set given.
        ids: Their ids, in that order.
        kind: "natural" or "mislabelled".
        thrown_at: When the coins were thrown, seconds since 1970.

    Privacy: the coins are the auditor's secret until the training is over.
    """

    def __init__(
        self,
        data: Any,
        *,
        rows: IntArray,
        coins: np.ndarray,
        ids: Sequence[Hashable],
        labels: Mapping[int, int],
        kind: str,
    ) -> None:
        self.rows, self.ids, self.kind = rows, tuple(ids), kind
        self.thrown_at = time.time()
        self._data, self._coins, self._labels = data, coins, dict(labels)
        out = set(rows[~coins].tolist())
        kept = np.array([i for i in range(len(data)) if i not in out], dtype=np.int64)
        self.dataset = TrainingSet(data, kept, self._labels)

    @property
    def included(self) -> dict[Hashable, bool]:
        """Whether each canary is in the training set, by id."""
        return {i: bool(c) for i, c in zip(self.ids, self._coins, strict=True)}

    def again(self, generator: torch.Generator) -> CanarySplit:
        """Return the same canaries with new coins, to train a shadow model on."""
        coins = _coins(len(self.rows), generator)
        return CanarySplit(
            self._data, rows=self.rows, coins=coins, ids=self.ids, labels=self._labels,
            kind=self.kind,
        )  # fmt: skip

    def item(self, place: int) -> Any:
        """Return a canary as the training sees it."""
        row = int(self.rows[place])
        return _relabelled(self._data[row], self._labels.get(row))

    # --- scores -------------------------------------------------------------------------------

    def loss_scores(
        self,
        module: torch.nn.Module,
        *,
        criterion: Callable[..., torch.Tensor] | None = None,
        loss_of: LossOf | None = None,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        batch_size: int = 256,
    ) -> dict[Hashable, float]:
        """Return minus each canary's loss under a model, by id: higher means member.

        Args:
            module: Plain, in the mode that its loss is to be taken in (evaluation mode, mostly).
            criterion: Loss of (outputs, targets); or
            loss_of: loss_of(module, batch) -> one loss per row.
            collate_fn: As in training.
            batch_size: Canaries at a time.
        """
        if (criterion is None) == (loss_of is None):
            raise ValueError(
                "Expected criterion or loss_of, got both or none. Name the training's loss."
            )
        losses = loss_of or pair_loss(criterion, reduction="mean")  # type: ignore[arg-type]
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(self.rows), batch_size):
                places = range(start, min(start + batch_size, len(self.rows)))
                batch = moved_to(collate_fn([self.item(i) for i in places]), device)
                found += losses(module, batch).double().cpu().tolist()
        return {i: -value for i, value in zip(self.ids, found, strict=True)}

    def likelihood_ratio_scores(
        self,
        margins: Mapping[Hashable, float],
        *,
        shadows: Sequence[Shadow],
        configuration: Mapping[str, Any],
    ) -> dict[Hashable, float]:
        """Return LiRA's online scores against shadow models, by id.

        Args:
            margins: Log-odds of each canary's label under the model, by id.
            shadows: Models trained alike on other coins (`again`); two or more each way.
            configuration: What the model was trained with; each shadow's must be the same.

        Raises:
            ValueError: Ids that do not match; a shadow of another configuration; too few shadows.
        """
        require_same_ids(margins, self.included)
        for number, shadow in enumerate(shadows):
            require_same_ids(shadow.margins, self.included)
            require_same_ids(shadow.included, self.included)
            other = sorted(
                key
                for key in {*shadow.configuration, *configuration}
                if shadow.configuration.get(key) != configuration.get(key)
                or (key in shadow.configuration) != (key in configuration)
            )
            if other:
                name = other[0]
                raise ValueError(
                    f"Expected shadow models of the audited model's configuration, got shadow "
                    f"{number} with {name}={shadow.configuration.get(name)!r} against "
                    f"{configuration.get(name)!r} ({len(other)} differ). Train shadows exactly "
                    "alike."
                )
        table = np.array([[s.margins[i] for i in self.ids] for s in shadows], dtype=np.float64)
        inside = np.array([[bool(s.included[i]) for i in self.ids] for s in shadows], dtype=bool)
        if len(shadows) < 2 or (inside.sum(0) < 1).any() or ((~inside).sum(0) < 1).any():
            raise ValueError(
                f"Expected every canary in at least one shadow model and out of another, got "
                f"{len(shadows)} shadow models. Train more, each on split.again(generator)."
            )
        scores = membership_scores(
            [margins[i] for i in self.ids],
            in_margins=np.where(inside, table, np.nan),
            out_margins=np.where(inside, np.nan, table),
            shared_variance=True,
        ).scores
        return {i: float(value) for i, value in zip(self.ids, scores, strict=True)}

    # --- bounds -------------------------------------------------------------------------------

    def bounds(
        self,
        scores: Mapping[Hashable, float],
        *,
        delta: float,
        claim: Claim | None = None,
        guesses: int | None = None,
        confidence: float = 0.95,
        trained_at: float | None = None,
    ) -> CanaryBounds:
        """Return lower bounds on ε from the scores of one trained model.

        Args:
            scores: Of each canary by id, higher meaning member.
            delta: δ of the statement; well below 1 / canaries, or Steinke's bound is left out.
            claim: What the training's accountant counted, for bounds against its curve.
            guesses: Canaries that are guessed; None: chosen from the claim before scores are seen,
                or all.
            confidence: Of each bound.
            trained_at: When the training began, where it ran in another process.

        Raises:
            ValueError: Scores that do not match by id; coins thrown after training.
        """
        level = 1.0 - check.real(
            "confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True
        )
        self.require_trained(trained_at)
        require_same_ids(scores, self.included)
        m = len(self.rows)
        if claim is None:
            require_small_delta(delta, m)
        counts = self._guess_counts(delta, claim, guesses, level)
        lower = []
        if delta * m < 1.0:  # else it can reject nothing; the claim's own curve can
            few = by_rank(scores, included=self.included, guesses=counts[0])
            lower.append(steinke_bound(few, delta=delta, level=level))
        everyone = by_rank(scores, included=self.included)
        wrong = everyone.wrong
        shown = [
            total_variation_bound(
                wrong, canaries=m, delta=delta, level=level, independent=False
            )
        ]  # fmt: skip
        if claim is not None:
            some = by_rank(scores, included=self.included, guesses=counts[1])
            lower.append(mahloujifar_bound(some, claim=claim, level=level))
            tight = wrong_guess_bound(wrong, canaries=m, claim=claim, level=level)
            shown.append(replace(tight, assumption=ASSUMED, method="guesses, binomial test"))
        return CanaryBounds(tuple(lower), tuple(shown))

    def _guess_counts(
        self, delta: float, claim: Claim | None, guesses: int | None, level: float
    ) -> tuple[int | None, int | None]:
        if guesses is not None or claim is None:
            return guesses, guesses
        m, half = len(self.rows), claim.losses(2.0)
        return (
            planned(
                claim.losses(), canaries=m,
                score=lambda g: steinke_expected(g, delta=delta, level=level),
            ),
            planned(
                claim.losses(), canaries=m,
                score=lambda g: -mahloujifar_p_value(
                    g.right, guesses=g.count, canaries=m, curve=half
                ),
            ),
        )  # fmt: skip

    def require_trained(self, trained_at: float | None) -> None:
        """Raise where the coins cannot have been in the training."""
        if trained_at is not None:
            if trained_at < self.thrown_at:
                raise ValueError(
                    "Expected coins to be thrown before training, got a training that began "
                    f"{self.thrown_at - trained_at:.0f} s earlier. Coins thrown afterwards say "
                    "nothing: split first, train on split.dataset, then score."
                )
        elif not self.dataset.read:
            raise ValueError(
                "Expected a model trained on split.dataset, got a split whose data nobody has "
                "read. Coins thrown after training say nothing: split first, train on "
                "split.dataset, then score; of a training in another process pass trained_at=."
            )


class TrainingSet(Dataset[Any]):
    """What a training with canaries is given.

    Attributes:
        rows: Shape (rows,), of the data set behind it.
        read: Whether anybody has asked for an item.
    """

    def __init__(self, data: Any, rows: IntArray, labels: Mapping[int, int]) -> None:
        self._data, self.rows, self._labels, self.read = data, rows, dict(labels), False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        """Return one row, with the label that the audit gives it."""
        self.read = True
        row = int(self.rows[place])
        return _relabelled(self._data[row], self._labels.get(row))


def canary_split(
    dataset: Any,
    count: int,
    generator: torch.Generator,
    *,
    kind: str = "natural",
    ids: Sequence[Hashable] | None = None,
    classes: int | None = None,
) -> CanarySplit:
    """Choose canaries and throw each one's coin, before training.

    Args:
        dataset: Map-style.
        count: Canaries, drawn without replacement; about half of them stay out of the training.
        generator: Of choice, coins and labels. Keep its seed to yourself until the audit is over.
        kind: "natural": rows as they are. "mislabelled": with another label, drawn at random, in
            training and in the scores alike; they are remembered better.
        ids: Of all rows of the data set; None: row numbers.
        classes: With "mislabelled": number of classes; None: one more than the largest label seen
            among the canaries.

    Returns:
        CanarySplit: train on its `dataset`, score its canaries, then ask for `bounds`.

    Raises:
        ValueError: More canaries than rows, ids of another number or not distinct, no label to
            change.
    """
    size = len(dataset)
    number = check.integer("count", count, low=2, high=size)
    check.choice("kind", kind, KINDS)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            check.expected(
                "generator", "to be a torch.Generator", generator,
                "Pass torch.Generator().manual_seed(n) with an n that nobody else knows.",
            )
        )  # fmt: skip
    names: Sequence[Hashable] = range(size) if ids is None else list(ids)
    if len(names) != size or len(set(names)) != size:
        raise ValueError(
            f"Expected one distinct id for each of {size} rows, got {len(names)} ids, "
            f"{len(set(names))} of them distinct. Pass ids of all rows."
        )
    chosen = torch.randperm(size, generator=generator)[:number].sort().values
    rows = chosen.numpy().astype(np.int64)
    coins = _coins(number, generator)
    labels = _other_labels(dataset, rows, classes, generator) if kind == KINDS[1] else {}
    return CanarySplit(
        dataset, rows=rows, coins=coins, ids=[names[i] for i in rows.tolist()], labels=labels,
        kind=kind,
    )  # fmt: skip


def _coins(count: int, generator: torch.Generator) -> np.ndarray:
    return (torch.rand(count, generator=generator) < 0.5).numpy()


def _other_labels(
    dataset: Any, rows: IntArray, classes: int | None, generator: torch.Generator
) -> dict[int, int]:
    """Draw another label for each canary."""
    own = [int(_label(dataset[int(row)])) for row in rows]
    number = max(own) + 1 if classes is None else check.integer("classes", classes, low=2)
    if number < 2 or max(own) >= number:
        raise ValueError(
            f"Expected at least two classes and labels below their number, got classes={number} "
            f"and labels up to {max(own)}. Pass classes=."
        )
    steps = torch.randint(1, number, (len(own),), generator=generator).tolist()
    return {
        int(row): (label + step) % number
        for row, label, step in zip(rows, own, steps, strict=True)
    }  # fmt: skip


def _label(item: Any) -> Any:
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ValueError(
            "Expected items to be pairs (input, label) to be mislabelled, got "
            f"{type(item).__name__}. Use kind='natural', or wrap the data set."
        )
    return item[1]


def _relabelled(item: Any, label: int | None) -> Any:
    if label is None:
        return item
    inputs, own = item
    new = torch.full_like(own, label) if torch.is_tensor(own) else type(own)(label)
    return type(item)((inputs, new))
