"""watch: every private optimizer that Opacus makes in this process is audited while it trains.

For scripts that know nothing of it: Opacus's constructor, its `make_private` and `get_epsilon`,
loaders and their samplers are listened to until the context ends. Computes no statistics itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from .. import _validate as check
from ..errors import UnsupportedError
from .checked import CONSISTENT, RED, ScriptCheck, TrainingCheck, judge
from .claim import Claim
from .gradient_canaries import CANARIES, CONTROLS, GradientCanaries
from .handed_out import HandedOut
from .ledger import accountant_of, runs_since
from .listening import listening
from .measurements import Measurements
from .seams import Listener, Seams, is_ghost
from .shadow_step import nominal_divisor
from .step_meter import StepMeter


class WatchedTraining(Listener):
    """One optimizer, from its construction on.

    Args:
        optimizer: Opacus's.
        watching: What it is watched with.
    """

    def __init__(self, optimizer: DPOptimizer, watching: Watching) -> None:
        self.optimizer: Any = optimizer
        self._watching = watching
        self._seams = Seams(optimizer)
        self.meter = StepMeter(
            names=self._name, multiplier=self._multiplier, used=self._held_against_loader
        )
        self.canaries: GradientCanaries | None = None
        self.why_no_canaries = ""
        self.accountant: Any = None
        self.history: list[Any] = []  # of the accountant when this training began
        self.loader: Any = None
        self.module: Any = None
        self._begun = False
        self._seams.listeners += [self, self.meter]

    def made(self, engine: Any, module: Any, loader: Any) -> None:
        """Learn what belongs to the optimizer from the call that made it private."""
        self.accountant, self.module, self.loader = engine.accountant, module, loader
        self.history = list(engine.accountant.history)
        self._watching.handed_out.know(loader)
        measured = self.meter.measured
        self.meter.module = module
        measured.divisor = nominal_divisor(self.optimizer)
        measured.instances = len(loader.dataset)
        measured.phantom = bool(
            getattr(getattr(loader, "collate_fn", None), "rand_on_empty", False)
        )

    def take_place_of(self, other: WatchedTraining) -> None:
        """Take over what belongs to an optimizer around the same plain one."""
        self.accountant, self.history = other.accountant, other.history
        self.module, self.loader = other.module, other.loader
        self.meter.module = other.module
        mine, its = self.meter.measured, other.meter.measured
        mine.divisor, mine.instances, mine.phantom = its.divisor, its.instances, its.phantom

    @property
    def plain(self) -> Any:
        """The optimizer of torch inside."""
        return self.optimizer.original_optimizer

    def before(self, stage: str, optimizer: Any) -> None:
        """Throw the canaries' coins before the first step."""
        if not self._begun:
            self._begun = True
            self._begin(optimizer)

    def _begin(self, optimizer: Any) -> None:
        hook = accountant_of(optimizer)
        self._watching.introduce(self)
        if self.accountant is None and hook.accountant is not None:
            self.accountant, self.history = hook.accountant, list(hook.accountant.history)
        if self._watching.canaries == 0:
            self.why_no_canaries = "none were asked for"
            return
        try:
            self.canaries = GradientCanaries(
                optimizer,
                sample_rate=hook.sample_rate or getattr(self.loader, "sample_rate", None),
                count=self._watching.canaries,
                controls=self._watching.controls,
                seed=self._watching.next_seed(),
                shared_generator=self._watching.shared_generator,
                resumed=True,
                seams=self._seams,
            )
        except (UnsupportedError, ValueError) as error:
            self.why_no_canaries = str(error)

    def end(self) -> None:
        """Stop listening."""
        self._seams.remove()

    @property
    def runs(self) -> tuple[tuple[float, float, int], ...] | None:
        """What the ledger has counted since this training began; None: nobody counts."""
        if self.accountant is None:
            return None
        return runs_since(self.history, self.accountant.history)

    def result(
        self, *, seen_steps: int, delta: float, level: float, confidence: float, trainings: int
    ) -> TrainingCheck:
        """Judge the training."""
        measured, canaries = self.meter.measured, self.canaries
        if self.meter.failure:
            measured = Measurements(moves=measured.moves, notes={"all": self.meter.failure})
        handed_out = self._watching.handed_out
        if unseen := handed_out.why_unseen(self.loader):
            measured.notes["loader"] = unseen
        measured.drawn, measured.draws = handed_out.drawn_of(self.loader, measured.instances)
        why = self.why_no_canaries
        if canaries is not None and canaries.why_not:
            why, canaries = canaries.why_not, None
        kind = next(k for k in type(self.optimizer).__mro__ if k.__module__.startswith("opacus."))
        mode = "ghost" if is_ghost(self.optimizer) else type(self.module).__name__
        return judge(
            measured,
            runs=self.runs,
            seen_steps=seen_steps,
            record=None if canaries is None else canaries.record,
            why_no_canaries=why,
            delta=delta,
            level=level,
            confidence=confidence,
            trainings=trainings,
            names=(kind.__name__, mode),
            bits="shared" if self._watching.shared_generator else "own",
            seconds={"watching": self._seams.seconds},
        )

    def _held_against_loader(self, rows: int | None) -> None:
        if self.loader is not None:
            self.meter.measured.add_source(*self._watching.handed_out.use(self.loader, rows))

    def _multiplier(self) -> float | None:
        history = [] if self.accountant is None else self.accountant.history
        return float(history[-1][0]) if history else None

    def _name(self, tensor: torch.Tensor) -> str | None:
        named = getattr(self.module, "named_parameters", None)
        for name, parameter in named() if named is not None else ():
            if parameter is tensor:
                return str(name).removeprefix("_module.")
        return None


class Watching:
    """What `watch` yields: the trainings seen so far, and after the context the result.

    Args:
        delta: δ of the claims.
        canaries: For each training; 0: none.
        controls: Entries on which the canaries' noise is measured.
        confidence: Of each lower bound.
        level: Probability that a correct script is a red flag, over everything.
        seed: Of coins and canary noise; None: from the system's randomness.
        shared_generator: As in `GradientCanaries`.

    Attributes:
        trainings: One for each optimizer, also for those without a step.
        result: ScriptCheck; None until the context has ended.
        printed: Lines of output that speak of ε, put there by whoever captured it.
    """

    def __init__(
        self,
        *,
        delta: float,
        canaries: int,
        controls: int,
        confidence: float,
        level: float,
        seed: int | None,
        shared_generator: bool,
    ) -> None:
        self.delta = check.delta(delta)
        self.canaries = check.integer("canaries", canaries, low=0)
        self.controls = check.integer("controls", controls, low=16)
        self.confidence = check.real(
            "confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True
        )
        self.level = check.real("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
        self._seed = None if seed is None else check.integer("seed", seed, low=0)
        self.shared_generator = bool(shared_generator)
        self.trainings: list[WatchedTraining] = []
        self.result: ScriptCheck | None = None
        self.printed: tuple[str, ...] = ()
        self.no_epsilon: BaseException | None = None  # what Opacus raised for want of a step
        self.handed_out = HandedOut()
        _ = Claim((), delta=delta).epsilon  # fails now, not at the end, without dp-accounting
        self._start = time.perf_counter()

    @property
    def verdict(self) -> str:
        """The verdict, once the context has ended."""
        return self._done().verdict

    def __str__(self) -> str:
        """Say the result."""
        return str(self._done())

    def _done(self) -> ScriptCheck:
        if self.result is None:
            raise RuntimeError(
                "Expected the watch to have ended, got one under way. Ask after the with block."
            )
        return self.result

    def constructed(self, optimizer: Any) -> None:
        """Watch an optimizer from its construction on."""
        self.trainings.append(WatchedTraining(optimizer, self))

    def made(self, engine: Any, made: Any) -> None:
        """Tell an optimizer what came with it from `make_private`."""
        for training in self.trainings:
            if training.optimizer is made[1]:
                training.made(engine, made[0], made[-1])

    def without_step(self, error: Exception) -> None:
        """Keep what an accountant raised for the ε of no steps."""
        self.no_epsilon = error

    def is_want_of_a_step(self, error: BaseException | None) -> bool:
        """Whether an error is, or was raised from, Opacus's for a ledger without a step."""
        while error is not None:
            if error is self.no_epsilon:
                return True
            error = error.__cause__
        return False

    def introduce(self, own: WatchedTraining) -> None:
        """Tell an optimizer that was built by hand what belongs to it, as far as it can be known.

        One around the same plain optimizer as another that `make_private` built has taken its
        place: model and loader are the same.
        """
        if own.loader is not None:
            return
        for other in reversed(self.trainings):
            if other.loader is not None and other.plain is own.plain:
                own.take_place_of(other)
                return

    def next_seed(self) -> int | None:
        """Return another seed for each training."""
        return None if self._seed is None else self._seed + 7919 * len(self.trainings)

    def finish(self) -> None:
        """Judge all trainings that made a step."""
        ran = time.perf_counter() - self._start
        begun = [t for t in self.trainings if t.meter.measured.moves or t.meter.failure]
        results = []
        for training in begun:
            same = [t for t in begun if t.accountant is training.accountant]
            results.append(
                training.result(
                    seen_steps=sum(t.meter.measured.moves for t in same),
                    delta=self.delta, level=self.level, confidence=self.confidence,
                    trainings=len(begun),
                )
            )  # fmt: skip
        notes = []
        if not self.trainings:
            notes.append("Opacus made no private optimizer in this process")
        elif not begun:
            notes.append("no private optimizer made a step: nothing to audit")
        if self.no_epsilon is not None:
            said = f"{type(self.no_epsilon).__name__}: {self.no_epsilon}"
            notes.append(
                "the script ended where it asked for the ε of a ledger without a step, which "
                f"Opacus answers with {said}. Ask after the first step"
            )
        self.result = ScriptCheck(
            trainings=tuple(results),
            level=self.level,
            printed=self.printed,
            notes=tuple(notes),
            seconds={"script": ran, "analysis": time.perf_counter() - self._start - ran},
        )


@contextmanager
def watch(
    *,
    delta: float = 1e-5,
    canaries: int = CANARIES,
    controls: int = CONTROLS,
    confidence: float = 0.95,
    level: float = 1e-3,
    seed: int | None = None,
    shared_generator: bool = False,
) -> Iterator[Watching]:
    """Watch every DPOptimizer that Opacus makes inside the context, and judge it at the end.

    Guarantee: a correct training is a red flag with probability at most `level`, over all trainings
        and tests; every number of it is what it would have been unwatched (not so with
        `shared_generator`, which keeps its law only).

    Args:
        delta: δ of the claims.
        canaries: For each training; 0: none.
        controls: Entries on which the canaries' noise is measured.
        confidence: Of each lower bound.
        level: Of the verdict, family-wise.
        seed: Of coins and canary noise; None: from the system's randomness, as an audit should.
        shared_generator: Canary noise from the training's own stream.

    Yields:
        Watching; its `result` is there when the context has ended without an error.

    Edge cases:
        ε asked for before any step   Opacus's "prv" and "gdp" raise, with "rdp" it is 0. Where the
                                      error would end the context, it ends it quietly, and `result`
                                      says what was seen of the steps; unless that is "consistent",
                                      then the error is the script's own and is raised
    """
    watching = Watching(
        delta=delta, canaries=canaries, controls=controls, confidence=confidence, level=level,
        seed=seed, shared_generator=shared_generator,
    )  # fmt: skip
    ended: Exception | None = None
    with listening(
        constructed=watching.constructed, made=watching.made, without_step=watching.without_step,
        further=watching.handed_out.patches(),
    ):  # fmt: skip
        try:
            yield watching
        except Exception as error:
            if not watching.is_want_of_a_step(error):
                raise
            ended = error
        finally:
            for training in watching.trainings:
                training.end()
    watching.no_epsilon = None if ended is None else watching.no_epsilon
    watching.finish()
    if ended is not None and watching.verdict == CONSISTENT:
        raise ended  # nothing found explains it: the script's own error


def assert_private(
    train: Callable[[], Any],
    *,
    delta: float = 1e-5,
    canaries: int = CANARIES,
    level: float = 1e-3,
    seed: int | None = None,
) -> ScriptCheck:
    """Run a training and fail unless it is what its ledger says, as far as one run can tell.

    For a test suite: `def test_training_is_private(): assert_private(train)`.

    Args:
        train: Builds a model and trains it with Opacus. A short training will do.
        delta: δ of the claims.
        canaries: For each training.
        level: Probability that a correct training fails the test.
        seed: As in `watch`.

    Returns:
        ScriptCheck: verdict "consistent", or "no power" where the training was too short to tell.

    Raises:
        AssertionError: A red flag; or no private training ran at all. The message says which.
    """
    with watch(delta=delta, canaries=canaries, level=level, seed=seed) as watching:
        train()
    result = watching.result
    assert result is not None
    if result.verdict == RED or not result.trainings:
        raise AssertionError(f"Expected a private training.\n{result}")
    return result
