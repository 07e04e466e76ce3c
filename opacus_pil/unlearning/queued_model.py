"""QueuedModel: deletion requests that wait in a folder, whoever serves them.

Says what is served with which arguments; how that survives a kill is `serving.py`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self, cast

import numpy.typing as npt
import torch.nn as nn

from .. import _validate as check
from ..certificates import NoisyFineTuningCertificate
from ..certificates.fields import constants_of
from .requests import Request, RequestQueue
from .serving import go_on, serve
from .trained_model import TrainedModel

if TYPE_CHECKING:
    from .engine import UnlearningEngine


class QueuedModel(TrainedModel):
    """A trained model with a durable queue of deletion requests.

    Args:
        requests: Folder of the queue, see UnlearningEngine; None: no queue.
        arguments: Of TrainedModel.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        requests: str | os.PathLike[str] | None,
        **arguments: Any,
    ) -> None:
        super().__init__(module, **arguments)
        self._serving = False
        self._state_name: str | None = None  # of the file with this state, once it was served
        self._queue = None if requests is None else RequestQueue(requests)
        if self._queue is not None:
            self._require_queued_data()
            go_on(cast("UnlearningEngine", self), self._queue)

    def branch(self) -> Self:
        """Return an engine in the same state, whose runs leave this one and its ledgers alone.

        It has no queue of requests. For trying out plans, as `evaluation.calibrate` does.
        """
        branch = super().branch()
        branch._queue, branch._state_name = None, None
        return branch

    @property
    def requests(self) -> RequestQueue:
        """The queue, to be read.

        Raises:
            ValueError: The engine was built without requests.
        """
        if self._queue is None:
            raise ValueError(
                "Expected an engine with requests, got one without. Build it with requests=folder."
            )
        return self._queue

    def submit(
        self,
        forget: npt.ArrayLike | None = None,
        *,
        rows: npt.ArrayLike | None = None,
        request_id: str,
    ) -> Request:
        """Put a deletion request into the queue; nothing runs before `serve`, in any process.

        Args:
            forget: Instances, each once, not all of them: by their ids if there are instance_ids,
                else by row; or a boolean mask over all rows. Who is forgotten already, or named by
                another request as well, is fine.
            rows: Rows of the data set, in its place.
            request_id: The requester's name for it. Submitting the same again changes nothing.

        Returns:
            The request as it stands.

        Raises:
            ValueError: Rows that are not in the data set, ids that nobody has, repeated, none or
                all; or a known request_id for other rows. The queue is left as it was.
            LedgerError: The database is locked, read-only or no queue, or its rows are those of
                other data. Likewise.
        """
        queue = self.requests
        named = self._named(forget, rows)
        if len(named) == self._size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all {self._size} "
                "rows. Delete the model instead."
            )
        self._require_queued_data()
        ids = self._ids.of(named) if self._ids.given else None
        return queue.submit(request_id, named, ids=ids, data=self._data.state())

    def serve(
        self,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        method: str = "dp_sgd",
        steps: int | None = None,
        max_steps: int | None = None,
        step_grid: int = 10,
        strength: float | None = None,
        predict: bool = False,
        adaptive: bool = False,
        certificate: NoisyFineTuningCertificate | None = None,
        max_batch: int | None = None,
        checkpoint_every: int = 50,
        seed: int | None = None,
        wait: bool = True,
    ) -> list[Request]:
        """Serve the queue until it is empty, and become the engine of the model served last.

        Requests that have a plan together are served by one run; an instance that several name is
        forgotten once. A run that another process left behind is finished first, as that planned
        it. A request that no plan exists for fails, with the reason; the others go on.

        Guarantee: killed at any moment and served again, by this or another process that built the
            same engine, no request is lost, none is run again once done, and the last model and
            ledgers equal bit for bit those of a serving that was not killed (on one machine with
            the same number of threads, if items and forward pass draw from torch's generator; not
            in secure mode). What is claimed about a request is what its plan claims. Everything
            forgotten so far is counted together, and requests are taken as chosen without a look
            at a model released in between unless `adaptive`; the result says which.
        Nothing computed with a forgotten instance is used again: optimizer state is dropped, its
        ledger row is marked and not charged any more, and the states and checkpoints of before are
        deleted once the new state is on disk. Checkpoints and copies elsewhere are the caller's.

        Args:
            epsilon, delta, method, steps, max_steps, step_grid, strength, predict, adaptive: As in
                `plan`.
            certificate: For method "noisy_finetuning", as in `plan`: of all certificates of a
                caller's only this one is about any forget set.
            max_batch: Most requests in one run; 1: one after the other. Default: all that wait.
            checkpoint_every: As in `unlearn`.
            seed: The seeds of all runs are drawn from this. Default: from the system; a run's seed
                is kept, privately, until the run is done. Fix it in experiments only.
            wait: Wait while another process serves; else raise.

        Returns:
            The requests that were done or failed, in that order.

        Raises:
            ValueError: Arguments that make no plan, or an engine without requests.
            TypeError: Another kind of certificate.
            LedgerError: The database is locked, read-only or no queue; another process serves and
                `wait` is False; the folder belongs to another engine, or its rows are those of
                other data. The model is the one that was served last.
            UnsupportedError: The training cannot be run again as it is described.
        """
        if certificate is not None and type(certificate) is not NoisyFineTuningCertificate:
            raise TypeError(
                f"Expected a NoisyFineTuningCertificate to serve by, got "
                f"{type(certificate).__name__}: it speaks of one forget set. Leave it out."
            )
        return serve(
            cast("UnlearningEngine", self),
            self.requests,
            goal={
                "epsilon": epsilon,
                "delta": delta,
                "method": method,
                "steps": steps,
                "max_steps": max_steps,
                "step_grid": step_grid,
                "strength": strength,
                "predict": predict,
                "adaptive": adaptive,
                "certificate": None if certificate is None else constants_of(certificate),
            },
            max_batch=None if max_batch is None else check.integer("max_batch", max_batch, low=1),
            seed=None if seed is None else check.integer("seed", seed, low=0),
            checkpoint_every=check.integer("checkpoint_every", checkpoint_every, low=1),
            wait=wait,
        )

    # --- inside -------------------------------------------------------------------------------

    def _require_queued_data(self) -> None:
        """Raise if the rows in the queue are those of other data, or in another order."""
        data = self.requests.data
        if data is not None:
            self._data.require_state(data)
